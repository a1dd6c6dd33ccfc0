"""Training that is killed at any moment, or stopped by memory, disk or a non-finite loss, and goes on."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tiny_training import distance, train, weights

import train_st
from common.cli import run

# Each run is a fork, made before any work: loading the libraries takes longer.
KILLS = """
import os, sys
import datasets, peft, sentence_transformers, torch, trl
from pathlib import Path
from sentence_transformers.sentence_transformer import evaluation, losses
from kills import changes
from modeling import encoder, losses, recipe, reference, stages, student, trainer, training_data, validation
from train_st import main
recipe, output = sys.argv[1], Path(sys.argv[2])
os.dup2(os.open(output / "log", os.O_WRONLY | os.O_CREAT), 2)

def run(folder, moment=None):
    command = ["--config", recipe, "--output_dir", str(folder), "--resume_from_checkpoint", "true"]
    return changes(lambda: main(command), folder, moment)

made = run(output / "whole")
folder = output / "killed"
for moment in (made // 5, made // 3, made // 4):  # of the run so far: in both stages
    assert run(folder, moment) is None
    steps = [path.parent.name for path in folder.glob("*.partial/checkpoints/*/trainer_state.json")]
    print("state", *sorted(path.name for path in folder.glob("*")), *sorted(steps), flush=True)
run(folder)
"""


@pytest.fixture(scope="module")
def recipe(recipe) -> dict:
    """Dropout in the adapter, so that a resume has to find the state of the random numbers, too."""
    return {**recipe, "eval_strategy": "no", "save_steps": 3}


def test_a_run_killed_again_and_again_comes_to_the_same_weights(recipe, tmp_path):
    # evaluations among the steps: they must not move what is drawn after a resume
    recipe = {**recipe, "num_train_epochs": 1, "eval_strategy": "steps", "eval_steps": 2}
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLS, str(tmp_path / "train.yaml"), str(tmp_path)]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout[-2000:] + (tmp_path / "log").read_text()[-3000:]
    states = [line for line in answer.stdout.splitlines() if line.startswith("state")]
    assert len(states) == 3
    for part in ("sts.partial", "retrieval.partial", "checkpoint-"):
        assert any(part in state for state in states), states
    folder, whole = tmp_path / "killed", tmp_path / "whole"
    # same order of batches, same dropout, same optimiser state: equal but for the rounding of sums
    assert distance(folder / "model", whole / "model") < 1e-6
    assert not list(folder.rglob("checkpoint*")) + list(folder.glob("*.partial"))
    rows, expected = (json.loads((run / "ledger.json").read_text())["stages"] for run in (folder, whole))
    assert [row["tokens"] for row in rows] == [row["tokens"] for row in expected]
    assert all(row["seconds"] >= row["training_seconds"] for row in rows)
    assert files(folder) == files(whole)


def files(folder: Path) -> dict[str, bytes | None]:
    """What a run left, with the contents of tokenizers and modules, which no rounding changes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        if path.name in ("tokenizer.json", "modules.json")
        else None
        for path in folder.rglob("*")
    }


def test_a_kill_while_checkpoints_are_deleted_leaves_none_that_only_looks_whole(tmp_path, monkeypatch):
    """Resuming from one without weights or optimizer would fail, at every start anew."""
    from modeling.trainer import drop_checkpoints, last_checkpoint

    delete, names = os.unlink, ("model.safetensors", "optimizer.pt", "trainer_state.json", "1_Pooling/config.json")
    for moment in range(1, 2 * len(names) + 2):
        folder = tmp_path / str(moment)
        for step in (3, 6):
            for name in names:
                path = folder / f"checkpoint-{step}" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({"global_step": step}))
        calls = itertools.count(1)

        def killed(*args, moment=moment, calls=calls, **kwargs):
            if next(calls) == moment:
                raise KeyboardInterrupt  # past all that catches errors
            delete(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(os, "unlink", killed)
            stopped = pytest.raises(KeyboardInterrupt) if moment <= 2 * len(names) else contextlib.nullcontext()
            with stopped:
                drop_checkpoints(folder)
        left = last_checkpoint(folder) if folder.exists() else None
        assert left is None or all(Path(left, name).is_file() for name in names)
    assert not folder.exists()  # the last one ran to its end


def stop(folder: Path, recipe: dict, capsys, *flags: str) -> str:
    """The one line with which a run ends."""
    (folder / "train.yaml").write_text(yaml.safe_dump(recipe))
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run(train_st.main, ["--config", str(folder / "train.yaml"), "--output_dir", str(folder / "run"), *flags])
    err = capsys.readouterr().err
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert exit_.value.code == 2 and len(lines) == 1 and "Traceback" not in err, err
    return lines[0]


def break_at(monkeypatch, step: int, how) -> None:
    """Let `how()` stand for the loss, once, at a step of the trainer."""
    from modeling.trainer import EmbedderTrainer

    original = EmbedderTrainer.compute_loss

    def broken(self, *args, **kwargs):
        loss = original(self, *args, **kwargs)
        return how(loss) if self.state.global_step == step else loss

    monkeypatch.setattr(EmbedderTrainer, "compute_loss", broken)


def out_of_memory(_):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def goes_on_to_the_same(folder: Path, recipe: dict, whole: Path) -> None:
    resumed = train(folder, recipe, "--resume_from_checkpoint", "true")
    assert distance(resumed / "model", whole / "model") < 1e-5
    steps = [entry["step"] for entry in json.loads((resumed / "logs" / "retrieval.json").read_text())]
    assert steps == sorted(steps)


@pytest.fixture(scope="module")
def one_stage(recipe) -> dict:
    return {**recipe, "stages": recipe["stages"][1:], "num_train_epochs": 1}


@pytest.fixture(scope="module")
def whole(one_stage, tmp_path_factory) -> Path:
    return train(tmp_path_factory.mktemp("whole"), one_stage)


def test_out_of_memory_says_what_to_lower_and_goes_on(one_stage, whole, tmp_path, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        break_at(patch, 4, out_of_memory)
        line = stop(tmp_path, one_stage, capsys)
    assert (
        "stage 'retrieval': out of memory; lower activation_memory (auto) or mini_batch_size (4): same results" in line
    )
    assert "per_device_train_batch_size (8)" in line
    assert "--resume_from_checkpoint true goes on from" in line and line.endswith("checkpoint-3")
    assert not (tmp_path / "run" / "model").exists()
    goes_on_to_the_same(tmp_path, one_stage, whole)


def test_memory_that_was_never_enough_leaves_nothing_behind(one_stage, tmp_path, capsys, monkeypatch):
    """As a CPU's allocator says it."""
    break_at(monkeypatch, 0, lambda _: torch.empty(2**60, dtype=torch.uint8))
    line = stop(tmp_path, {**one_stage, "mini_batch_size": None}, capsys)
    assert "out of memory; lower" in line and line.endswith("per_device_train_batch_size (8)")
    assert sorted(os.listdir(tmp_path / "run")) == ["recipe.yaml", "stages.json"]


def test_a_full_disk_stops_and_goes_on(one_stage, whole, tmp_path, capsys, monkeypatch):
    """The optimiser's state of the second checkpoint goes to /dev/full, which answers as a full disk does."""
    original = torch.save

    def full(state, path, *args, **kwargs):
        original(state, "/dev/full" if "checkpoint-6" in str(path) else path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = stop(tmp_path, one_stage, capsys)
    assert "the disk is full" in line
    from modeling.trainer import last_checkpoint

    assert last_checkpoint(tmp_path / "run" / "retrieval.partial" / "checkpoints").endswith("checkpoint-3")
    goes_on_to_the_same(tmp_path, one_stage, whole)
    assert weights(whole / "model")  # compared on something
