"""Two processes train as one does, and write once: recipe, stages, model, adapter, logs and ledger by the main one."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from test_train_st_recipes import RECIPES, launched
from tiny_training import distance, train

REPOSITORY = Path(__file__).parents[1]


# Two processes as torchrun starts them, but forked from one that has imported everything; each run's exit codes.
# A run is its arguments, its environment, and the step that kills it. accelerate knows FSDP and DeepSpeed on
# accelerators alone, and on CPUs trains by plain data parallelism without a word: where the environment asks for
# shards, it is told of GPUs.
# ZeRO-3 leaves small weights whole, which all of a tiny model's are: it is told to shard them as well.
TWO_PROCESSES = """
import json, os, signal, socket, sys
import datasets, peft, sentence_transformers, torch, trl
from accelerate.state import PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType
from sentence_transformers.sentence_transformer import evaluation, losses
from transformers import TrainerCallback
import train_st
from common.cli import run
from modeling import encoder, losses, recipe, reference, stages, trainer, training_data, validation

class Killed(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)

class Sharded(TrainerCallback):
    def on_step_begin(self, args, state, control, model, **kwargs):
        assert not any(weight.numel() for weight in model.parameters())
        assert all(weight.ds_tensor.numel() == (weight.ds_numel + 1) // 2 for weight in model.parameters())

def as_gpus(self, *args, **kwargs):
    start(self, *args, **kwargs)
    if self._shared_state["distributed_type"] == DistributedType.MULTI_CPU:
        self._shared_state["distributed_type"] = DistributedType["DEEPSPEED" if asks("DEEPSPEED") else "MULTI_GPU"]

def small_too(self):
    read(self)
    self.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0

def shards(stage, *args):
    trainer = build(stage, *args)
    trainer.add_callback(Killed())
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled) == (asks("FSDP"), asks("DEEPSPEED"))
    if trainer.is_deepspeed_enabled:
        trainer.add_callback(Sharded())
    return trainer

asks = train_st.launched_with
start, read, build = PartialState.__init__, DeepSpeedPlugin.__post_init__, stages.build_trainer
stages.build_trainer = shards
for argv, environment, dies_at in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        child = os.fork()
        if not child:
            os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            os.environ.update(environment)
            if asks("FSDP") or asks("DEEPSPEED"):
                PartialState.__init__, DeepSpeedPlugin.__post_init__ = as_gpus, small_too
            try:
                run(train_st.main, argv)
            except SystemExit as exit_:
                sys.stdout.flush()
                os._exit(exit_.code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("codes", codes, flush=True)
"""


@pytest.fixture(scope="module")
def recipe(recipe) -> dict:
    """All weights, then an adapter, both by a loss that sees the other rows of a batch; without dropout."""
    full, lora = ({**recipe["stages"][1], "name": name} for name in ("full", "lora"))
    stages = [{**full, "use_peft": False, "learning_rate": "1e-3"}, {**lora, "lora_dropout": 0.0}]
    return {**recipe, "stages": stages, "save_steps": 4, "logging_steps": 1, "max_grad_norm": 1.0, "use_cpu": True}


@pytest.fixture(scope="module")
def one(recipe, tmp_path_factory) -> Path:
    """The run that one process makes of it."""
    return train(tmp_path_factory.mktemp("one"), recipe)


def run_two(recipe, tmp_path, runs) -> subprocess.CompletedProcess:
    """Each of `runs`, (flags, environment, step that kills it), after --config, by two processes."""
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**recipe, "per_device_train_batch_size": 4}))
    runs = [(["--config", str(tmp_path / "train.yaml"), *flags], *rest) for flags, *rest in runs]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-c", TWO_PROCESSES, json.dumps(runs)]
    done = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_two_processes_train_as_one(recipe, one, tmp_path):
    two = tmp_path / "two"
    command = ["--output_dir", str(two)]
    wrong = ["--output_dir", str(tmp_path / "wrong"), "--lora_rr", "4"]
    nested = ["--output_dir", str(tmp_path / "nested"), "--stages", "full", "--max_steps", "1"]
    nested += ["--matryoshka_dims", "32", "16", "--mini_batch_size", "null"]
    done = run_two(recipe, tmp_path, [(argv, {}, None) for argv in (command, command, nested, wrong)])
    lines = [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith(("stage ", "codes"))]
    # one process writes; when nothing is left to do both end; bad input ends both, and before anything is written
    first, again, nested, refused = lines[:3], lines[3:6], lines[6:8], lines[8:]
    assert first == ["stage full: 12 steps", "stage lora: 12 steps", "codes [0"], done.stderr[-3000:]
    assert again == ["stage full: done before", "stage lora: done before", "codes [0"]
    assert nested == ["stage full: 1 steps", "codes [0"]
    assert refused == ["codes [2"] and done.stdout.endswith("codes [2, 2]\n")
    assert "did you mean 'lora_r'?" in done.stderr and not (tmp_path / "wrong").exists()

    check_same(one, two)


@pytest.mark.parametrize(
    "name",
    ["fsdp", pytest.param("zero3", marks=pytest.mark.skipif(not find_spec("deepspeed"), reason="needs deepspeed"))],
)
def test_two_processes_with_half_of_the_weights_each_train_as_one(name, recipe, one, tmp_path):
    """As recipes/accelerate/NAME.yaml launches them, killed within the second epoch of a stage and resumed from its
    shards, with the prompt of a batch computed once; in bfloat16, too. accelerate hides a sampler's set_epoch, so that
    a resume would replay the first epoch's order.
    """
    _, environment = launched(RECIPES / "accelerate" / f"{name}.yaml")
    kinds = ("ACCELERATE_USE_", "ACCELERATE_DEEPSPEED_", "FSDP_")
    shards = {key: value for key, value in environment.items() if key.startswith(kinds)}
    shards["ACCELERATE_MIXED_PRECISION"] = "no"  # to compare in float32
    two, half = tmp_path / "two", tmp_path / "half"
    command = ["--output_dir", str(two), "--resume_from_checkpoint", "true", "--share_prefix", "true"]
    rounded = ["--output_dir", str(half), "--share_prefix", "true", "--stages", "full", "--max_steps", "2"]
    runs = [(command, shards, 9), (command, shards, None), ([*rounded, "--bf16", "true"], shards, None)]
    done = run_two(recipe, tmp_path, runs)
    codes = [line for line in done.stdout.splitlines() if line.startswith("codes")]
    assert codes == ["codes [-9, -9]", "codes [0, 0]", "codes [0, 0]"], done.stderr[-3000:]
    assert done.stdout.count("step 9/12") == 2  # of the resumed stage, and of the one after it
    check_same(one, two)
    counts = [row["share_prefix"] for row in json.loads((two / "ledger.json").read_text())["stages"]]
    assert all(count["tokens_computed"] < 0.9 * count["tokens_padded"] for count in counts)
    expected, found = (losses_of(run, "full")[:2] for run in (one, half))
    assert found == pytest.approx(expected, rel=0.02) and found != pytest.approx(expected, rel=1e-5)


def losses_of(run: Path, stage: str) -> list[float]:
    history = json.loads((run / "logs" / f"{stage}.json").read_text())
    return [entry["loss"] for entry in history if "loss" in entry]


def check_same(one: Path, two: Path) -> None:
    """Files, losses, scores, weights and tokens of a run in one process, and of one in two."""
    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    assert not list(two.rglob("*.partial")) + list(two.rglob("checkpoint*"))
    for stage in ("full", "lora"):
        histories = [json.loads((run / "logs" / f"{stage}.json").read_text()) for run in (one, two)]
        losses, others = (losses_of(run, stage) for run in (one, two))
        assert len(losses) == 12 and max(losses) - min(losses) > 0.01
        assert others == pytest.approx(losses, abs=2e-4)
        scores, others = (
            [entry["eval_validation_cosine_ndcg@10"] for entry in history if "eval_runtime" in entry]
            for history in histories
        )
        assert others == pytest.approx(scores, abs=1e-3) and len(scores) == 2
    # Adam turns a gradient's rounding into a step's: far below what was learned, but not nothing
    assert distance(one / "model", two / "model") < 1e-3 < distance(one / "full", one / "model")
    rows = [json.loads((run / "ledger.json").read_text())["stages"] for run in (one, two)]
    assert [row["tokens"] for row in rows[0]] == [row["tokens"] for row in rows[1]]
    for row in rows[1]:
        assert row["device_seconds"] == pytest.approx(2 * row["training_seconds"], abs=0.02)
