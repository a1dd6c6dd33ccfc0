"""The runs of an ablation: every variant with every seed trained and scored, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError, run
from common.steps import file_sha256, fingerprint, read_json, write_json
from eval.ablation_recipe import Ablation, Variant, folder_name
from eval.held_out import HeldOut, load_documents, load_held_out
from eval.metrics import COMPARED
from eval.retrieval import model_row
from eval.run_files import read_ledger
from eval.systems import System
from modeling.recipe import parse_recipe, read_stages, write_recipe

if TYPE_CHECKING:
    from mteb import AbsTask

TASKS = "tasks"  # in place of a split: the scores of mteb's tasks


@dataclass(frozen=True)
class Run:
    """A variant with one seed; `keys`: what its scores depend on, by split and, where it has any, for TASKS."""

    variant: Variant
    seed: int
    folder: Path
    keys: dict[str, str]

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    @property
    def is_scored(self) -> bool:
        return all(self.scores(name).get("key") == key for name, key in self.keys.items())

    def scores(self, name: str) -> dict[str, Any]:
        """What `train_and_score_one` wrote of a split, or of TASKS; {} where it did not."""
        path = self.folder / f"scores-{name}.json"
        return read_json(path) if path.is_file() else {}


def load_splits(ablation: Ablation) -> dict[str, HeldOut]:
    data = Path(ablation.data)
    documents = load_documents(data)
    return {split: load_held_out(data, split, documents) for split in ablation.splits}


def read_tasks(ablation: Ablation) -> list[AbsTask]:
    from eval.run_mteb import load_tasks

    return load_tasks(None, list(ablation.tasks), Path(ablation.data_root) if ablation.data_root else None)


def make_runs(variants: Sequence[Variant], ablation: Ablation) -> list[Run]:
    """Every variant with every seed; seeds outermost: a killed ablation has whole comparisons of the seeds before."""
    keys = {split: split_key(split, Path(ablation.data)) for split in ablation.splits}
    if ablation.tasks:
        keys[TASKS] = fingerprint([(task.metadata.name, task.metadata.dataset) for task in read_tasks(ablation)])
    if ablation.scoring_dtype:
        keys = {name: fingerprint([key, ablation.scoring_dtype]) for name, key in keys.items()}
    return [
        Run(
            variant,
            seed,
            runs_folder(ablation, variant) / f"seed-{seed}",
            {name: fingerprint([variant.key, seed, key]) for name, key in keys.items()},
        )
        for seed in ablation.seeds
        for variant in variants
    ]


def runs_folder(ablation: Ablation, variant: Variant) -> Path:
    if ablation.runs_dir is not None:
        return Path(ablation.runs_dir) / variant.key[:16]
    return Path(ablation.output_dir) / "runs" / folder_name(variant.name)


def split_key(split: str, data: Path) -> str:
    """Changes with what is asked, and of which documents."""
    names = ("documents.arrow", "queries.parquet", "qrels.parquet")
    return fingerprint([split, [file_sha256(data / "corpus" / name) for name in names]])


def train_and_score(runs: Sequence[Run], ablation: Ablation) -> list[dict[str, Any]]:
    """Run what is not finished, one run after the other, each in a new process; return the failed ones."""
    waiting = [run for run in runs if not run.is_scored]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done before", flush=True)
    failed: list[dict[str, Any]] = []
    start = time.monotonic()
    for number, run_ in enumerate(waiting, start=1):
        settings = {"seed": run_.seed, "data_seed": None, "output_dir": str(run_.folder), "disable_tqdm": True}
        settings["resume_from_checkpoint"] = "true"
        write_recipe(parse_recipe(run_.variant.recipe.values, overrides=settings))
        exit_code = run_in_new_process(run_.folder, ablation, run_.keys)
        if exit_code == 0:
            outcome = ", ".join(
                f"{COMPARED} {run_.scores(split)[COMPARED]:.4f} ({split})" for split in ablation.splits
            )
        else:
            why = reason(run_.folder, exit_code)
            outcome = f"failed: {why}"
            failed.append({"name": run_.variant.name, "seed": run_.seed, "reason": why})
        left = timedelta(seconds=round((time.monotonic() - start) / number * (len(waiting) - number)))
        print(f"[{number}/{len(waiting)}] {run_.name}: {outcome}; about {left} left", flush=True)
    return failed


def run_in_new_process(folder: Path, ablation: Ablation, keys: Mapping[str, str]) -> int:
    """Train and score the recipe in `folder` in a process of its own; its exit code, negative for a signal."""
    process = multiprocessing.get_context("spawn").Process(target=_child, args=(folder, ablation, keys))
    process.start()
    try:
        process.join()
    finally:  # also when we are interrupted
        process.kill()
        process.join()
    return process.exitcode


def _child(folder: Path, ablation: Ablation, keys: Mapping[str, str]) -> None:
    """`run_in_new_process`'s process: it ends with its parent, writes run.log, and exits as every command does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (folder / "run.log").open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)

    run(lambda _: train_and_score_one(folder, ablation, keys), [])


def train_and_score_one(folder: Path, ablation: Ablation, keys: Mapping[str, str]) -> None:
    import train_st

    train_st.main(["--config", str(folder / "recipe.yaml")])
    if TASKS in keys:
        write_json(folder / f"scores-{TASKS}.json", {**score_tasks(folder, ablation), "key": keys[TASKS]})
    system = System("model", str(folder / "model"), dtype=ablation.scoring_dtype)
    vectors = folder / "embeddings"  # not needed again
    rows = {split: model_row(system, vectors, asked)[0] for split, asked in load_splits(ablation).items()}
    shutil.rmtree(vectors)
    for split, row in rows.items():  # last: with these the run counts as finished
        write_json(folder / f"scores-{split}.json", {**row, "model": "model", "key": keys[split]})


def score_tasks(folder: Path, ablation: Ablation) -> dict[str, dict[str, float]]:
    """mteb's main scores of a run's model by task, and their means as the leaderboard has them."""
    from eval.leaderboard import make_leaderboard
    from eval.run_mteb import evaluate, load_for_mteb, use_dtype

    tasks = read_tasks(ablation)
    model = load_for_mteb(str(folder / "model"))
    if ablation.scoring_dtype:
        use_dtype(model, ablation.scoring_dtype)
    results, failures = evaluate(model, tasks, folder / "mteb", batch_size=32)
    for name, why in failures.items():
        raise InputError(f"task {name}: {why}")
    board = make_leaderboard({"model": results}, tasks)
    [scores], [means] = board.scores, board.type_means()
    by_task = dict(zip((task.metadata.name for task in board.tasks), scores.tolist(), strict=True))
    by_type = dict(zip(board.types, means.tolist(), strict=True))
    overall = {"mean over tasks": float(scores.mean()), "mean over types": float(means.mean())}
    return {"tasks": by_task, "means": by_type | overall}


def _end_with_parent() -> None:
    """Without this, a killed ablation's run would go on beside the one that is started again."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def reason(folder: Path, exit_code: int) -> str:
    """Why a run failed, in one line."""
    if exit_code < 0:
        return f"ended by signal {signal.Signals(-exit_code).name}{', out of memory?' * (exit_code == -9)}"
    lines = (folder / "run.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit code {exit_code}").removeprefix("error: ")


def costs(run_: Run, split: str) -> dict[str, float]:
    """What a run cost, by its ledger."""
    ledger = read_ledger(run_.folder)
    keys = {stage["name"]: stage["keys"] for stage in read_stages(run_.folder)["stages"]}
    steps = {row["stage"]: row["steps"] for row in ledger["stages"]}
    batch = {name: of["per_device_train_batch_size"] * of["gradient_accumulation_steps"] for name, of in keys.items()}
    return {
        "steps": sum(steps.values()),
        "examples": sum(steps[name] * batch[name] for name in steps),
        **{name: ledger["total"][name] for name in ("tokens", "training_seconds", "device_seconds")},
        "scoring_seconds": run_.scores(split)["seconds"],
        "peak_memory_bytes": max(
            row["peak_device_memory_bytes"] or row["peak_memory_bytes"] for row in ledger["stages"]
        ),
    }
