"""Where raw data comes from: docstrings (`pydocs`), a local folder (`local`) or the Hugging Face Hub (`hub`).

Whatever the source, out come documents, queries and qrels (or sentence pairs with a score), checked row by row.
"""

from __future__ import annotations

import hashlib
import heapq
import importlib.metadata
import os
import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from dataset_builders import pydocs
from dataset_builders.cli import InputError
from dataset_builders.folders import file_sha256, files_of, read_parquet
from dataset_builders.recipes import Section
from dataset_builders.references import hub_commit
from dataset_builders.schema import (
    DOCUMENTS,
    LABEL_FLOOR,
    QRELS,
    STS,
    check_known,
    check_rows,
    check_texts,
    check_unique,
    to_schema,
)


class Splits(Section):
    """`split` is graded and mined; the queries of `eval_splits` get candidates only."""

    split: str = "train"
    eval_splits: tuple[str, ...] = ()

    @property
    def searched(self) -> tuple[str, ...]:
        return (self.split, *self.eval_splits)

    @model_validator(mode="after")
    def _apart(self) -> Splits:
        if self.split in self.eval_splits:
            raise ValueError(f"split {self.split!r} cannot be an eval split too: it would be trained on")
        return self


class PydocsSource(Splits):
    """Docstrings of the standard library and of this project's dependencies: summary = query, body = document."""

    kind: Literal["pydocs"]
    num_pairs: int | None = Field(None, ge=1)  # a stable subset; a larger number contains a smaller one's
    seed: int = 0


class LocalSource(Splits):
    """corpus.parquet (_id, title, text), queries.parquet (_id, text), qrels.parquet (see CORPUS_FILES)."""

    kind: Literal["local"]
    path: str


class PairColumns(Section):
    query: str = "query"
    positive: str = "positive"


class HubSource(Splits):
    """A data set of (query, positive) rows on the Hub, or in a folder that `load_dataset` reads."""

    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    columns: PairColumns = PairColumns()
    num_pairs: int | None = Field(None, ge=1)
    seed: int = 0


class Graded(Section):
    """Sentence pairs whose published scores run from score_range[0] to score_range[1]."""

    split: str = "train"
    score_range: tuple[float, float]

    @model_validator(mode="after")
    def _rising(self) -> Graded:
        if not self.score_range[0] < self.score_range[1]:
            raise ValueError("score_range is written [lowest, highest]")
        return self


class LocalStsSource(Graded):
    """A folder with SPLIT.parquet (sentence1, sentence2, score)."""

    kind: Literal["local"]
    path: str


class StsColumns(Section):
    sentence1: str = "sentence1"
    sentence2: str = "sentence2"
    score: str = "score"


class HubStsSource(Graded):
    kind: Literal["hub"]
    dataset: str
    config: str | None = None
    revision: str | None = None
    columns: StsColumns = StsColumns()


Source = Annotated[PydocsSource | LocalSource | HubSource, Field(discriminator="kind")]
StsSource = Annotated[LocalStsSource | HubStsSource, Field(discriminator="kind")]

CORPUS_FILES = {
    "corpus.parquet": ["_id", "text"],  # and title, where there is one
    "queries.parquet": ["_id", "text"],
    "qrels.parquet": ["query_id", "corpus_id", "score", "split"],
}


@dataclass(frozen=True)
class Rows:
    """Raw data: `qrels.split` is null where the source has no splits of its own."""

    documents: dict[str, str]  # document_id -> text
    queries: dict[str, str]  # query_id -> text
    qrels: list[tuple[str, str, int, str | None]]  # query_id, document_id, score, split
    seen: int  # pairs or judgements that the source holds


def describe_source(source: Any, data_root: str | None) -> dict[str, Any]:
    """What decides a source's rows, for the fingerprint of the step that reads them. Raises InputError."""
    keys = source.model_dump(mode="json")
    if source.kind == "pydocs":
        packages = {name: importlib.metadata.version(name) for name in pydocs.dependencies(pydocs.PROJECT)}
        parser = file_sha256(Path(pydocs.__file__))
        return {**keys, "python": platform.python_version(), "packages": packages, "parser": parser}
    if source.kind == "local":
        folder = find_folder(keys.pop("path"), data_root)
        names = CORPUS_FILES if isinstance(source, LocalSource) else [f"{source.split}.parquet"]
        for name in names:
            if not (folder / name).is_file():
                raise InputError(f"{folder / name}: no such file; {type(source).__doc__.splitlines()[0]}")
        return {**keys, "files": {name: file_sha256(folder / name) for name in names}}
    if Path(source.dataset).is_dir():
        return {**keys, "files": files_of(Path(source.dataset))}
    return {**keys, "commit": hub_commit(source.dataset, source.revision, repo_type="dataset")}


def read_rows(source: PydocsSource | LocalSource | HubSource, data_root: str | None) -> Rows:
    if source.kind == "pydocs":
        return _read_pydocs(source)
    if source.kind == "local":
        return _read_local(source, find_folder(source.path, data_root))
    return _read_hub(source)


def read_sts(source: LocalStsSource | HubStsSource, data_root: str | None) -> pa.Table:
    """(sentence1, sentence2, label): the published score moved from its stated range into (0, 1)."""
    if source.kind == "local":
        path = find_folder(source.path, data_root) / f"{source.split}.parquet"
        table, where = read_parquet(path, ["sentence1", "sentence2", "score"]), str(path)
    else:
        table, where = _load_hub_split(source, source.split), source.dataset
    check_rows(table, where)
    raw = pa.schema([STS.field("sentence1"), STS.field("sentence2"), ("score", pa.float64())])
    table = to_schema(table, raw, where)
    for name in ("sentence1", "sentence2"):
        check_texts(table[name].to_pylist(), [f"{name} in row {row}" for row in range(len(table))], where)
    scores = table["score"].to_numpy()
    lowest, highest = source.score_range
    outside = np.flatnonzero(~((scores >= lowest) & (scores <= highest)))
    if len(outside):
        row = outside[0]
        raise InputError(f"{where}: score {scores[row]} in row {row} is outside score_range [{lowest}, {highest}]")
    labels = np.clip((scores - lowest) / (highest - lowest), LABEL_FLOOR, 1 - LABEL_FLOOR)
    return pa.table([table["sentence1"], table["sentence2"], pa.array(labels, pa.float32())], schema=STS)


def find_folder(path: str, data_root: str | None) -> Path:
    """A local set's folder: under `data_root`, else under $DATA_ROOT, else as written. Raises InputError."""
    roots = [root for root in (data_root, os.environ.get("DATA_ROOT")) if root]
    places = [*(Path(root).expanduser() / path for root in roots), Path(path).expanduser()]
    for place in places:
        if place.is_dir():
            return place
    looked = ", ".join(map(str, places))
    raise InputError(f"source.path {path!r}: no such folder (looked for {looked}); set data_root or $DATA_ROOT")


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but `parts`: the same in every process, on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def _read_pydocs(source: PydocsSource) -> Rows:
    found = list(pydocs.docstring_pairs())
    chosen = _subset([(pair.name, pair.summary, pair.body) for pair in found], source)
    return Rows(
        documents={name: body for name, _, body in chosen},
        queries={name: summary for name, summary, _ in chosen},
        qrels=[(name, name, 1, None) for name, _, _ in chosen],
        seen=len(found),
    )


def _read_local(source: LocalSource, folder: Path) -> Rows:
    corpus, queries, qrels = (
        _read_file(folder / name, columns, DOCUMENTS if "text" in columns else QRELS)
        for name, columns in CORPUS_FILES.items()
    )
    document_ids, texts = corpus["document_id"].to_pylist(), corpus["text"].to_pylist()
    if "title" in pq.read_schema(folder / "corpus.parquet").names:
        titles = read_parquet(folder / "corpus.parquet", ["title"])["title"].cast(pa.string()).to_pylist()
        texts = [f"{title or ''} {text}".strip() for title, text in zip(titles, texts, strict=True)]
    query_ids, query_texts = queries["document_id"].to_pylist(), queries["text"].to_pylist()
    for ids, found, name in ((document_ids, texts, "corpus"), (query_ids, query_texts, "queries")):
        check_unique(ids, str(folder / f"{name}.parquet"))
        check_texts(found, ids, str(folder / f"{name}.parquet"))
    where = str(folder / "qrels.parquet")
    check_known(qrels["query_id"].to_pylist(), query_ids, where, "queries.parquet")
    check_known(qrels["document_id"].to_pylist(), document_ids, where, "corpus.parquet")
    judgements = list(zip(*(qrels[name].to_pylist() for name in QRELS.names), strict=True))
    return Rows(
        documents=dict(zip(document_ids, texts, strict=True)),
        queries=dict(zip(query_ids, query_texts, strict=True)),
        qrels=judgements,
        seen=len(judgements),
    )


def _read_file(path: Path, columns: list[str], schema: pa.Schema) -> pa.Table:
    table = read_parquet(path, columns)
    check_rows(table, str(path))
    return to_schema(table.rename_columns(schema.names), schema, str(path))


def _read_hub(source: HubSource) -> Rows:
    """Rows without ids get them from their texts, so that the same text has the same id in every build."""
    documents, queries, qrels, seen = {}, {}, [], 0
    for split in source.searched:
        table = _load_hub_split(source, split)
        where = f"{source.dataset} ({split})"
        check_rows(table, where)
        table = to_schema(table, pa.schema([("query", pa.string()), ("positive", pa.string())]), where)
        rows = list(zip(table["query"].to_pylist(), table["positive"].to_pylist(), strict=True))
        seen += len(rows)
        for side in zip(*rows, strict=True):
            check_texts(side, [f"row {row}" for row in range(len(rows))], where)
        if split == source.split:
            rows = [row[1:] for row in _subset([(f"{query}\x1f{text}", query, text) for query, text in rows], source)]
        for query, text in rows:
            query_id, document_id = f"q{stable_hash(query):016x}", f"d{stable_hash(text):016x}"
            queries[query_id], documents[document_id] = query, text
            qrels.append((query_id, document_id, 1, split))
    return Rows(documents, queries, qrels, seen)


def _load_hub_split(source: HubSource | HubStsSource, split: str) -> pa.Table:
    """One split, its columns renamed to ours. Raises InputError when the Hub does not have it."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        dataset = load_dataset(source.dataset, source.config, split=split, revision=source.revision)
    except (DatasetsError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"dataset {source.dataset!r}, split {split!r}: {reason}") from None
    names = source.columns.model_dump()
    for name in names.values():
        if name not in dataset.column_names:
            raise InputError(
                f"dataset {source.dataset!r}: no column {name!r}; it has {', '.join(dataset.column_names)}"
            )
    return dataset.with_format("arrow").select_columns(list(names.values()))[:].rename_columns(list(names))


def _subset(pairs: Iterable[tuple[str, ...]], source: PydocsSource | HubSource) -> list[tuple[str, ...]]:
    """`num_pairs` of `pairs` (all, when it is null), chosen by a seeded hash of each pair's first part."""
    pairs = sorted(set(pairs))
    if source.num_pairs is None:
        return pairs
    return heapq.nsmallest(source.num_pairs, pairs, key=lambda pair: stable_hash(source.seed, pair[0]))
