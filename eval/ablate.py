"""Does a setting matter? Train a recipe's variants with several seeds and score them, with confidence intervals.

    python -m eval.ablate --config recipes/ablations/objectives.yaml --output_dir runs/ablations/objectives
    python -m eval.ablate --config ... --output_dir ... --report_split test     # the choice was made on validation

A recipe of an ablation (`Ablation` says what each key means; all of them are flags, too):

    base: recipes/demo/train.yaml           # what train_st.py would run
    data: runs/demo/data                    # whose held-out queries are asked
    baseline: soft_info_nce
    seeds: [0, 1, 2]
    shared: {total_steps: 60}               # overrides of the base for every row, the baseline's too
    variants:
      soft_info_nce: {}
      kl: {retrieval.loss: kl}              # KEY as a flag of train_st.py has it, or STAGE.KEY, or student.KEY
    grid: {stages: ["sts,retrieval", retrieval]}      # times every variant: all combinations
    # mining.margin, mining.num_negatives, mining.strategy, mining.seed: train on rows mined again from the same grades

Every variant and seed is trained and scored in a process of its own, in OUTPUT_DIR/runs/VARIANT/seed-N: its recipe,
stages, model/, ledger.json, run.log and scores-SPLIT.json. What is finished is skipped, so a killed ablation resumes;
a run that fails is reported, the others go on, and the exit code is 2.

OUTPUT_DIR/ablation.md, ablation.png and index.html (with the queries won and lost most) are for people;
ablation.json holds, for programs:

    config, command, base, shared, metric, split, chosen_on, chosen, baseline, seeds, counts, interval {level,
    resamples, method}, notes [sentence], failed [{name, seed, reason}], versions, and
    rows [{name, overrides, seeds: those that finished, mean, low, high, per_seed, standard_deviation (over seeds, null
    for one), difference {mean, low, high, per_seed, seeds} to the baseline or null, chosen_on_mean, measures {name:
    mean}, tasks {mteb's task type, "mean over types" or "mean over tasks": one score for each seed}, and the costs of
    a seed on average: steps, examples, tokens, training_seconds, device_seconds, scoring_seconds, peak_memory_bytes}]

`mean` and all that derives from it is null for a row of which no seed finished.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.cli import InputError, run
from common.recipes import list_keys
from common.steps import file_sha256, fingerprint, stack_versions, write_json
from eval.ablation_recipe import Ablation, Variant, folder_name, read_ablation, read_variants, write_mined_rows
from eval.ablation_table import choose, is_compared, notes, save, summary
from eval.held_out import HeldOut, load_documents, load_held_out
from eval.intervals import LEVEL, METHOD, RESAMPLES
from eval.metrics import COMPARED, MEASURES
from eval.pages import write_ablation_page
from eval.retrieval import model_row
from eval.run_files import read_json, read_ledger
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


def main(argv: Sequence[str]) -> None:
    if "--list_keys" in argv:
        print("\n".join(list_keys(Ablation, "An ablation")))
        return
    config, ablation = read_ablation(argv, __doc__)
    data, output = Path(ablation.data), Path(ablation.output_dir)
    variants = read_variants(ablation, config)
    asked = load_splits(ablation)
    keys = {split: split_key(split, data) for split in ablation.splits}
    if ablation.tasks:
        keys[TASKS] = fingerprint([(task.metadata.name, task.metadata.dataset) for task in read_tasks(ablation)])
    for variant in variants:
        for folder, source in variant.mined.items():
            write_mined_rows(folder, source, variant.mining)
    runs = [
        Run(
            variant,
            seed,
            runs_folder(ablation, variant) / f"seed-{seed}",
            {name: fingerprint([variant.key, seed, key]) for name, key in keys.items()},
        )
        for seed in ablation.seeds  # outermost: a killed ablation has whole comparisons of the seeds before
        for variant in variants
    ]
    failed = train_and_score(runs, ablation)
    rows = make_rows(variants, runs, ablation)
    reported = ablation.splits[-1]
    result = {
        "config": config,
        "command": "python -m eval.ablate " + shlex.join(argv),
        "base": ablation.base,
        "shared": ablation.shared,
        "metric": COMPARED,
        "split": reported,
        "chosen_on": ablation.split,
        "chosen": choose(rows),
        "baseline": ablation.compared_with,
        "seeds": list(ablation.seeds),
        "counts": asked[reported].counts,
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "method": METHOD},
        "rows": rows,
        "failed": failed,
        "versions": stack_versions(),
    }
    result["notes"] = notes(result)
    save(result, output)
    if is_compared(result):
        scores: dict[str, dict[int, list[float]]] = {row["name"]: {} for row in rows}
        for run_ in runs:
            scores[run_.variant.name][run_.seed] = run_.scores(reported).get("per_query", [])
        write_ablation_page(result, scores, asked[reported], output)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0]['name']}, seed {failed[0]['seed']}: "
            f"{failed[0]['reason']}; the same command tries them again"
        )


def runs_folder(ablation: Ablation, variant: Variant) -> Path:
    if ablation.runs_dir is not None:
        return Path(ablation.runs_dir) / variant.key[:16]
    return Path(ablation.output_dir) / "runs" / folder_name(variant.name)


def load_splits(ablation: Ablation) -> dict[str, HeldOut]:
    data = Path(ablation.data)
    documents = load_documents(data)
    return {split: load_held_out(data, split, documents) for split in ablation.splits}


def split_key(split: str, data: Path) -> str:
    """Changes with what is asked, and of which documents."""
    names = ("documents.arrow", "queries.parquet", "qrels.parquet")
    return fingerprint([split, [file_sha256(data / "corpus" / name) for name in names]])


def read_tasks(ablation: Ablation) -> list[AbsTask]:
    from eval.run_mteb import load_tasks

    return load_tasks(None, list(ablation.tasks), Path(ablation.data_root) if ablation.data_root else None)


# --- training and scoring -------------------------------------------------------------------------------------------


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
        write_recipe(parse_recipe(run_.variant.recipe.values, run_.name, overrides=settings))
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
    system, vectors = System("model", str(folder / "model")), folder / "embeddings"  # not needed again
    rows = {split: model_row(system, vectors, asked)[0] for split, asked in load_splits(ablation).items()}
    shutil.rmtree(vectors)
    for split, row in rows.items():  # last: with these the run counts as finished
        write_json(folder / f"scores-{split}.json", {**row, "model": "model", "key": keys[split]})


def score_tasks(folder: Path, ablation: Ablation) -> dict[str, dict[str, float]]:
    """mteb's main scores of a run's model by task, and their means as the leaderboard has them."""
    from eval.leaderboard import make_leaderboard
    from eval.run_mteb import evaluate, load_for_mteb

    tasks = read_tasks(ablation)
    results, failures = evaluate(load_for_mteb(str(folder / "model")), tasks, folder / "mteb", batch_size=32)
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


# --- the rows -------------------------------------------------------------------------------------------------------


def make_rows(variants: Sequence[Variant], runs: Sequence[Run], ablation: Ablation) -> list[dict[str, Any]]:
    """A row for each variant, from what its runs left."""
    found: dict[str, dict[int, Run]] = {variant.name: {} for variant in variants}
    for run_ in runs:
        if run_.is_scored:
            found[run_.variant.name][run_.seed] = run_
    split, against = ablation.splits[-1], found[ablation.compared_with]

    def per_query(done: Mapping[int, Run], seeds: Sequence[int], split: str) -> np.ndarray:
        return np.array([done[seed].scores(split)["per_query"] for seed in seeds])

    rows = []
    for variant in variants:
        done = found[variant.name]
        row: dict[str, Any] = {"name": variant.name, "overrides": variant.overrides, "seeds": list(done)}
        row |= dict.fromkeys(("mean", "low", "high", "standard_deviation", "difference", "chosen_on_mean"))
        row |= {"per_seed": [], "measures": {}}
        if done:
            row |= summary(per_query(done, row["seeds"], split))
            if len(done) > 1:
                row["standard_deviation"] = round(float(np.std(row["per_seed"], ddof=1)), 6)
            row["chosen_on_mean"] = round(float(per_query(done, row["seeds"], ablation.split).mean()), 6)
            row["measures"] = averages([run_.scores(split) for run_ in done.values()], MEASURES, 4)
            of_runs = [costs(run_, split) for run_ in done.values()]
            row |= averages(of_runs, of_runs[0], 2)
            if ablation.tasks:
                means = [run_.scores(TASKS)["means"] for run_ in done.values()]
                row["tasks"] = {name: [round(one[name], 6) for one in means] for name in means[0]}
        both = [seed for seed in done if seed in against]
        if both and done is not against:
            difference = per_query(done, both, split) - per_query(against, both, split)
            row["difference"] = summary(difference) | {"seeds": both}
        rows.append(row)
    return rows


def averages(entries: Sequence[Mapping[str, float]], names: Iterable[str], digits: int) -> dict[str, float]:
    return {name: round(float(np.mean([entry[name] for entry in entries])), digits) for name in names}


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


if __name__ == "__main__":
    run(main)
