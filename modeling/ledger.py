"""What a run cost, and what it was made by: for ledger.json, for the log and for the line that closes a stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.steps import BUILD_FOLDERS, GENERATED, MANIFEST, read_manifest, write_json
from modeling.recipe import VALIDATION_NDCG

if TYPE_CHECKING:
    from modeling.recipe import Stage
    from modeling.trainer import EmbedderTrainer


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, history)


def closing_line(name: str, cost: dict[str, Any], trainer: EmbedderTrainer, folder: Path) -> str:
    """What a stage took and came to, in one line; its last score is that of the saved model, the best checkpoint's
    with load_best_model_at_end.
    """
    history = trainer.state.log_history
    best = trainer.state.best_global_step if trainer.args.load_best_model_at_end else None
    seconds, tokens = cost["training_seconds"], cost["tokens"]
    parts = [f"{cost['steps']} steps", f"{tokens:,} tokens in {seconds:.0f} s ({tokens / max(seconds, 1e-9):,.0f}/s)"]
    for key, title in (("loss", "loss"), (VALIDATION_NDCG, "validation nDCG@10")):
        found = [(entry["step"], entry[key]) for entry in history if key in entry]
        if not found:
            continue
        saved = [value for step, value in found if step == best] if key.startswith("eval_") else []
        last = f"{saved[-1]:.4f} (best, of step {best})" if saved else f"{found[-1][1]:.4f}"
        parts.append(f"{title} {found[0][1]:.4f} -> {last}" if len(found) > 1 else f"{title} {found[0][1]:.4f}")
    parts.append(f"peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    if cost["peak_device_memory_bytes"]:
        parts.append(f"on {cost['device']} {cost['peak_device_memory_bytes'] / 2**30:.2f} GiB")
    if cost["share_prefix"]:
        computed, padded = cost["share_prefix"]["tokens_computed"], cost["share_prefix"]["tokens_padded"]
        parts.append(f"share_prefix computed {computed:,} tokens for {padded:,}")
    return f"stage {name}: {', '.join(parts)} -> {folder}"


def write_ledger(stages: Sequence[Stage], output_dir: Path) -> None:
    """ledger.json: what every step cost, from their manifests: those of the data where they were built here, and those
    of the finished stages, whose seconds of evaluation are part of their seconds of training. Memory is the high-water
    mark of the main process. `total` sums `seconds` over data and stages, the rest over stages; `commit` is of the
    code that trained the last stage, where it is known.
    """
    sums = ("training_seconds", "evaluation_seconds", "device_seconds", "tokens")
    facts = ("steps", "seconds", *sums, "device", "peak_memory_bytes", "peak_device_memory_bytes")
    rows = []
    for stage in stages:
        if (output_dir / stage.name / MANIFEST).is_file():
            manifest = read_manifest(output_dir / stage.name)
            known = {name: manifest.get(name) for name in ("share_prefix", "commit", "cut_texts")}
            row = {"stage": stage.name, **{name: manifest[name] for name in facts}, **known}
            # the manifest's are those of the process that finished it
            row["seconds"] = round(row["seconds"] + manifest.get("seconds_before_resume", 0.0), 2)
            rows.append(row)
    data = data_costs(stages)
    total = {name: round(sum(row[name] for row in rows), 2) for name in sums}
    total = {"seconds": round(sum(row["seconds"] for row in [*data, *rows]), 2), **total}
    commit = rows[-1]["commit"] if rows else None
    write_json(output_dir / "ledger.json", {"data": data, "stages": rows, "total": total, "commit": commit})


def data_costs(stages: Sequence[Stage]) -> list[dict[str, Any]]:
    """What the steps of dataset_builders.build cost, for every data set that is read from a folder it made."""
    names = dict.fromkeys(own.dataset_name for stage in stages for own in stage.datasets.values())
    hubs = [Path(name) for name in names if (Path(name) / MANIFEST).is_file()]
    rows = []
    for step in (hub.parent / folder for hub in hubs for folder in (GENERATED, *BUILD_FOLDERS)):
        if (step / MANIFEST).is_file():
            manifest = read_manifest(step)
            facts = {name: manifest[name] for name in ("seconds", "peak_memory_bytes")}
            rows.append({"data": str(step.parent), "step": step.name, **facts})
    return rows
