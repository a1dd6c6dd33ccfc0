"""The results of an ablation: means with intervals, and the table, page and picture of them.

Reads only what eval.ablate keeps as ablation.json (its docstring has the fields).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from common.steps import write_json
from common.tables import markdown_table
from eval.figures import plot_differences
from eval.intervals import LEVEL, format_mean, mean_with_interval


def summary(scores: np.ndarray) -> dict[str, Any]:
    """Mean, interval and each seed's mean of scores (seeds, queries)."""
    return mean_with_interval(scores) | {"per_seed": [round(float(value), 6) for value in scores.mean(axis=1)]}


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
    metric, level = result["metric"], f"[{result['interval']['level']:.0%}]"
    columns: dict[str, Callable[[Mapping[str, Any]], str]] = {}
    if result["chosen_on"] != result["split"]:
        columns[f"{metric} on {result['chosen_on']}"] = lambda row: f"{row['chosen_on_mean']:.4f}"
    columns |= {
        f"{metric} {level}": lambda row: format_mean(row, ".4f"),
        f"against {result['baseline']} {level}": lambda row: format_mean(row["difference"], "+.4f"),
        "SD of seeds": lambda row: f"{row['standard_deviation']:.4f}" if len(row["seeds"]) > 1 else "",
        "seeds": lambda row: str(len(row["seeds"])),
        "steps": lambda row: f"{row['steps']:,.0f}",
        "tokens": lambda row: f"{row['tokens']:,.0f}",
        "seconds": lambda row: f"{row['training_seconds']:,.0f}",
        "peak memory": lambda row: f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
    }
    rows = []
    for row in result["rows"]:
        name = f"**{row['name']}**" if row["name"] == result["chosen"] else row["name"]
        cells = [cell(row) for cell in columns.values()] if row["seeds"] else ["failed"]
        rows.append([name, *cells, *[""] * (len(columns) - len(cells))])
    return markdown_table(["variant", *columns], rows)


def format_tasks(result: Mapping[str, Any]) -> str:
    """Means of mteb's tasks, in %, over seeds; after them the difference of the mean over types, seed by seed."""
    rows = {row["name"]: row for row in result["rows"] if row.get("tasks")}
    overall = {
        name: dict(zip(row["seeds"], row["tasks"]["mean over types"], strict=True)) for name, row in rows.items()
    }
    baseline = overall.get(result["baseline"], {})
    kinds = list(next(iter(rows.values()))["tasks"])
    table = []
    for name, row in rows.items():
        changes = [score - baseline[seed] for seed, score in overall[name].items() if seed in baseline]
        changes = [] if name == result["baseline"] else [f"{100 * change:+.2f}" for change in changes]
        table.append([name, *(f"{100 * np.mean(row['tasks'][kind]):.2f}" for kind in kinds), ", ".join(changes)])
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


def save(result: Mapping[str, Any], output: Path) -> None:
    """The picture, the page that shows it, and last what programs read."""
    output.mkdir(parents=True, exist_ok=True)
    if is_compared(result):
        plot_differences(result).savefig(output / "ablation.png")
    (output / "ablation.md").write_text(format_page(result) + "\n", encoding="utf-8")
    write_json(output / "ablation.json", result)
    print(f"\n{format_table(result)}\n\n{output / 'ablation.md'}")
