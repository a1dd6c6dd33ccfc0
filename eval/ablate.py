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

import json
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
from eval.ablation_page import write_ablation_page
from eval.ablation_recipe import Ablation, Variant, folder_name, read_ablation, read_variants, write_mined_rows
from eval.ablation_table import choose, is_compared, notes, save, summary
from eval.held_out import count, load_documents, load_queries
from eval.intervals import LEVEL, METHOD, RESAMPLES
from eval.metrics import COMPARED, MEASURES
from eval.retrieval import model_row
from eval.systems import System
from modeling.recipe import parse_recipe, write_recipe

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
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def main(argv: Sequence[str]) -> None:
    if "--list_keys" in argv:
        print("\n".join(list_keys(Ablation, "An ablation")))
        return
    config, ablation = read_ablation(argv, __doc__)
    variants = read_variants(ablation, config)
    counts, keys = read_evaluation(Path(ablation.data), ablation.splits)
    if ablation.tasks:
        keys[TASKS] = fingerprint([(task.metadata.name, task.metadata.dataset) for task in read_tasks(ablation)])
    for rows in {rows.folder: rows for variant in variants for rows in variant.mined}.values():
        write_mined_rows(rows)
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
    result = {
        "config": config,
        "command": "python -m eval.ablate " + shlex.join(argv),
        "base": ablation.base,
        "shared": ablation.shared,
        "metric": COMPARED,
        "split": ablation.splits[-1],
        "chosen_on": ablation.split,
        "chosen": choose(rows),
        "baseline": ablation.compared_with,
        "seeds": list(ablation.seeds),
        "counts": counts,
        "interval": {"level": LEVEL, "resamples": RESAMPLES, "method": METHOD},
        "rows": rows,
        "failed": failed,
        "versions": stack_versions(),
    }
    result["notes"] = notes(result)
    save(result, Path(ablation.output_dir))
    if is_compared(result):
        scores: dict[str, dict[int, list[float]]] = {row["name"]: {} for row in rows}
        for run_ in runs:
            scores[run_.variant.name][run_.seed] = run_.scores(result["split"]).get("per_query", [])
        write_ablation_page(result, scores, Path(ablation.data), Path(ablation.output_dir))
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0]['name']}, seed {failed[0]['seed']}: "
            f"{failed[0]['reason']}; the same command tries them again"
        )


def runs_folder(ablation: Ablation, variant: Variant) -> Path:
    if ablation.runs_dir is not None:
        return Path(ablation.runs_dir) / variant.key[:16]
    return Path(ablation.output_dir) / "runs" / folder_name(variant.name)


def read_evaluation(data: Path, splits: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Counts of queries and documents of the last split; and for each split a key that changes with its data."""
    documents = load_documents(data)
    files = [file_sha256(data / "corpus" / name) for name in ("documents.arrow", "queries.parquet", "qrels.parquet")]
    counts = [count(documents, load_queries(data, split, set(documents.ids))) for split in splits]
    return counts[-1], {split: fingerprint([split, files]) for split in splits}


# --- training and scoring -------------------------------------------------------------------------------------------


def read_tasks(ablation: Ablation) -> list[AbsTask]:
    from eval.run_mteb import load_tasks

    return load_tasks(None, list(ablation.tasks), Path(ablation.data_root) if ablation.data_root else None)


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
    data = Path(ablation.data)
    documents = load_documents(data)
    rows = {}
    for split in ablation.splits:
        queries = load_queries(data, split, set(documents.ids))
        # under the run's folder: these vectors are not needed again
        rows[split] = model_row(System("model", str(folder / "model")), folder / "embeddings", documents, queries)[0]
    shutil.rmtree(folder / "embeddings")
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
    split = ablation.splits[-1]

    def matrix(done: Mapping[int, Run], seeds: Iterable[int], split: str) -> np.ndarray:
        return np.array([done[seed].scores(split)["per_query"] for seed in seeds])

    against = found[ablation.compared_with]
    rows = []
    for variant in variants:
        done = found[variant.name]
        row: dict[str, Any] = {"name": variant.name, "overrides": variant.overrides, "seeds": list(done)}
        row |= dict.fromkeys(("mean", "low", "high", "standard_deviation", "difference", "chosen_on_mean"))
        row |= {"per_seed": [], "measures": {}}
        if done:
            row |= summary(matrix(done, done, split))
            if len(done) > 1:
                row["standard_deviation"] = round(float(np.std(row["per_seed"], ddof=1)), 6)
            row["chosen_on_mean"] = round(float(matrix(done, done, ablation.split).mean()), 6)
            scores = [run_.scores(split) for run_ in done.values()]
            row["measures"] = {name: round(float(np.mean([one[name] for one in scores])), 4) for name in MEASURES}
            row |= costs(list(done.values()), split)
            if ablation.tasks:
                means = [run_.scores(TASKS)["means"] for run_ in done.values()]
                row["tasks"] = {name: [round(one[name], 6) for one in means] for name in means[0]}
        both = [seed for seed in done if seed in against]
        if both and done is not against:
            row["difference"] = summary(matrix(done, both, split) - matrix(against, both, split)) | {"seeds": both}
        rows.append(row)
    return rows


def costs(runs: Sequence[Run], split: str) -> dict[str, Any]:
    """What one seed of a row cost on average."""
    totals = []
    for run_ in runs:
        ledger = json.loads((run_.folder / "ledger.json").read_text(encoding="utf-8"))
        steps = {row["stage"]: row["steps"] for row in ledger["stages"]}
        arguments = {stage.name: stage.training for stage in run_.variant.recipe.stages}
        batch = {
            name: own.per_device_train_batch_size * own.gradient_accumulation_steps for name, own in arguments.items()
        }
        total = {"steps": sum(steps.values()), "examples": sum(steps[name] * batch[name] for name in steps)}
        total |= {name: ledger["total"][name] for name in ("tokens", "training_seconds", "device_seconds")}
        total["scoring_seconds"] = run_.scores(split)["seconds"]
        total["peak_memory_bytes"] = max(
            row["peak_device_memory_bytes"] or row["peak_memory_bytes"] for row in ledger["stages"]
        )
        totals.append(total)
    return {name: round(float(np.mean([total[name] for total in totals])), 2) for name in totals[0]}


if __name__ == "__main__":
    run(main)
