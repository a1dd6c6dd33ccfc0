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
    # mining.margin, mining.num_negatives, mining.strategy, ...: train on rows mined again from the same grades;
    # mining.shuffle_labels: 0 gives each row the labels of another, a control

Every variant and seed is trained and scored in a process of its own, in OUTPUT_DIR/runs/VARIANT/seed-N: its recipe,
stages, model/, ledger.json, run.log and scores-SPLIT.json. What is finished is skipped, so a killed ablation resumes;
a run that fails is reported, the others go on, and the exit code is 2.

OUTPUT_DIR/ablation.md, ablation.png and index.html (with the queries won and lost most) are for people;
ablation.json holds, for programs:

    config, command, base, shared, metric, scoring_dtype, split, chosen_on, chosen, baseline, seeds, counts,
    interval {level, resamples, method}, notes [sentence], failed [{name, seed, reason}], versions, and
    rows [{name, overrides, seeds: those that finished, mean, low, high, per_seed, standard_deviation (over seeds, null
    for one), difference {mean, low, high, per_seed, seeds} to the baseline or null, chosen_on_mean, measures {name:
    mean}, tasks {mteb's task type, "mean over types" or "mean over tasks": one score for each seed}, and the costs of
    a seed on average: steps, examples, tokens, training_seconds, device_seconds, scoring_seconds, peak_memory_bytes}]

`mean` and all that derives from it is null for a row of which no seed finished.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.cli import InputError, at, run
from common.recipes import list_keys
from common.steps import stack_versions
from eval.ablation_recipe import (
    Ablation,
    MinedAnew,
    Variant,
    check_rows,
    read_ablation,
    read_variants,
    write_mined_rows,
)
from eval.ablation_runs import TASKS, Run, costs, load_splits, make_runs, train_and_score
from eval.ablation_table import choose, is_compared, notes, save, summary
from eval.intervals import LEVEL, METHOD, RESAMPLES
from eval.metrics import COMPARED, MEASURES
from eval.pages import write_ablation_page


def main(argv: Sequence[str]) -> None:
    if "--list_keys" in argv:
        mining = list_keys(MinedAnew, "`mining.KEY` of a variant", "mining.")
        print("\n".join([*list_keys(Ablation, "An ablation"), *mining]))
        return
    config, ablation = read_ablation(argv, __doc__)
    output, reported = Path(ablation.output_dir), ablation.splits[-1]
    with at(config):
        variants = read_variants(ablation)
    asked = load_splits(ablation)
    for variant in variants:
        for folder, source in variant.mined.items():
            write_mined_rows(folder, source, variant.mining)
    with at(config):
        check_rows(variants)
    runs = make_runs(variants, ablation)
    failed = train_and_score(runs, ablation)
    finished = [run_ for run_ in runs if run_.is_scored]
    scored = {of.name: {run_.seed: run_ for run_ in finished if run_.variant is of} for of in variants}
    rows = [make_row(variant, scored, ablation) for variant in variants]
    result = {
        "config": config,
        "command": "python -m eval.ablate " + shlex.join(argv),
        "base": ablation.base,
        "shared": ablation.shared,
        "metric": COMPARED,
        "scoring_dtype": ablation.scoring_dtype,
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
        write_ablation_page(
            result, {name: per_query(done, reported) for name, done in scored.items()}, asked[reported], output
        )
    if failed:
        raise InputError(
            f"{len(failed)} of {len(runs)} runs failed, first {failed[0]['name']}, seed {failed[0]['seed']}: "
            f"{failed[0]['reason']}; the same command tries them again"
        )


def per_query(done: Mapping[int, Run], split: str) -> dict[int, list[float]]:
    return {seed: run_.scores(split)["per_query"] for seed, run_ in done.items()}


def make_row(variant: Variant, scored: Mapping[str, Mapping[int, Run]], ablation: Ablation) -> dict[str, Any]:
    """A variant's row, from what its runs left. scored: of every variant by seed, the runs that finished."""
    split, done, against = ablation.splits[-1], scored[variant.name], scored[ablation.compared_with]
    row: dict[str, Any] = {"name": variant.name, "overrides": variant.overrides, "seeds": list(done)}
    row |= dict.fromkeys(("mean", "low", "high", "standard_deviation", "difference", "chosen_on_mean"))
    row |= {"per_seed": [], "measures": {}}
    if not done:
        return row
    scores, others = per_query(done, split), per_query(against, split)
    row |= summary(np.array([*scores.values()]))
    if len(done) > 1:
        row["standard_deviation"] = round(float(np.std(row["per_seed"], ddof=1)), 6)
    row["chosen_on_mean"] = round(float(np.mean([*per_query(done, ablation.split).values()])), 6)
    row["measures"] = averages([run_.scores(split) for run_ in done.values()], MEASURES, 4)
    of_runs = [costs(run_, split) for run_ in done.values()]
    row |= averages(of_runs, of_runs[0], 2)
    if ablation.tasks:
        means = [run_.scores(TASKS)["means"] for run_ in done.values()]
        row["tasks"] = {name: [round(one[name], 6) for one in means] for name in means[0]}
    both = [seed for seed in done if seed in against]
    if both and done is not against:
        differences = np.array([np.subtract(scores[seed], others[seed]) for seed in both])
        row["difference"] = summary(differences) | {"seeds": both}
    return row


def averages(entries: Sequence[Mapping[str, float]], names: Iterable[str], digits: int) -> dict[str, float]:
    return {name: round(float(np.mean([entry[name] for entry in entries])), digits) for name in names}


if __name__ == "__main__":
    run(main)
