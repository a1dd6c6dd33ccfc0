"""What training and building leave for reports and cards: JSON files, read with a line about what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.cli import InputError
from common.steps import BUILD_FOLDERS, GENERATED, MANIFEST, read_json, read_manifest

Log = list[dict[str, Any]]  # the trainer's: step, and loss or evaluation figures


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
