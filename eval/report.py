"""One page about results: tables and pictures; of a run also settings, counts, costs and what was not run.

    python -m eval.report runs/demo/results --output_dir runs/demo/report
    python -m eval.report results --output_dir report

Reads what stands in the folder: the metrics.json that `eval.retrieval` wrote, with the run and the data it names, and
the results/ of `eval.run_mteb`, of one model or several. Writes report.md, systems.png, training.png and mteb.png.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import ArgumentParser, InputError, run
from common.steps import BUILD_FOLDERS, GENERATED, MANIFEST, read_manifest
from common.tables import in_words, markdown_table
from eval.leaderboard import Leaderboard, format_means, format_tasks, read_leaderboard
from eval.metrics import format_table, read_metrics
from modeling.recipe import read_stages

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's palette: safe for colour-blind readers, and in grey print.
BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#999999"
KINDS = (("retriever", "retrievers", BLUE), ("model", "models", ORANGE), ("fusion", "both, fused", GREEN))
KEY = "Results"  # the text chunk of a PNG that holds metrics.json's `key`
VALIDATION_KEY = "eval_validation_cosine_ndcg@10"
MTEB_NOT_RUN = (
    "MTEB and other collections: the table is about held-out queries of the run's own data. "
    "`python -m eval.run_mteb` runs the others."
)
COSTS = (
    "step",
    "made",
    "steps",
    "tokens",
    "saved by share_prefix",
    "seconds",
    "device",
    "peak memory",
    "device hours",
)
OTHER_SEEDS = "Other seeds: this is one training run. The intervals cover the choice of queries, not that of the seed."

Log = list[dict[str, Any]]  # the trainer's: step, and loss or evaluation figures


def main(argv: Sequence[str]) -> None:
    args = _parse(argv)
    results = Path(args.results)
    board = read_leaderboard(results)
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
        parts += ["## MTEB", format_means(board), "![MTEB by task type](mteb.png)", format_tasks(board)]
    if run_folder:
        stages = [stage["name"] for stage in read_stages(run_folder)["stages"]]
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
    save("\n\n".join(parts), figures, metrics["key"] if metrics else "", Path(args.output_dir))


def _parse(argv: Sequence[str]):
    parser = ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("results", help="--output_dir of eval.retrieval or of eval.run_mteb")
    parser.add_argument("--output_dir", required=True, help="where report.md and the pictures go")
    return parser.parse_args(argv)


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; run the step that writes it") from None
    except ValueError:
        raise InputError(f"{path}: not readable as JSON; delete it and make it again") from None


def read_ledger(run_folder: Path) -> dict[str, Any]:
    """What train_st.py says the run cost."""
    path = run_folder / "ledger.json"
    ledger = read_json(path)
    rows = ledger.get("stages") if isinstance(ledger, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "device_seconds" in row for row in rows):
        raise InputError(f"{path}: not a ledger of train_st.py; run the training command again, it keeps what is done")
    return ledger


def read_logs(run_folder: Path, stages: Sequence[str]) -> dict[str, Log]:
    """Stage -> the trainer's log, for the stages that have one."""
    paths = {stage: run_folder / "logs" / f"{stage}.json" for stage in stages}
    return {stage: read_json(path) for stage, path in paths.items() if path.is_file()}


def read_manifests(data: Path) -> dict[str, dict[str, Any]]:
    """Step -> manifest, for the steps of the data folder that were made."""
    names = (GENERATED, *BUILD_FOLDERS)
    return {name: read_manifest(data / name) for name in names if (data / name / MANIFEST).is_file()}


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
    data = ledger["data"]
    if manifests:
        data = [{"step": name, "peak_memory_bytes": None, **manifest} for name, manifest in manifests.items()]
    steps = [
        (f"data: {row['step']}", {name: row[name] for name in row.get("counts", ())}, row["seconds"], row)
        for row in data
    ]
    rows = [_cost(*step) for step in steps]
    for row in ledger["stages"]:
        devices = round(row["device_seconds"] / max(row["training_seconds"], 1e-9))
        memory = {"peak_memory_bytes": row["peak_device_memory_bytes"] or row["peak_memory_bytes"]}
        rows.append(
            _cost(f"training: {row['stage']}", {}, row["training_seconds"], memory)
            | {"steps": f"{row['steps']:,}", "tokens": f"{row['tokens']:,}", "saved by share_prefix": _saved(row)}
            | {"device": f"{f'{devices} x ' if devices > 1 else ''}{row['device']}"}
            | {"device hours": f"{row['device_seconds'] / 3600:.2f}"}
        )
    seconds = sum(step[2] for step in steps) + sum(row["training_seconds"] for row in ledger["stages"])
    if metrics:
        took = sum(row["seconds"] for row in metrics["systems"])
        rows.append(_cost("evaluation", metrics["counts"] if manifests else {}, took, metrics))
        seconds += took
    tokens, device_seconds = (sum(row[name] for row in ledger["stages"]) for name in ("tokens", "device_seconds"))
    rows.append({"step": "**all**", "tokens": f"{tokens:,}", "seconds": f"**{seconds:,.0f}**"})
    rows[-1]["device hours"] = f"**{device_seconds / 3600:.2f}**"
    titles = [title for title in COSTS if any(row.get(title) for row in rows)]
    cells = [[row.get(title, "") for title in titles] for row in rows]
    return markdown_table(titles, cells, left=1 + ("made" in titles))


def _cost(step: str, counts: Mapping[str, Any], seconds: float, memory: Mapping[str, Any]) -> dict[str, str]:
    size = memory["peak_memory_bytes"]
    shown = {"step": step, "made": in_words(counts), "seconds": f"{seconds:,.0f}"}
    return shown | {"peak memory": f"{size / 2**30:.2f} GiB" if size else ""}


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
            lines.append(f"{', '.join(unknown)} of {row['name']}: the candidates were cut (fusion.top_k).")
    return [*lines, *(f"Data step {name}: it was not made." for name in BUILD_FOLDERS if name not in manifests)]


def plot_systems(metrics: Mapping[str, Any]) -> Figure:
    """A bar for each system, in the order of the table; the line is the baseline's height, and whiskers are the
    interval of a system's difference to it."""
    measure, baseline = metrics["compared"], metrics["baseline"]
    rows = [row for row in metrics["systems"] if row[measure] is not None]
    figure = new_figure((7, 0.4 * len(rows) + 1.4))
    axis = figure.subplots()
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
    counts = metrics["counts"]
    about = f"{counts['queries']:,} {metrics['split']} queries, {counts['documents']:,} documents"
    axis.set_xlabel(f"{measure} ({about})\nwhiskers: 95 % interval of the difference to {baseline}")
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return figure


def plot_training(logs: Mapping[str, Log]) -> Figure:
    """Loss above, nDCG@10 on validation queries below; a column for each stage.

    Stages have losses of their own, on scales of their own; nDCG@10 is on one scale.
    """
    figure = new_figure((3.6 * len(logs) + 0.6, 4.8))
    axes = figure.subplots(2, len(logs), squeeze=False, sharex="col")
    for column, (stage, log) in enumerate(logs.items()):
        axes[0][column].set_title(stage)
        axes[1][column].set_xlim(0, 1.03 * max((entry["step"] for entry in log), default=1))
        axes[1][column].set_xlabel("step")
        for axis, key, colour in ((axes[0][column], "loss", BLUE), (axes[1][column], VALIDATION_KEY, ORANGE)):
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
    means, types = 100 * board.type_means(), board.types
    figure = new_figure((7, 0.5 * len(types) + 1.4 + 0.2 * len(board.models)))
    axis = figure.subplots()
    places = range(len(types))
    marks = zip(itertools.cycle((BLUE, ORANGE, GREEN, PINK)), itertools.cycle("os^"), strict=False)  # 12 in all
    for model, values, (colour, shape) in zip(board.models, means, marks, strict=False):
        axis.plot(values, places, shape, color=colour, markersize=7, alpha=0.8, label=model)
    axis.set_yticks(places, types)
    axis.set_ylim(len(types) - 0.5, -0.5)
    axis.set_xlabel("mean main score in %")
    axis.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", frameon=False)
    return figure


def new_figure(size: tuple[float, float]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save(page: str, figures: Mapping[str, Figure], key: str, output: Path) -> None:
    """The pictures, then the page that shows them. Each picture carries the key of the results it was drawn from."""
    output.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(output / name, metadata={KEY: key})
    (output / "report.md").write_text(page + "\n", encoding="utf-8")
    print(output / "report.md")


if __name__ == "__main__":
    run(main)
