"""What eval.run_mteb left, model against model: means by task type and Borda as mteb's leaderboard has them.

A model is told from another by name and revision, so that weights trained anew, or shown demonstrations (-2-shot), are
a row of their own; mteb's own table joins them, and is of a whole benchmark. Other people's results
(mteb.ResultCache's layout) may lie in the same folder.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.cli import InputError
from common.tables import markdown_table
from dataset_builders.card import BENCHMARK
from eval.local_tasks import register_local_tasks

if TYPE_CHECKING:
    from mteb import AbsTask
    from mteb.results import TaskResult

BESIDE_RESULTS = ("model_meta.json",)  # which mteb writes into the same folder
BENCHMARKS = (BENCHMARK, "RTEB(eng, beta)", "MTEB(Multilingual, v2)")


@dataclass(frozen=True)
class Leaderboard:
    """`scores` (models, tasks): main scores, at most 1 (correlations from -1 on); NaN: the task was not run whole, or,
    where `is_nan` is true, it was and mteb's main score is NaN.
    """

    models: list[str]
    tasks: list[AbsTask]
    scores: np.ndarray
    is_nan: np.ndarray
    benchmark: str  # that most of the tasks are of

    @property
    def types(self) -> list[str]:
        return sorted({task.metadata.type for task in self.tasks})

    def type_means(self) -> np.ndarray:
        """(models, types); NaN where one of a type's tasks was not run."""
        kinds = np.array([task.metadata.type for task in self.tasks])
        return np.stack([self.scores[:, kinds == kind].mean(axis=1) for kind in self.types], axis=1)


def read_result(path: Path) -> TaskResult:
    """A file that eval.run_mteb wrote. Raises InputError for what mteb cannot read and tasks that it does not know."""
    from mteb import get_task
    from mteb.results import TaskResult

    register_local_tasks()
    try:
        result = TaskResult.from_disk(path)
        get_task(result.task_name)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"{path}: not a result that mteb can read ({str(error).splitlines()[0]}); delete it and run "
            "eval.run_mteb again"
        ) from None
    return result


@functools.cache
def benchmark_tasks(benchmark: str = BENCHMARK) -> dict[str, AbsTask]:
    """The tasks of a benchmark by name, limited to the splits and languages that it asks for."""
    import mteb

    return {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}


def read_leaderboard(output: Path) -> Leaderboard | None:
    """All results below OUTPUT_DIR of eval.run_mteb; None where there are none."""
    found: dict[tuple[str, str], list[TaskResult]] = {}
    for path in sorted(output.glob("results/*/*/*.json")):
        if path.name not in BESIDE_RESULTS:
            found.setdefault((path.parts[-3].replace("__", "/"), path.parts[-2]), []).append(read_result(path))
    return make_leaderboard(dict(zip(_labels(found), found.values(), strict=True))) if found else None


def make_leaderboard(results: Mapping[str, Sequence[TaskResult]], tasks: Iterable[AbsTask] = ()) -> Leaderboard:
    """Results by model, on `tasks` and all those that they are of.

    That one of BENCHMARKS which holds most of them decides which splits and languages of its tasks count; of other
    tasks all count that mteb evaluates.
    """
    by_name = {task.metadata.name: task for task in tasks}
    found = list(itertools.chain(*results.values()))
    names = by_name.keys() | {result.task_name for result in found}
    benchmark = max(BENCHMARKS, key=lambda name: len(names & benchmark_tasks(name).keys()))
    for result in found:
        if result.task_name not in by_name:
            by_name[result.task_name] = benchmark_tasks(benchmark).get(result.task_name) or result.task
    ordered = sorted(by_name.values(), key=lambda task: (task.metadata.type, task.metadata.name))
    columns = {task.metadata.name: column for column, task in enumerate(ordered)}
    scores = np.full((len(results), len(columns)), np.nan)
    is_nan = np.zeros_like(scores, dtype=bool)
    for row, of_model in enumerate(results.values()):
        for result in of_model:
            task, column = by_name[result.task_name], columns[result.task_name]
            scores[row, column] = result.validate_and_filter_scores(task).get_score()
            subsets = itertools.chain(*(result.scores.get(split, []) for split in task.eval_splits))
            asked = [subset["main_score"] for subset in subsets if subset["hf_subset"] in task.hf_subsets]
            is_nan[row, column] = np.isnan(asked).any()
    return Leaderboard(list(results), ordered, scores, is_nan, benchmark)


def _labels(models: Iterable[tuple[str, str]]) -> list[str]:
    """Names, with the beginning of the revision where two models have the same.

    >>> _labels([("org/a", "0123456789abcdef"), ("org/a", "0123456789abcdef-2-shot"), ("org/b", "main")])
    ['org/a@01234567', 'org/a@01234567-2-shot', 'org/b']
    """
    models = list(models)
    times = Counter(name for name, _ in models)
    short = [re.sub(r"(?<=^[0-9a-f]{8})[0-9a-f]+", "", revision) for _, revision in models]
    return [
        f"{name}@{revision}" if times[name] > 1 else name for (name, _), revision in zip(models, short, strict=True)
    ]


def borda_ranks(scores: np.ndarray) -> list[int]:
    """Ranks of models by Borda count, from 1: of n models, one gets n - rank points on each task (MMTEB, 2025).

    Equal scores share their mean rank, equal counts the better one; a task that was not run (NaN) gives no points.

    >>> borda_ranks(np.array([[0.9, 0.2, 0.5], [0.8, 0.3, 0.5], [0.7, 0.1, np.nan]]))
    [1, 1, 3]
    """
    from scipy.stats import rankdata

    points = np.nansum(len(scores) - rankdata(-scores, axis=0, nan_policy="omit"), axis=1)
    return [int(rank) for rank in rankdata(-points, method="min")]


def format_means(board: Leaderboard) -> str:
    """A row for each model, the best one first, in %. A mean is empty where one of its tasks was not run."""
    ranks, kinds = borda_ranks(board.scores), board.type_means()
    several = len(board.models) > 1
    rank_title = ["Borda rank"] if several else []
    titles = ["model", *rank_title, "tasks", "mean over tasks", "mean over types", *board.types]
    rows = []
    for place in sorted(range(len(ranks)), key=lambda place: (ranks[place], board.models[place])):
        run, failed = np.count_nonzero(~np.isnan(board.scores[place])), np.count_nonzero(board.is_nan[place])
        tasks = f"{run + failed}/{len(board.tasks)}" + (f", {failed} NaN" if failed else "")
        means = [board.scores[place].mean(), kinds[place].mean(), *kinds[place]]
        rank = [str(ranks[place])] if several else []
        rows.append([board.models[place], *rank, tasks, *map(_percent, means)])
    in_benchmark = benchmark_tasks(board.benchmark)
    counted = sum(task.metadata.name in in_benchmark for task in board.tasks)
    below = f"{counted} of the {len(in_benchmark)} tasks of {board.benchmark}; scores in %."
    if several:
        below += f" Borda: on each task a model gets {len(ranks)} minus its rank among the models of this table."
    if board.is_nan.any():
        below += " NaN: the task was run, mteb's main score is not a number; the model's vectors may be broken."
    return f"{markdown_table(titles, rows)}\n\n{below}"


def format_tasks(board: Leaderboard) -> str:
    """A row for each task, a column for each model, in %; the best is bold where there are several."""
    rows = []
    for task, scores, is_nan in zip(board.tasks, board.scores.T, board.is_nan.T, strict=True):
        best = np.nanmax(scores, initial=-np.inf) if len(scores) > 1 else np.nan
        cells = [f"**{_percent(score)}**" if score == best else _percent(score) for score in scores]
        cells = ["NaN" if failed else cell for failed, cell in zip(is_nan, cells, strict=True)]
        rows.append([task.metadata.name, task.metadata.type, task.metadata.main_score, *cells])
    return markdown_table(["task", "type", "metric", *board.models], rows, left=3)


def _percent(score: float) -> str:
    return "" if np.isnan(score) else f"{100 * score:.2f}"
