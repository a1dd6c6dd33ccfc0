"""Manifests -> README.md of the published folder: the YAML that `load_dataset` reads, and how the data was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

CARD = Path(__file__).with_name("dataset_card.md")


def render_card(configs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """README.md. `facts`, the recipe's keys and the steps' manifests by name (None: not made), fills dataset_card.md.

    Each of `configs` has name, rows, columns and files; the first is the default one.
    """
    files = [
        {"config_name": config["name"], "data_files": [{"split": "train", "path": config["files"]}]}
        for config in configs
    ]
    metadata = {
        "language": ["en"],
        "task_categories": ["sentence-similarity"],
        "tags": ["sentence-transformers", "graded-embedder"],
        "configs": [{**files[0], "default": True}, *files[1:]],
    }
    environment = Environment(
        loader=FileSystemLoader(CARD.parent), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f} %"
    environment.filters["basename"] = lambda path: Path(path).name  # where it lay on this machine is nobody's business
    return environment.get_template(CARD.name).render(
        metadata=yaml.safe_dump(metadata, sort_keys=False).strip(), configs=configs, **facts
    )
