"""Does a setting matter? Train a recipe's variants with several seeds, score them, and tell how sure one can be.

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
    # mining.margin, mining.num_negatives, mining.strategy, mining.seed: train on rows mined anew from the same grades

Every variant and seed has a folder OUTPUT_DIR/runs/VARIANT/seed-N: the recipe that trains it, its stages, model/,
ledger.json, run.log and scores-SPLIT.json. It is trained and scored in a process of its own. Stages that two runs
begin with alike are trained once. What is finished is skipped, so that a killed ablation goes on where it stopped; a
run that fails is told, the others go on, and the exit code is 2.

OUTPUT_DIR/ablation.md and ablation.png are for people; ablation.json holds, for programs:

    config, command, base, shared, metric, split, chosen_on, chosen, baseline, seeds, counts, interval {level,
    resamples, method}, notes [sentence], failed [{name, seed, reason}], versions, and
    rows [{name, overrides, seeds: those that finished, mean, low, high, per_seed, standard_deviation (over seeds, null
    for one), difference {mean, low, high, per_seed, seeds} to the baseline or null, chosen_on_mean, measures {name:
    mean}, and the costs of a seed on average: steps, examples, tokens, training_seconds, device_seconds,
    scoring_seconds, peak_memory_bytes}]

`mean` and all that derives from it is null for a row of which no seed finished.
"""

from __future__ import annotations

import copy
import functools
import itertools
import json
import multiprocessing
import multiprocessing.connection
import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field

import train_st
from common.cli import ArgumentParser, InputError, run
from common.models import resolve_model
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import (
    MANIFEST,
    file_sha256,
    files_of,
    fingerprint,
    folder_step,
    stack_versions,
    write_json,
)
from eval.ablation_table import INTERVAL, choose, notes, save, summary
from eval.held_out import count, load_documents, load_queries
from eval.retrieval import COMPARED, MEASURES, model_row
from eval.systems import System
from modeling.recipe import Recipe, parse_keys, read_recipe, write_recipe
from modeling.recipe import parse_recipe as parse_training_recipe

# What this module says itself, so that a variant cannot.
OURS = ("seed", "data_seed", "output_dir", "resume_from_checkpoint", "disable_tqdm")
# Imported once, in the process that every run is forked from: half of the time of a short run.
PRELOAD = ["sentence_transformers", "trl", "modeling.losses", "modeling.trainer", "ir_measures"]


class Ablation(Section):
    """An ablation's recipe."""

    base: str  # a recipe of train_st.py
    data: str  # folder that dataset_builders.build wrote: its documents are searched
    output_dir: str
    baseline: str | None = None  # row that the others are compared with; null: the first
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    split: str = "validation"  # whose queries the choice is made on
    report_split: str | None = None  # whose queries the table is about; null: the same
    shared: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, list[Any]] = Field(default_factory=dict)

    @property
    def splits(self) -> list[str]:
        """Both splits, the one that the table is about last."""
        return list(dict.fromkeys([self.split, self.report_split or self.split]))


@dataclass(frozen=True)
class Variant:
    """One row of the table: the base with overrides, read and checked."""

    name: str
    overrides: dict[str, Any]
    values: dict[str, Any]  # the recipe as YAML has it
    recipe: Recipe
    mined: list[MinedRows]
    key: str  # changes when the settings, the training data or the weights to start from do


@dataclass(frozen=True)
class MinedRows:
    """Training rows mined anew from the candidates that `source`, a published folder, holds."""

    source: str
    mining: dict[str, Any]
    folder: Path


@dataclass(frozen=True)
class Run:
    """A variant with one seed."""

    variant: Variant
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.variant.name}, seed {self.seed}"

    def scores_path(self, split: str) -> Path:
        return self.folder / f"scores-{split}.json"


def main(argv: Sequence[str]) -> None:
    config, ablation = read_ablation(argv)
    output = Path(ablation.output_dir)
    variants = read_variants(ablation, config)
    counts, keys = read_evaluation(Path(ablation.data), ablation.splits)
    for rows in {rows.folder: rows for variant in variants for rows in variant.mined}.values():
        write_mined_rows(rows)
    runs = [
        Run(variant, seed, output / "runs" / folder_name(variant.name) / f"seed-{seed}")
        for seed in ablation.seeds  # outermost: a killed ablation has whole comparisons of the seeds before
        for variant in variants
    ]
    failed = train_and_score(runs, Path(ablation.data), keys)
    rows = make_rows(variants, runs, ablation, keys)
    result = {
        "config": config,
        "command": "python -m eval.ablate " + shlex.join(argv),
        "base": ablation.base,
        "shared": ablation.shared,
        "metric": COMPARED,
        "split": ablation.splits[-1],
        "chosen_on": ablation.split,
        "chosen": choose(rows),
        "baseline": baseline_of(ablation, variants),
        "seeds": list(ablation.seeds),
        "counts": counts,
        "interval": INTERVAL,
        "rows": rows,
        "failed": failed,
        "versions": stack_versions(),
    }
    result["notes"] = notes(result)
    save(result, output)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0]['name']}, seed {failed[0]['seed']}: "
            f"{failed[0]['reason']}; the same command tries them again"
        )


# --- what to run ----------------------------------------------------------------------------------------------------


def read_ablation(argv: Sequence[str]) -> tuple[str, Ablation]:
    parser = ArgumentParser(prog="python -m eval.ablate", description=__doc__)
    parser.add_argument("--config", required=True, metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", metavar="SEED", help="0 1 2: instead of the recipe's")
    args, flags = parser.parse_known_args(argv)
    if args.seeds:  # a list as other commands take one, with commas, or as YAML has it
        flags += ["--seeds", f"[{','.join(args.seeds).strip('[]')}]"]
    ablation = parse_recipe(Ablation, read_yaml(args.config), args.config, flags)
    if len(set(ablation.seeds)) < len(ablation.seeds):
        raise InputError(f"{args.config}: seeds {list(ablation.seeds)}: a seed is there twice")
    return args.config, ablation


def combinations(variants: Mapping[str, dict[str, Any]], grid: Mapping[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """Name -> overrides of every variant with every combination of the grid's values.

    >>> list(combinations({"kl": {"loss": "kl"}}, {"alpha": [0, 1]}))
    ['kl, alpha=0', 'kl, alpha=1']
    """
    rows = {}
    for name, overrides in (variants or {"": {}}).items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            title = ", ".join([*([name] if name else []), *(f"{key}={value}" for key, value in chosen.items())])
            rows[title] = {**overrides, **chosen}
    return rows


def folder_name(name: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "_", name)


def read_variants(ablation: Ablation, config: str) -> list[Variant]:
    """Every row's recipe, checked before anything is trained. Raises InputError on the first that is wrong."""
    combined = combinations(ablation.variants, ablation.grid)
    if list(combined) in ([""], []):
        raise InputError(f"{config}: nothing to compare; name `variants:` or a `grid:`")
    folders = {folder_name(name) for name in combined}
    if len(folders) < len(combined) or not all(re.search(r"\w", name[:1]) and len(name) <= 100 for name in folders):
        raise InputError(f"{config}: variants are also folders: names differ in letters and digits, 100 at most")
    if ablation.baseline is not None and ablation.baseline not in combined:
        raise InputError(f"{config}: no variant {ablation.baseline!r} for a baseline; there are {'; '.join(combined)}")
    base = read_yaml(ablation.base)
    output = Path(ablation.output_dir)
    read_recipe(["--config", ablation.base, "--output_dir", ablation.output_dir], "")
    shared = override(base, ablation.shared, f"{config}: shared")
    variants = []
    for name, overrides in combined.items():
        where = f"{config}: variant {name!r}"
        values = override(shared, overrides, where)
        recipe = check_recipe(values, output, where)
        key = input_key(recipe, where)
        mining = read_mining({**ablation.shared, **overrides}, where)
        mined = use_mined_rows(values, recipe, mining, output / "mined", where) if mining else []
        if mined:
            recipe = check_recipe(values, output, where)
        variants.append(Variant(name, overrides, values, recipe, mined, fingerprint([key, mining])))
    return variants


def override(values: Mapping[str, Any], overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A recipe of train_st.py with `overrides`: a KEY holds for all stages, as a flag does; STAGE.KEY is stronger."""
    values = copy.deepcopy(dict(values))
    stages = {stage["name"]: stage for stage in values["stages"]}
    for key, value in sorted(overrides.items(), key=lambda item: "." in item[0]):
        owner, dot, name = key.rpartition(".")
        if name in OURS and owner != "student":
            raise InputError(f"{where}: {key} is not a variant's to set; seeds: and output_dir say it for all of them")
        if key == "stages":
            selected = value.split(",") if isinstance(value, str) else value
            if not isinstance(selected, list) or not selected or not all(name in stages for name in selected):
                raise InputError(f"{where}: stages {value!r}: name some of {', '.join(stages)}")
            values["stages"] = [stages[name] for name in selected]
        elif owner == "mining":
            continue  # of the data; see use_mined_rows
        elif owner == "student":
            values["student"] = {**(values.get("student") or {}), name: value}
            values.pop("model_name_or_path", None)
        elif dot:
            if owner not in stages:
                raise InputError(f"{where}: {key}: no stage {owner!r}; there are {', '.join(stages)}")
            stages[owner][name] = value
        else:
            values[key] = value
            if key == "model_name_or_path":
                values.pop("student", None)
            for holder in stages.values():
                for mapping in (holder, *(holder.get("datasets") or [])):
                    mapping.pop(key, None)
    return values


def check_recipe(values: Mapping[str, Any], output: Path, where: str) -> Recipe:
    """`values` as train_st.py will read them. Raises InputError on whatever is wrong in them."""
    return parse_training_recipe(values, where, overrides={"output_dir": str(output)})


def input_key(recipe: Recipe, where: str) -> str:
    """Changes when a run of `recipe` could come out differently. Raises InputError when it reads what is not there."""
    settings = [{key: value for key, value in stage.values.items() if key not in OURS} for stage in recipe.stages]
    data = {
        own.dataset_name: data_content(own.dataset_name, own.dataset_revision)
        for stage in recipe.stages
        for own in stage.datasets.values()
    }
    student = recipe.values.get("student")
    if student:
        from modeling.student import StudentConfig

        (config,) = parse_keys([StudentConfig], student, f"{where}: student")
        if not Path(config.corpus).is_dir():
            raise InputError(f"{where}: student.corpus {config.corpus}: no such folder; build the data first")
        start = [student, model_content(config.teacher), corpus_content(config.corpus)]
    else:
        start = [model_content(recipe.stages[0].model.model_name_or_path), recipe.stages[0].model.model_revision]
    return fingerprint([settings, recipe.values.get("merge"), data, start])


@functools.cache  # variants read the same, which may be gigabytes
def data_content(name: str, revision: str | None) -> str:
    from modeling.training_data import data_key

    return data_key(name, revision, "training data")


@functools.cache
def model_content(reference: str) -> str:
    return resolve_model(reference).fingerprint()


@functools.cache
def corpus_content(folder: str) -> str:
    return fingerprint(files_of(Path(folder)))


def read_evaluation(data: Path, splits: Sequence[str]) -> tuple[dict[str, int], dict[str, str]]:
    """Counts of what the last split's scores are about; and for each split a key that changes when they could."""
    documents = load_documents(data)
    names = ("corpus/documents.arrow", "corpus/queries.parquet", "corpus/qrels.parquet")
    files = {name: file_sha256(data / name) for name in names}
    for split in splits:
        counts = count(documents, load_queries(data, split, set(documents.ids)))
    return counts, {split: fingerprint([split, files]) for split in splits}


# --- rows mined anew ------------------------------------------------------------------------------------------------


def read_mining(overrides: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The keys `mining.KEY`, checked and without their prefix."""
    from dataset_builders.mine import Mining

    given = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith("mining.")}
    parse_recipe(Mining, given, f"{where}: mining")
    return given


def use_mined_rows(
    values: dict[str, Any], recipe: Recipe, mining: dict[str, Any], output: Path, where: str
) -> list[MinedRows]:
    """Let every data set of mined rows in `values` be one in a folder below `output`, and say how these are made."""
    made = []
    for holder, stage in zip(values["stages"], recipe.stages, strict=True):
        mappings = {entry["name"]: entry for entry in holder.get("datasets") or []} or {stage.name: holder}
        for name, own in stage.datasets.items():
            if own.dataset_config != "train":
                continue
            if not Path(own.dataset_name).is_dir():
                raise InputError(f"{where}: mining.*: {own.dataset_name!r} is no folder here; download the data first")
            folder = output / fingerprint([data_content(own.dataset_name, None), mining])
            made.append(MinedRows(own.dataset_name, mining, folder))
            mappings[name]["dataset_name"] = str(folder)
    if not made:
        raise InputError(f"{where}: mining.*: no stage trains on mined rows (dataset_config: train)")
    return made


def write_mined_rows(rows: MinedRows) -> None:
    from dataset_builders.builders import GradedDataset

    with folder_step(rows.folder, {"source": data_content(rows.source, None), "mining": rows.mining}) as step:
        if step.done:
            return
        print(f"mining {rows.source} anew: {rows.mining}", flush=True)
        cache = step.path / "cache"
        builder = GradedDataset(config_name="train", data_dir=rows.source, cache_dir=str(cache), **rows.mining)
        builder.download_and_prepare(str(step.path / "train"), file_format="parquet")
        shutil.rmtree(cache)
        configs = [{"config_name": "train", "data_files": "train/*.parquet"}]
        (step.path / "README.md").write_text(f"---\n{yaml.safe_dump({'configs': configs})}---\n", encoding="utf-8")
        step.finish(rows=builder.info.splits["train"].num_examples)


# --- training and scoring -------------------------------------------------------------------------------------------


def train_and_score(runs: Sequence[Run], data: Path, keys: Mapping[str, str]) -> list[dict[str, Any]]:
    """Do what is not done yet, one run after the other, and return those that failed, with the reason."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(PRELOAD)
    waiting = [run for run in runs if not is_scored(run, keys)]
    if len(waiting) < len(runs):
        print(f"{len(runs) - len(waiting)} of {len(runs)} runs are done before", flush=True)
    failed: list[dict[str, Any]] = []
    start = time.monotonic()
    for number, run_ in enumerate(waiting, start=1):
        take_over(run_, runs)
        prepare(run_)
        began = time.monotonic()
        process = processes.Process(target=_work, args=(run_, data, dict(keys)))
        process.start()
        try:
            process.join()
        finally:  # also when we are interrupted
            process.kill()
            process.join()
        now = time.monotonic()
        if process.exitcode == 0:
            outcome = ", ".join(f"{COMPARED} {read_scores(run_, split)[COMPARED]:.4f} ({split})" for split in keys)
        else:
            outcome = f"failed: {reason(run_, process.exitcode)}"
            failed.append({"name": run_.variant.name, "seed": run_.seed, "reason": reason(run_, process.exitcode)})
        left = (now - start) / number * (len(waiting) - number)
        print(f"[{number}/{len(waiting)}] {run_.name}: {outcome}; {now - began:.0f} s, {clock(left)} left", flush=True)
    return failed


def clock(seconds: float) -> str:
    """
    >>> clock(5400.0), clock(61.0), clock(9.0)
    ('about 1 h 30 min', 'about 1 min', 'about 9 s')
    """
    minutes, hours = round(seconds / 60), int(seconds // 3600)
    if seconds < 60:
        return f"about {seconds:.0f} s"
    return f"about {hours} h {minutes - 60 * hours} min" if hours else f"about {minutes} min"


def scores_key(run_: Run, key: str) -> str:
    return fingerprint([run_.variant.key, run_.seed, key])


def is_scored(run_: Run, keys: Mapping[str, str]) -> bool:
    return all(read_scores(run_, split).get("key") == scores_key(run_, key) for split, key in keys.items())


def read_scores(run_: Run, split: str) -> dict[str, Any]:
    """What `_work` wrote; {} where it did not."""
    try:
        scores = json.loads(run_.scores_path(split).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return scores if isinstance(scores, dict) else {}


def prepare(run_: Run) -> None:
    """Write the recipe of a run where train_st.py is going to write it itself."""
    settings = {"seed": run_.seed, "output_dir": str(run_.folder), "resume_from_checkpoint": "true"}
    settings["disable_tqdm"] = True
    values = copy.deepcopy(run_.variant.values)
    for holder in values["stages"]:
        for key in OURS:
            holder.pop(key, None)
    write_recipe(Recipe({**values, **settings}, run_.folder, run_.variant.recipe.stages, None))


def take_over(run_: Run, runs: Sequence[Run]) -> None:
    """Link the student and the first stages from runs that have made the same ones: train_st.py trains them again if
    their manifests tell it that they are not.
    """
    for other in runs:
        if other.folder == run_.folder:
            continue
        for name in common_steps(run_, other):
            source, target = other.folder / name, run_.folder / name
            partial = target.with_name(name + ".partial")
            if not (source / MANIFEST).is_file() or target.exists() or partial.exists():
                continue
            train_st.copy_files(source, partial)  # hard links where there can be some
            partial.rename(target)
            log = other.folder / "logs" / f"{name}.json"
            if log.is_file():
                (run_.folder / "logs").mkdir(exist_ok=True)
                shutil.copyfile(log, run_.folder / "logs" / log.name)


def common_steps(one: Run, other: Run) -> list[str]:
    """Names of the steps that both runs begin with."""
    first, second = one.variant.recipe, other.variant.recipe
    if first.values.get("student") != second.values.get("student"):
        return []
    steps = ["student"] if "student" in first.values else []
    if one.seed != other.seed:
        return steps
    for stage, same in zip(first.stages, second.stages, strict=False):
        if stage.name != same.name or stage.values != same.values:
            break
        steps.append(stage.name)
    return steps


def _work(run_: Run, data: Path, keys: dict[str, str]) -> None:
    """Train and score one run, in a process of its own that ends with its parent; exits as every command here does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with (run_.folder / "run.log").open("w", encoding="utf-8") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)

    def train_then_score(argv: Sequence[str]) -> None:
        train_st.main(argv)
        score(run_, data, keys)

    run(train_then_score, ["--config", str(run_.folder / "recipe.yaml")])


def _end_with_parent() -> None:
    """A run whose ablation was killed would go on, and the ablation that is started again would write beside it."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def score(run_: Run, data: Path, keys: Mapping[str, str]) -> None:
    documents = load_documents(data)
    rows = {}
    for split in keys:
        queries = load_queries(data, split, set(documents.ids))
        # vectors go under the run's folder instead of the data's: nobody asks for them again
        rows[split] = model_row(
            System(run_.name, str(run_.folder / "model")), run_.folder / "embeddings", documents, queries
        )
    shutil.rmtree(run_.folder / "embeddings")
    for split, row in rows.items():  # last: with these the run counts as finished
        write_json(run_.scores_path(split), {**row, "model": "model", "key": scores_key(run_, keys[split])})


def reason(run_: Run, exit_code: int) -> str:
    """Why a run failed, in one line."""
    if exit_code < 0:
        return f"ended by signal {signal.Signals(-exit_code).name}{', out of memory?' * (exit_code == -9)}"
    lines = (run_.folder / "run.log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return (lines[-1] if lines else f"exit code {exit_code}").removeprefix("error: ")


# --- the rows -------------------------------------------------------------------------------------------------------


def make_rows(
    variants: Sequence[Variant], runs: Sequence[Run], ablation: Ablation, keys: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each variant, from what its runs left."""
    found: dict[str, dict[int, Run]] = {variant.name: {} for variant in variants}
    for run_ in runs:
        if is_scored(run_, keys):
            found[run_.variant.name][run_.seed] = run_
    split = ablation.splits[-1]

    def matrix(done: Mapping[int, Run], seeds: Iterable[int], split: str) -> np.ndarray:
        return np.array([read_scores(done[seed], split)["per_query"] for seed in seeds])

    against = found[baseline_of(ablation, variants)]
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
            scores = [read_scores(run_, split) for run_ in done.values()]
            row["measures"] = {name: round(float(np.mean([one[name] for one in scores])), 4) for name in MEASURES}
            row |= costs(list(done.values()), split)
        both = [seed for seed in done if seed in against]
        if both and done is not against:
            row["difference"] = summary(matrix(done, both, split) - matrix(against, both, split)) | {"seeds": both}
        rows.append(row)
    return rows


def baseline_of(ablation: Ablation, variants: Sequence[Variant]) -> str:
    return variants[0].name if ablation.baseline is None else ablation.baseline


def costs(runs: Sequence[Run], split: str) -> dict[str, Any]:
    """What one seed of a row cost on average, stages that it shares with other rows included."""
    sums = ("tokens", "training_seconds", "device_seconds")
    totals = []
    for run_ in runs:
        ledger = json.loads((run_.folder / "ledger.json").read_text(encoding="utf-8"))
        steps = {row["stage"]: row["steps"] for row in ledger["stages"]}
        training = {stage.name: stage.training for stage in run_.variant.recipe.stages}
        batch = {
            name: arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            for name, arguments in training.items()
        }
        total = {"steps": sum(steps.values()), "examples": sum(steps[name] * batch[name] for name in steps)}
        total |= {name: ledger["total"][name] for name in sums}
        total["scoring_seconds"] = read_scores(run_, split)["seconds"]
        total["peak_memory_bytes"] = max(
            row["peak_device_memory_bytes"] or row["peak_memory_bytes"] for row in ledger["stages"]
        )
        totals.append(total)
    return {name: round(float(np.mean([total[name] for total in totals])), 2) for name in totals[0]}


if __name__ == "__main__":
    run(main)
