"""The results of an ablation: means with intervals, and the table, page and picture of them.

Reads only what eval.ablate keeps as ablation.json (its docstring has the fields).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml

from common.steps import write_json
from common.tables import markdown_table
from eval.intervals import LEVEL, bootstrap_interval, format_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def summary(scores: np.ndarray) -> dict[str, Any]:
    """Mean, interval and each seed's mean of scores (seeds, queries)."""
    low, high = bootstrap_interval(scores) or (None, None)
    per_seed = [round(float(value), 6) for value in scores.mean(axis=1)]
    return {"mean": round(float(scores.mean()), 6), "low": low, "high": high, "per_seed": per_seed}


def choose(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """The row with the best mean on the split that is there to choose on."""
    done = [row for row in rows if row["chosen_on_mean"] is not None]
    return max(done, key=lambda row: row["chosen_on_mean"])["name"] if done else None


def notes(result: Mapping[str, Any]) -> list[str]:
    """Caveats for readers of the table, in sentences."""
    rows = [row for row in result["rows"] if row["seeds"]]
    lines = []
    if any(len(row["seeds"]) == 1 for row in rows):
        lines.append("Rows of a single seed: their intervals are about the choice of queries and not about seeds.")
    if 1 < max((len(row["seeds"]) for row in rows), default=0) < 6:
        lines.append(
            "With so few seeds an interval is too narrow where seeds decide: look at the single ones as well."
        )
    compared = sum(row["difference"] is not None for row in rows)
    if compared > 1:
        lines.append(
            f"Each interval is at {LEVEL:.0%} for itself: of {compared} differences that are truly 0, "
            f"{compared * (1 - LEVEL):.1f} would be expected to exclude 0 by chance."
        )
    for name, title in (("steps", "optimizer steps"), ("examples", "training examples")):
        values = {row[name] for row in rows}
        if len(values) > 1:
            lines.append(f"Budgets differ: {min(values):,.0f} to {max(values):,.0f} {title}.")
    if result["split"] != result["chosen_on"]:
        lines.append(
            f"{result['chosen']} is best on split {result['chosen_on']}; it was not chosen on split {result['split']}."
        )
    else:
        lines.append(
            f"Rows are compared on the split that they are chosen on ({result['split']}): the best looks better "
            "than it is. --report_split test tells how it does elsewhere."
        )
    for failure in result["failed"]:
        lines.append(f"Not run: {failure['name']}, seed {failure['seed']}: {failure['reason']}")
    return lines


def format_table(result: Mapping[str, Any]) -> str:
    """The rows as a Markdown table, in their order."""
    level = f"[{result['interval']['level']:.0%}]"
    chosen_on = result["chosen_on"] if result["chosen_on"] != result["split"] else None
    titles = [
        "variant",
        f"{result['metric']} {level}",
        f"against {result['baseline']} {level}",
        "SD of seeds",
        "seeds",
    ]
    titles += ["steps", "tokens", "seconds", "peak memory"]
    titles[1:1] = [f"{result['metric']} on {chosen_on}"] if chosen_on else []
    rows = []
    for row in result["rows"]:
        cells = [f"**{row['name']}**" if row["name"] == result["chosen"] else row["name"]]
        if row["seeds"]:
            difference, deviation = row["difference"], row["standard_deviation"]
            cells += [f"{row['chosen_on_mean']:.4f}"] if chosen_on else []
            cells += [
                f"{row['mean']:.4f} {format_interval(row['low'], row['high'], '.4f')}",
                f"{difference['mean']:+.4f} {format_interval(difference['low'], difference['high'], '+.4f')}"
                if difference
                else "",
                "" if deviation is None else f"{deviation:.4f}",
                str(len(row["seeds"])),
                f"{row['steps']:,.0f}",
                f"{row['tokens']:,.0f}",
                f"{row['training_seconds']:,.0f}",
                f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
            ]
        else:
            cells += ["failed", *[""] * (len(titles) - 2)]
        rows.append(cells)
    return markdown_table(titles, rows)


def format_tasks(result: Mapping[str, Any]) -> str:
    """Means of mteb's tasks, in %, over seeds; after them the difference of the mean over types, seed by seed."""
    rows = [row for row in result["rows"] if row.get("tasks")]
    kinds = list(rows[0]["tasks"])
    baseline = {row["name"]: dict(zip(row["seeds"], row["tasks"]["mean over types"], strict=True)) for row in rows}
    against = baseline.get(result["baseline"], {})
    table = []
    for row in rows:
        of_seed = baseline[row["name"]].items()
        each = [f"{100 * (score - against[seed]):+.2f}" for seed, score in of_seed if seed in against]
        own = row["name"] == result["baseline"]
        table.append([row["name"], *(f"{100 * np.mean(row['tasks'][kind]):.2f}" for kind in kinds)])
        table[-1].append("" if own else ", ".join(each))
    return markdown_table(["variant", *kinds, f"mean over types against {result['baseline']}, by seed"], table)


def format_page(result: Mapping[str, Any]) -> str:
    counts = result["counts"]
    settings = {"base": result["base"], "shared": result["shared"], "seeds": result["seeds"]}
    settings["variants"] = {row["name"]: row["overrides"] for row in result["rows"]}
    return "\n\n".join(
        [
            f"# Ablation: {Path(result['config']).stem}",
            f"Made by `{result['command']}`.",
            f"{counts['queries']:,} queries of split {result['split']}, {counts['documents']:,} documents; bold: best "
            f"on split {result['chosen_on']}. Costs are those of one seed, on average.",
            format_table(result),
            *([format_tasks(result)] if any(row.get("tasks") for row in result["rows"]) else []),
            *(["![Differences with their intervals](ablation.png)"] if is_compared(result) else []),
            "\n".join(f"- {line}" for line in result["notes"]),
            f"Intervals: {result['interval']['method']}",
            "## Settings",
            f"```yaml\n{yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).strip()}\n```",
            "Versions: " + ", ".join(f"{name} {version}" for name, version in result["versions"].items()) + ".",
        ]
    )


def is_compared(result: Mapping[str, Any]) -> bool:
    return any(row["difference"] for row in result["rows"])


def plot_differences(result: Mapping[str, Any]) -> Figure:
    """Every row's difference to the baseline: mean, interval, and a dot for each seed."""
    from eval.report import BLUE, GREY, ORANGE, new_figure

    rows = [row for row in result["rows"] if row["difference"]]
    figure = new_figure((7, 0.4 * len(rows) + 1.5))
    axis = figure.subplots()
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
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def save(result: Mapping[str, Any], output: Path) -> None:
    """The picture, the page that shows it, and last what programs read."""
    output.mkdir(parents=True, exist_ok=True)
    if is_compared(result):
        plot_differences(result).savefig(output / "ablation.png")
    (output / "ablation.md").write_text(format_page(result) + "\n", encoding="utf-8")
    write_json(output / "ablation.json", result)
    print(f"\n{format_table(result)}\n\n{output / 'ablation.md'}")
