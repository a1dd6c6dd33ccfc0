"""Two processes train as one does, and write once: recipe, stages, model, adapter, logs and ledger by the main one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_training import distance, own_cache, train, two_stages, write_hub

REPOSITORY = Path(__file__).parents[1]


# Two processes as torchrun starts them, but forked from one that has imported everything; each run's exit codes.
TWO_PROCESSES = """
import json, os, socket, sys
import datasets, peft, sentence_transformers, torch, trl
from sentence_transformers.sentence_transformer import evaluation, losses
from dataset_builders.cli import run
from modeling import encoder, losses, recipe, trainer, training_data
from train_st import main
for argv in json.loads(sys.argv[1]):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        child = os.fork()
        if not child:
            try:
                run(main, argv)
            except SystemExit as exit_:
                sys.stdout.flush()
                os._exit(exit_.code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("codes", codes, flush=True)
"""


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    with own_cache(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def recipe(tiny_decoder, tmp_path_factory) -> dict:
    """All weights, then an adapter, both by a loss that sees the other rows of a batch; without dropout."""
    recipe = two_stages(tiny_decoder, write_hub(tmp_path_factory.mktemp("data") / "hub"))
    full, lora = ({**recipe["stages"][1], "name": name} for name in ("full", "lora"))
    stages = [{**full, "use_peft": False, "learning_rate": "1e-3"}, {**lora, "lora_dropout": 0.0}]
    return {**recipe, "stages": stages, "logging_steps": 1, "max_grad_norm": 1.0, "use_cpu": True}


def test_two_processes_train_as_one(recipe, tmp_path):
    (tmp_path / "one").mkdir()
    one, two = train(tmp_path / "one", recipe), tmp_path / "two"
    (tmp_path / "train.yaml").write_text(yaml.safe_dump({**recipe, "per_device_train_batch_size": 4}))
    command = ["--config", str(tmp_path / "train.yaml"), "--output_dir", str(two)]
    wrong = [*command[:2], "--output_dir", str(tmp_path / "wrong"), "--lora_rr", "4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1"}
    environment["HF_DATASETS_CACHE"] = str(tmp_path / "cache")
    program = [sys.executable, "-c", TWO_PROCESSES, json.dumps([command, command, wrong])]
    done = subprocess.run(program, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split(",")[0] for line in done.stdout.splitlines() if line.startswith(("stage ", "codes"))]
    # one process writes; when nothing is left to do both end; bad input ends both, and before anything is written
    first, again, refused = lines[:3], lines[3:6], lines[6:]
    assert first == ["stage full: 12 steps", "stage lora: 12 steps", "codes [0"], done.stderr[-3000:]
    assert again == ["stage full: done before", "stage lora: done before", "codes [0"]
    assert refused == ["codes [2"] and done.stdout.endswith("codes [2, 2]\n")
    assert "did you mean 'lora_r'?" in done.stderr and not (tmp_path / "wrong").exists()

    assert sorted(os.listdir(two)) == sorted(os.listdir(one))
    assert not list(two.rglob("*.partial")) + list(two.rglob("checkpoint*"))
    for stage in ("full", "lora"):
        histories = [json.loads((run / "logs" / f"{stage}.json").read_text()) for run in (one, two)]
        losses, others = ([entry["loss"] for entry in history if "loss" in entry] for history in histories)
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
