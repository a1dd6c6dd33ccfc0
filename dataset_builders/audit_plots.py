"""The audit's figures as plots, which the data set's card shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: readers tell its colours apart, in grey print as well.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#E69F00", "#009E73", "#999999"


def draw(
    figures: Mapping[str, Any], margin: float | None, reliability: Sequence[Mapping[str, Any]] | None
) -> dict[str, Figure]:
    """File name -> plot; those that have nothing to show are left out. `margin` is the recipe's, if it is a ratio."""
    plots = {"labels.png": plot_labels(figures["labels"])}
    if figures["false_negatives"]["by_margin"]:
        plots["false_negatives.png"] = plot_false_negatives(figures["false_negatives"]["by_margin"], margin)
    if reliability:
        plots["reliability.png"] = plot_reliability(reliability)
    return plots


def plot_labels(labels: Mapping[str, Any]) -> Figure:
    figure, axis = _figure(title="Soft labels", xlabel="soft label", ylabel="share of each group (%)", xlim=(0, 1))
    edges = np.linspace(0, 1, len(labels["positives"]["bins"]) + 1)
    for name, title, colour, line in (
        ("positives", "labelled positives", BLUE, "-"),
        ("negatives", "negatives chosen", ORANGE, "-"),
        ("candidates", "all other candidates", GREY, "--"),
    ):
        count = labels[name]["count"]
        shares = 100 * np.array(labels[name]["bins"]) / max(count, 1)
        axis.stairs(shares, edges, color=colour, linestyle=line, linewidth=2, label=f"{title} ({count:,})")
    axis.legend()
    return figure


def plot_false_negatives(by_margin: Sequence[Mapping[str, Any]], margin: float | None) -> Figure:
    figure, axis = _figure(
        title="False negatives, by leaving out known positives",
        xlabel="margin (share of the positive's label)",
        ylabel="share (%), 95 % interval",
    )
    for name, title, colour, marker, shift in (
        ("admitted", "hidden positives that pass the margin", BLUE, "o", -0.06),
        ("among_negatives", "chosen negatives that are hidden positives", ORANGE, "s", 0.06),
    ):
        known = [(place, row[name]) for place, row in enumerate(by_margin) if row[name]["share"] is not None]
        places = [place + shift for place, _ in known]
        shares, low, high = (100 * np.array([value[key] for _, value in known]) for key in ("share", "low", "high"))
        style = {"color": colour, "marker": marker, "linestyle": "none", "capsize": 4}
        axis.errorbar(places, shares, yerr=[shares - low, high - shares], label=title, **style)
    ticks = [f"{row['margin']:g}" + (" (recipe)" if row["margin"] == margin else "") for row in by_margin]
    axis.set_xticks(range(len(ticks)), ticks)
    axis.set(ylim=(0, None))
    axis.legend()
    return figure


def plot_reliability(reliability: Sequence[Mapping[str, Any]]) -> Figure:
    figure, axis = _figure(
        title="Calibration of the teacher",
        xlabel="mean soft label of the bin",
        ylabel="share of labelled positives, classes balanced",
        xlim=(0, 1),
        ylim=(0, 1),
    )
    known = [row for row in reliability if row["positives"] + row["others"]]
    labels, observed = ([row[key] for row in known] for key in ("label", "observed"))
    axis.plot([0, 1], [0, 1], color=GREY, linestyle="--", label="perfectly calibrated")
    axis.plot(labels, observed, color=GREEN, marker="o", label="graded pairs, in bins of the label")
    axis.legend()
    return figure


def _figure(**settings: Any) -> tuple[Figure, Axes]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set(**settings)
    return figure, axis
