"""mined/, scores/, corpus/, sts/ -> hub/: what is published, as Parquet with a README that `load_dataset` reads alone.

`datasets` no longer runs loading scripts, so the builder runs here, on the publisher's side.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from dataset_builders.folders import file_sha256

CARD = Path(__file__).with_name("dataset_card.md")


@dataclass
class PublishedConfig(datasets.BuilderConfig):
    """One published table: a step's Parquet file without the columns that only the build needs."""

    file: str = ""
    dropped: tuple[str, ...] = ()


class GradedDataset(datasets.ArrowBasedBuilder):
    """Reads the finished step folders under `data_dir`."""

    BUILDER_CONFIG_CLASS = PublishedConfig
    BUILDER_CONFIGS: ClassVar = [
        # a trainer takes every column as an input, in order
        PublishedConfig("train", file="mined/mined.parquet", dropped=("query_id", "positive_id", "negative_ids")),
        PublishedConfig("candidates", file="scores/scores.parquet"),
        PublishedConfig("documents", file="corpus/documents.parquet"),
        PublishedConfig("queries", file="corpus/queries.parquet"),
        PublishedConfig("qrels", file="corpus/qrels.parquet"),
        PublishedConfig("sts", file="sts/sts.parquet"),
    ]

    def _info(self) -> datasets.DatasetInfo:
        schema = pq.read_schema(Path(self.config.data_dir) / self.config.file)
        columns = pa.schema([field for field in schema if field.name not in self.config.dropped])
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(columns))

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(datasets.Split.TRAIN)]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        parquet = pq.ParquetFile(Path(self.config.data_dir) / self.config.file)
        for number, batch in enumerate(parquet.iter_batches(columns=list(self.info.features))):
            yield number, pa.Table.from_batches([batch])


def write_hub(data: Path, steps: Sequence[str], facts: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Publish the tables that `steps` left under `data` into `folder`, with a card; returns row counts."""
    configs = []
    for config in GradedDataset.BUILDER_CONFIGS:
        if config.file.partition("/")[0] in steps:
            configs.append(_write_config(config.name, data, folder))
    (folder / "README.md").write_text(render_card(configs, facts), encoding="utf-8")
    return {"rows": {config["name"]: config["rows"] for config in configs}}


def render_card(configs: list[dict[str, Any]], facts: Mapping[str, Any]) -> str:
    """README.md: the YAML that `load_dataset` reads, and how the data was made. `facts` fills dataset_card.md."""
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


def _write_config(name: str, data: Path, folder: Path) -> dict[str, Any]:
    cache = folder / f"{name}.cache"
    builder = GradedDataset(config_name=name, data_dir=str(data), cache_dir=str(cache), dataset_name="graded")
    builder.download_and_prepare(str(folder / name), file_format="parquet")
    shutil.rmtree(cache)
    # bookkeeping of the writing process: the Parquet files carry their features themselves
    for leftover in [*folder.glob(f"{name}*.lock"), folder / name / "dataset_info.json"]:
        leftover.unlink()
    return {
        "name": name,
        "rows": builder.info.splits["train"].num_examples,
        "columns": list(builder.info.features),
        "files": [_name_by_content(path, folder) for path in sorted((folder / name).glob("*.parquet"))],
    }


def _name_by_content(path: Path, folder: Path) -> str:
    """Rename graded-train-00000-of-00002.parquet to train-00000-of-00002-HASH.parquet; its name below `folder`.

    `datasets` 5.2 caches a local folder under its name and the file names in its README: with the same names a
    rebuilt folder, or another one called hub, would be answered with the rows of the first.
    """
    name = f"{path.stem.removeprefix('graded-')}-{file_sha256(path)[:8]}.parquet"
    return path.rename(path.with_name(name)).relative_to(folder).as_posix()
