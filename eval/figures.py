"""The pictures of eval.report and eval.ablate, drawn from what they print as tables."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from eval.intervals import LEVEL
from eval.leaderboard import Leaderboard
from modeling.recipe import VALIDATION_NDCG

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: safe for colour-blind readers, and in grey print.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
KINDS = (("retriever", "retrievers", BLUE), ("model", "models", ORANGE), ("fusion", "both, fused", GREEN))
KEY = "Results"  # the text chunk of a PNG that holds metrics.json's `key`


def new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def rows_figure(height: float) -> tuple[Figure, Axes]:
    """A figure of one row below another, `height` inches high."""
    figure = new_figure((7, height))
    axis = figure.subplots()
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def plot_systems(metrics: Mapping[str, Any]) -> Figure:
    """A bar for each system, in the order of the table; the line is the baseline's height, and whiskers are the
    interval of a system's difference to it."""
    measure, baseline, counts = metrics["compared"], metrics["baseline"], metrics["counts"]
    rows = [row for row in metrics["systems"] if row[measure] is not None]
    figure, axis = rows_figure(0.4 * len(rows) + 1.4)
    for kind, label, colour in KINDS:
        chosen = [row for row in rows if row["kind"] == kind]
        if not chosen:
            continue
        differences = [row["difference"] or {"mean": 0, "low": 0, "high": 0} for row in chosen]
        whiskers = [[one["mean"] - one["low"], one["high"] - one["mean"]] for one in differences]
        values = {"y": [row["name"] for row in chosen], "width": [row[measure] for row in chosen]}
        style = {"color": colour, "height": 0.7, "label": label, "error_kw": {"capsize": 3, "linewidth": 1}}
        bars = axis.barh(**values, xerr=list(zip(*whiskers, strict=True)), **style)
        # white behind the figures: the line may cross them
        axis.bar_label(bars, fmt="%.3f", padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    for row in rows:
        if row["name"] == baseline:
            axis.axvline(row[measure], color=GREY, linestyle="--", linewidth=1, zorder=0, label=baseline)
    axis.invert_yaxis()
    axis.set_xlim(0, max(0.05, 1.12 * max((row[measure] for row in rows), default=0)))
    about = f"{counts['queries']:,} {metrics['split']} queries, {counts['documents']:,} documents"
    axis.set_xlabel(f"{measure} ({about})\nwhiskers: 95 % interval of the difference to {baseline}")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def plot_training(logs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Figure:
    """Loss above, nDCG@10 on validation queries below; a column for each stage, by the trainer's log of it.

    Stages have losses of their own, on scales of their own; nDCG@10 is on one scale.
    """
    figure = new_figure((3.6 * len(logs) + 0.6, 4.8))
    axes = figure.subplots(2, len(logs), squeeze=False, sharex="col")
    for column, (stage, log) in enumerate(logs.items()):
        axes[0][column].set_title(stage)
        axes[1][column].set_xlim(0, 1.03 * max((entry["step"] for entry in log), default=1))
        axes[1][column].set_xlabel("step")
        for axis, key, colour in ((axes[0][column], "loss", BLUE), (axes[1][column], VALIDATION_NDCG, ORANGE)):
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            if points:
                # a few points are measurements to be seen as such, many are a line
                marker = "o" if len(points) < 20 else None
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, markersize=4, clip_on=False)
            else:
                axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color=GREY)
            axis.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1][1:]:
        axis.sharey(axes[1][0])
    axes[1][0].autoscale(axis="y")
    axes[0][0].set_ylabel("training loss")
    axes[1][0].set_ylabel("validation nDCG@10")
    return figure


def plot_leaderboard(board: Leaderboard) -> Figure:
    """Means by task type, a mark for each model; none where a task of that type was not run."""
    types = board.types
    figure, axis = rows_figure(0.5 * len(types) + 1.4 + 0.2 * len(board.models))
    marks = zip(itertools.cycle((BLUE, ORANGE, GREEN, PINK)), itertools.cycle("os^"), strict=False)  # 12 in all
    for model, means, (colour, shape) in zip(board.models, 100 * board.type_means(), marks, strict=False):
        axis.plot(means, range(len(types)), shape, color=colour, markersize=7, alpha=0.8, label=model)
    axis.set_yticks(range(len(types)), types)
    axis.set_ylim(len(types) - 0.5, -0.5)
    axis.set_xlabel("mean main score in %")
    axis.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def plot_differences(result: Mapping[str, Any]) -> Figure:
    """Every row's difference to the baseline of an ablation: mean, interval, and a dot for each seed."""
    rows = [row for row in result["rows"] if row["difference"]]
    figure, axis = rows_figure(0.4 * len(rows) + 1.5)
    axis.axvline(0, color=GREY, linestyle="--", linewidth=1, label=result["baseline"])
    for place, row in enumerate(rows):
        difference = row["difference"]
        seeds = difference["per_seed"]
        if difference["low"] is not None:
            axis.plot([difference["low"], difference["high"]], [place, place], color=BLUE, linewidth=2)
        label = f"mean and {LEVEL:.0%} interval" if place == 0 else None
        axis.plot(difference["mean"], place, "|", color=BLUE, markersize=14, markeredgewidth=2, label=label)
        label = "one seed" if place == 0 else None  # below the line, which would hide them
        axis.plot(seeds, [place + 0.25] * len(seeds), "o", color=ORANGE, markersize=4, label=label)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(f"difference in {result['metric']} ({result['counts']['queries']:,} {result['split']} queries)")
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure
