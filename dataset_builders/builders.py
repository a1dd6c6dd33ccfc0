"""A finished build -> hub/: what is published, as Parquet with a README that `load_dataset` reads alone.

`datasets` no longer runs loading scripts, so the builder runs on the publisher's side. It runs on what was published,
too: the graded candidates make other training sets without the teacher.

    from dataset_builders.builders import GradedDataset

    builder = GradedDataset(config_name="train", data_dir="runs/demo/data/hub", margin=0.9, num_negatives=15)
    builder.download_and_prepare()
    rows = builder.as_dataset(split="train")
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from datasets.exceptions import DatasetGenerationError
from huggingface_hub import DatasetCard
from pydantic import ValidationError
from tqdm import tqdm

from common.cli import InputError
from common.steps import MANIFEST, file_sha256, fingerprint, read_arrow, read_manifest, read_parquet, row_groups
from dataset_builders.card import Config, render_card
from dataset_builders.mine import Graded, Mining, Tally, known_positives, mine, positives_of, read_graded
from dataset_builders.schema import (
    CLASSES,
    DOCUMENTS,
    GROUPS,
    POSITIVES,
    QRELS,
    QUERIES,
    SCORES,
    STS,
    train_schema,
)

TEXT_ROWS = 1024  # documents in a row group: what a streaming reader holds at a time
README = "README.md"

# Config -> the file of a build that holds it, and the columns that are published.
TABLES = {
    "train": ("mined/mined.parquet", None),  # as many negative_ columns as were mined
    "positives": ("mined/positives.parquet", POSITIVES),
    "candidates": ("scores/scores.parquet", SCORES),
    "documents": ("corpus/documents.arrow", pa.schema([*DOCUMENTS, GROUPS.field("group")])),
    "queries": ("corpus/queries.parquet", QUERIES),
    "qrels": ("corpus/qrels.parquet", QRELS),
    "classes": ("corpus/classes.parquet", CLASSES),
    "sts": ("sts/sts.parquet", STS),
}
STEPS = sorted({file.partition("/")[0] for file, _ in TABLES.values()})
_PATTERN = re.compile(r"[\w.-]+/train-\*-[0-9a-f]{8}\.parquet")  # of a published config's shards
_MINED = re.compile(
    r"train-n(?P<num_negatives>\d+)(-m(?P<margin>[\d.]+))?(-(?P<margin_type>absolute|none|flipped_control))?"
    r"(-skip(?P<skip>\d+))?(-(?P<relabel>exclude|promote))?(-(?P<strategy>random)(-s(?P<seed>\d+))?)?"
)
_POSITIVES = re.compile("positives-(none|exclude|promote)")


@dataclass
class GradedConfig(datasets.BuilderConfig):
    """A table by the name it is published under.

    `train` holds the rows as the build mined them, or, given any of `Mining`'s keys, rows mined with these (the
    others at `Mining`'s defaults); `train-n15-m90` is short for num_negatives=15, margin=0.9. `positives-exclude`
    holds what goes along with rows of that `relabel`, as `positives` does with those of the build.
    """

    name: str = "train"
    margin: float | None = None
    margin_type: str | None = None
    num_negatives: int | None = None
    strategy: str | None = None
    skip: int | None = None
    relabel: str | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {name: getattr(self, name) for name in Mining.model_fields if getattr(self, name) is not None}
        short = _MINED.fullmatch(self.name)
        beside = _POSITIVES.fullmatch(self.name)
        self.relabelled = beside and beside[1]
        if not short and not beside and self.name not in TABLES:
            raise InputError(f"config {self.name!r}: there are {', '.join(TABLES)}, and names like train-n7-m90")
        if given and self.name != "train":
            raise InputError(f"config {self.name!r} takes no {next(iter(given))}; only train does")
        if short:
            given = {name: value for name, value in short.groupdict().items() if value is not None}
            if "margin" in given:
                given["margin"] = round(float(given["margin"]) / 100, 12)  # 0.977, not 0.9770000000000001
        try:
            self.mining = Mining(**given) if given else None
        except ValidationError as error:
            problem = error.errors()[0]
            raise InputError(f"config {self.name!r}: {problem['loc'][0]}: {problem['msg']}") from None


class GradedDataset(datasets.ArrowBasedBuilder):
    """A config of the data in `data_dir`: the folder of a build, or one that was published."""

    BUILDER_CONFIG_CLASS = GradedConfig
    # A row group of ours stays one: re-mining reads the candidates of whole queries. No table has as many rows.
    DEFAULT_WRITER_BATCH_SIZE = 2**26

    def __init__(self, *, data_dir: str, **keywords: Any) -> None:
        self._folder = Path(data_dir).expanduser()
        # `datasets` caches what a builder made under its arguments: the path stays when the data behind it change
        super().__init__(data_dir=data_dir, hash=_content_key(self._folder), **keywords)

    def _info(self) -> datasets.DatasetInfo:
        return datasets.DatasetInfo(features=datasets.Features.from_arrow_schema(self._schema()))

    def _schema(self) -> pa.Schema:
        if self.config.mining:
            return train_schema(self.config.mining.num_negatives)
        if self.config.name == "train":
            columns = pq.read_schema(find_files(self._folder, "train")[0]).names
            return train_schema(sum(name.startswith("negative_") and name != "negative_ids" for name in columns))
        return POSITIVES if self.config.relabelled else TABLES[self.config.name][1]

    def _split_generators(self, dl_manager: datasets.DownloadManager) -> list[datasets.SplitGenerator]:
        return [datasets.SplitGenerator(datasets.Split.TRAIN)]

    def _generate_tables(self) -> Iterator[tuple[int, pa.Table]]:
        tables = self._positives if self.config.relabelled else self._mined if self.config.mining else self._stored
        for number, table in enumerate(tables()):
            yield number, table.select(list(self.info.features))

    def _mined(self) -> Iterator[pa.Table]:
        return mine(graded_of(self._folder, self._cache_dir_root), self.config.mining, Tally())

    def _positives(self) -> Iterator[pa.Table]:
        graded = graded_of(self._folder, self._cache_dir_root)
        found = [positives_of(block) for block in graded.blocks(self.config.relabelled, description="positives")]
        qrels = pl.from_arrow(pa.concat_tables(map(read_parquet, find_files(self._folder, "qrels"))))
        graded_queries = pl.concat(found).select("query_id")
        yield known_positives(graded, qrels.join(graded_queries, on="query_id", how="semi"), found)

    def _stored(self) -> Iterator[pa.Table]:
        files = find_files(self._folder, self.config.name)
        total = sum(len(read_arrow(p)) if p.suffix == ".arrow" else pq.read_metadata(p).num_rows for p in files)
        with tqdm(total=total, desc=f"publish {self.config.name}", unit=" rows", unit_scale=True, delay=2) as progress:
            for path in files:
                is_arrow = path.suffix == ".arrow"
                for table in _with_groups(path) if is_arrow else row_groups(path, list(self.info.features)):
                    yield table
                    progress.update(len(table))

    def download_and_prepare(self, *arguments: Any, **keywords: Any) -> None:
        """As in `datasets`, which wraps all errors; bad input and a full disk are reported as in every command."""
        try:
            super().download_and_prepare(*arguments, **keywords)
        except DatasetGenerationError as error:
            if isinstance(error.__cause__, InputError | OSError):
                raise error.__cause__ from None
            raise


def find_files(folder: Path, name: str) -> list[Path]:
    """The files of a config, in the folder of a build or in a published one. Raises InputError when one is missing."""
    files = _files_by_config(folder)
    if name not in files:
        raise InputError(f"{folder}: no config {name!r}; it has {', '.join(files) or 'none'}")
    for path in files[name]:
        if not path.is_file():
            raise InputError(f"{path}: no such file; download config {name!r} whole")
    return files[name]


def _is_build(folder: Path) -> bool:
    return any((folder / step / MANIFEST).is_file() for step in STEPS)


def _files_by_config(folder: Path) -> dict[str, list[Path]]:
    """Of a published folder all shards of every config, downloaded or not: a shard's name says how many there are."""
    if _is_build(folder):
        return {name: [folder / file] for name, (file, _) in TABLES.items() if (folder / file).is_file()}
    if not (folder / README).is_file():
        raise InputError(f"{folder}: neither a build nor a published data set; download its {README}, too")
    configs = DatasetCard.load(folder / README, ignore_metadata_errors=True).data.to_dict().get("configs", [])
    return {config["config_name"]: _shards(folder, config["data_files"][0]["path"]) for config in configs}


def _shards(folder: Path, pattern: str) -> list[Path]:
    if not _PATTERN.fullmatch(pattern):  # a card names files anywhere on this machine
        raise InputError(f"{folder / README}: data files {pattern!r} are none that graded-embedder published")
    found = sorted(folder.glob(pattern))
    number = int(found[0].name.split("-")[3]) if found else 1  # train-00000-of-NUMBER-HASH.parquet
    return [folder / pattern.replace("*", f"{shard:05d}-of-{number:05d}") for shard in range(number)]


def _content_key(folder: Path) -> str:
    """Changes when what `folder` holds does: published files are named by their content, in the README."""
    if _is_build(folder):
        made = [step for step in STEPS if (folder / step / MANIFEST).is_file()]
        return fingerprint({step: read_manifest(folder / step)["files"] for step in made})
    return fingerprint({name: list(map(str, paths)) for name, paths in _files_by_config(folder).items()})


def graded_of(folder: Path, cache_dir: str) -> Graded:
    """What mining reads, from the folder of a build or from a published one."""
    if _is_build(folder):
        return read_graded(folder / "corpus", folder / "scores")
    names = ("candidates", "documents", "queries", *({"classes"} & _files_by_config(folder).keys()))
    files = {name: find_files(folder, name) for name in names}
    # unpacked by `datasets` into its cache, once, and memory-mapped from there
    documents = datasets.Dataset.from_parquet(list(map(str, files["documents"])), cache_dir=cache_dir)
    documents = documents.with_format("arrow")[:]
    return Graded(
        files["candidates"],
        documents,
        pa.concat_tables(read_parquet(path, ["query_id", "text"]) for path in files["queries"]),
        pl.from_arrow(documents.select(GROUPS.names)).drop_nulls("group"),
        pl.from_arrow(pa.concat_tables([CLASSES.empty_table(), *map(read_parquet, files.get("classes", []))])),
    )


def _with_groups(path: Path) -> Iterator[pa.Table]:
    """The documents, each with the group of its near duplicates (null: it has none)."""
    groups = pl.from_arrow(read_parquet(path.with_name("groups.parquet"), GROUPS.names))
    for batch in read_arrow(path, DOCUMENTS.names).to_batches():
        table = pl.from_arrow(batch).join(groups, on="document_id", how="left", maintain_order="left")
        for part in table.iter_slices(TEXT_ROWS):
            yield part.to_arrow().cast(TABLES["documents"][1])


def write_hub(
    data: Path,
    steps: Sequence[str],
    facts: Mapping[str, Any],
    folder: Path,
    max_shard_size: str,
    publish: Sequence[Mining] = (),
) -> dict[str, Any]:
    """Publish what `steps` left under `data` into `folder`, with a card; returns row counts.

    `publish`: further training sets, mined from the same graded candidates. A shard ends with the row group in which
    its rows exceed `max_shard_size` in memory; on disk, compressed, it is smaller.
    """
    datasets.disable_progress_bars()  # which call every config "train"; ours name them
    names = [name for name in _files_by_config(data) if TABLES[name][0].partition("/")[0] in steps]
    further = [mining.config_name() for mining in publish]
    further += dict.fromkeys(f"positives-{mining.relabel}" for mining in publish)
    names[1:1] = further  # after `train`, which is the default
    configs = [_write_config(name, data, folder, max_shard_size) for name in names]
    for config in [config for config in configs if not config.rows]:  # no query has several positives
        shutil.rmtree(folder / config.name)
        configs.remove(config)
    if "audit" in steps:
        (folder / "assets").mkdir(exist_ok=True)
        for plot in sorted((data / "audit").glob("*.png")):
            shutil.copyfile(plot, folder / "assets" / plot.name)
    (folder / README).write_text(render_card(configs, facts), encoding="utf-8")
    return {"rows": {config.name: config.rows for config in configs}}


def _write_config(name: str, data: Path, folder: Path, max_shard_size: str) -> Config:
    scratch = folder / "scratch"  # also what a killed run left
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.rmtree(folder / name, ignore_errors=True)
    builder = GradedDataset(
        config_name=name, data_dir=str(data), cache_dir=str(scratch / "cache"), dataset_name="graded"
    )
    builder.download_and_prepare(str(scratch / "files"), file_format="parquet", max_shard_size=max_shard_size)
    (folder / name).mkdir()
    pattern, files = _name_by_content(sorted((scratch / "files").glob("*.parquet")), folder / name)
    shutil.rmtree(scratch)
    builder.info.download_size = sum(path.stat().st_size for path in files)
    return Config(name, f"{name}/{pattern}", builder.info)


def _name_by_content(shards: Sequence[Path], folder: Path) -> tuple[str, list[Path]]:
    """Move shards of Parquet into `folder` as train-00000-of-00002-HASH.parquet, ...; returns their pattern, and them.

    The hash is that of the config's whole content: `datasets` 5.2 caches a local folder under its name and what its
    README says, so that with the same pattern a rebuilt folder, or another one called hub, would be answered with the
    rows of the first. A shard of an earlier version that was left beside these does not match their pattern.
    """
    content = fingerprint([file_sha256(path) for path in shards])[:8]
    names = [f"train-{number:05d}-of-{len(shards):05d}-{content}.parquet" for number in range(len(shards))]
    moved = [path.rename(folder / name) for path, name in zip(shards, names, strict=True)]
    return f"train-*-{content}.parquet", moved
