"""One page about results: tables and pictures; of a run also settings, counts, costs and what was not run.

    python -m eval.report runs/demo/results --output_dir runs/demo/report
    python -m eval.report results --output_dir report

Reads what stands in the folder: the metrics.json that `eval.retrieval` wrote, with the run and the data it names, and
the results/ of `eval.run_mteb`, of one model or several. Writes report.md, systems.png, training.png and mteb.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import ArgumentParser, InputError, run
from common.steps import BUILD_FOLDERS
from common.tables import in_words, markdown_table
from eval.figures import KEY, plot_leaderboard, plot_systems, plot_training
from eval.leaderboard import format_means, format_tasks, read_leaderboard
from eval.metrics import check_final, format_table, read_metrics
from eval.run_files import Log, read_ledger, read_logs, read_manifests
from eval.systems import stage_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MTEB_NOT_RUN = (
    "MTEB and other collections: the table is about held-out queries of the run's own data. "
    "`python -m eval.run_mteb` runs the others."
)
# columns of the table of costs; those without an entry are left out
COSTS = ("step", "made", "steps", "tokens", "saved by share_prefix", "seconds", "device", "peak memory")
COSTS += ("device hours",)
OTHER_SEEDS = "Other seeds: this is one training run. The intervals cover the choice of queries, not that of the seed."


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    results, board = args.results, read_leaderboard(args.results)
    if board is None and not (results / "metrics.json").exists():
        raise InputError(
            f"{results / 'metrics.json'}: no such file, nor results/ beside it; "
            "run eval.retrieval or eval.run_mteb, or name its --output_dir"
        )
    metrics = read_metrics(results) if (results / "metrics.json").exists() else None
    run_folder = results / metrics["run"] if metrics and metrics["run"] else None
    figures: dict[str, Figure] = {}
    parts = [f"# Report on {(run_folder or results).resolve().name}"]
    if metrics:
        figures["systems.png"] = plot_systems(metrics)
        parts += [f"Made from `{metrics['command']}`.", "## Results", format_table(metrics)]
        parts += [f"![Systems by {metrics['compared']}](systems.png)"]
    if board:
        figures["mteb.png"] = plot_leaderboard(board)
        parts += ["## MTEB", f"Made from mteb's results in `{results / 'results'}`.", format_means(board)]
        parts += ["![MTEB by task type](mteb.png)", format_tasks(board)]
    if run_folder:
        check_final(results, metrics, run_folder / "model")
    if stages := stage_names(run_folder) if run_folder else []:  # none of a model without a record of its training
        logs, manifests = read_logs(run_folder, stages), read_manifests(results / metrics["data"])
        if logs:
            figures["training.png"] = plot_training(logs)
            parts += ["## Training", "![Training curves](training.png)"]
        parts += ["## What each step made and took", format_costs(read_ledger(run_folder), metrics, manifests)]
        missing = [*not_run(metrics, manifests, logs, stages), *([] if board else [MTEB_NOT_RUN]), OTHER_SEEDS]
        parts += ["## Not run", "\n".join(f"- {line}" for line in missing), "## Settings"]
        parts += [f"```yaml\n{(run_folder / 'recipe.yaml').read_text(encoding='utf-8').strip()}\n```"]
    if metrics:
        parts += ["Versions: " + ", ".join(f"{name} {version}" for name, version in metrics["versions"].items()) + "."]
    save("\n\n".join(parts), figures, metrics["key"] if metrics else "", args.output_dir)


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("results", type=Path, help="--output_dir of eval.retrieval or of eval.run_mteb")
    parser.add_argument("--output_dir", required=True, type=Path, help="where report.md and the pictures go")
    return parser.parse_args(argv)


def format_costs(
    ledger: Mapping[str, Any],
    metrics: Mapping[str, Any] | None = None,
    manifests: Mapping[str, Mapping[str, Any]] | None = None,
) -> str:
    """What the data, each stage of training (with its evaluations) and the evaluation in `metrics` cost, as Markdown.

    Steps of the data are those of `manifests`, with what they made, or else those in the ledger. A device hour is one
    hour of one device. Tokens are those of the batches, each counted once; what share_prefix saves is of all forward
    passes of the main process (GradCache's second ones, evaluations, padding).
    """
    data = [{"step": name, **manifest} for name, manifest in manifests.items()] if manifests else ledger["data"]
    rows, seconds = [], []

    def add(step: str, took: float, memory: int | None, **cells: str) -> None:
        seconds.append(took)
        size = f"{memory / 2**30:.2f} GiB" if memory else ""
        rows.append({"step": step, "seconds": f"{took:,.0f}", "peak memory": size, **cells})

    for row in data:
        made = in_words({name: row[name] for name in row.get("counts", ())})
        add(f"data: {row['step']}", row["seconds"], row.get("peak_memory_bytes"), made=made)
    for row in ledger["stages"]:
        devices = round(row["device_seconds"] / max(row["training_seconds"], 1e-9))
        cells = {"steps": f"{row['steps']:,}", "tokens": f"{row['tokens']:,}", "saved by share_prefix": _saved(row)}
        cells["device"] = f"{devices} x {row['device']}" if devices > 1 else row["device"]
        cells["device hours"] = f"{row['device_seconds'] / 3600:.2f}"
        memory = row["peak_device_memory_bytes"] or row["peak_memory_bytes"]
        add(f"training: {row['stage']}", row["training_seconds"], memory, **cells)
    if metrics:
        made = in_words(metrics["counts"]) if manifests else ""
        took = sum(row["seconds"] for row in metrics["systems"])
        add("evaluation", took, metrics["peak_memory_bytes"], made=made)
    tokens, device_seconds = (sum(row[name] for row in ledger["stages"]) for name in ("tokens", "device_seconds"))
    rows.append({"step": "**all**", "tokens": f"{tokens:,}", "seconds": f"**{sum(seconds):,.0f}**"})
    rows[-1]["device hours"] = f"**{device_seconds / 3600:.2f}**"
    titles = [title for title in COSTS if any(row.get(title) for row in rows)]
    cells = [[row.get(title, "") for title in titles] for row in rows]
    return markdown_table(titles, cells, left=1 + ("made" in titles))


def _saved(row: Mapping[str, Any]) -> str:
    """What share_prefix did not compute (modeling.shared_prefix.TokenCounts); empty where it was not asked for."""
    counts = row.get("share_prefix")
    if not counts:
        return ""
    padded, saved = counts["tokens_padded"], counts["tokens_padded"] - counts["tokens_computed"]
    return f"{saved:,} of {padded:,} ({saved / max(padded, 1):.0%})"


def not_run(
    metrics: Mapping[str, Any], manifests: Mapping[str, Any], logs: Mapping[str, Log], stages: Sequence[str]
) -> list[str]:
    """What was not run, in sentences."""
    lines = [f"Stage {stage}: it is in the recipe, the run has no model of it." for stage in metrics["not_evaluated"]]
    lines += [f"Training curve of stage {stage}: there is no log of it." for stage in stages if stage not in logs]
    for row in metrics["systems"]:
        unknown = [name for name in metrics["measures"] if row[name] is None]
        if unknown:
            lines.append(f"{', '.join(unknown)} of {row['name']}: the candidates were cut (top_k).")
    return [*lines, *(f"Data step {name}: it was not made." for name in BUILD_FOLDERS if name not in manifests)]


def save(page: str, figures: Mapping[str, Figure], key: str, output: Path) -> None:
    """The pictures, then the page that shows them. Each picture carries the key of the results it was drawn from."""
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, metadata={KEY: key})
    (output / "report.md").write_text(page + "\n", encoding="utf-8")
    print(output / "report.md")


if __name__ == "__main__":
    run(main)
