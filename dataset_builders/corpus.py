"""Rows -> corpus/: one document for each distinct text, near duplicates grouped, no query on both sides of a split.

Rules, each with a count in the manifest:
- documents whose texts are equal (case and white space aside) become one, the smallest id's; qrels and classes follow;
- near duplicates (character 5-grams of Jaccard similarity 0.8 or more) stay, and share a group;
- a source without splits gets them by a stable hash of the group, so near duplicates never part: 80 / 10 / 10;
- queries of one split whose texts are equal become one, with all their positives;
- a query to be trained on whose text also stands in another split is dropped: it would leak;
- a recipe with `decontamination` loses from the split to be trained on what evaluation tasks ask about.

All of it is decided on arrays of numbers; texts are read where they lie and written batch by batch. The order of the
input's rows makes no difference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.cli import InputError
from common.steps import ParquetStream, write_arrow, write_parquet
from dataset_builders.columns import TextRows, take
from dataset_builders.decontamination import (
    CONTAMINATION,
    Decontamination,
    Probes,
    count_by_task,
    count_searched,
    find_matches,
    read_probes,
)
from dataset_builders.near_duplicates import band_keys, first_equal, near_duplicate_groups, text_keys
from dataset_builders.schema import CLASSES, DOCUMENTS, GROUPS, QRELS, QUERIES
from dataset_builders.sources import Rows, Splits, stable_hash

SPLIT_SHARES = {"train": 80, "validation": 10, "test": 10}  # of 100 hash buckets
BATCH_ROWS = 65_536
BATCH_BYTES = 64 << 20


@dataclass(frozen=True)
class Side:
    """Documents or queries by rising id: what follows knows each by its number in that order."""

    table: pa.Table
    rows: np.ndarray  # (n,) number -> row of the table
    keys: np.ndarray  # (n, 2) number -> text key

    @classmethod
    def of(cls, table: pa.Table) -> Side:
        rows = pc.array_sort_indices(table[0]).to_numpy().astype(np.int64)
        return cls(table, rows, text_keys(TextRows(table["text"], rows)))

    def __len__(self) -> int:
        return len(self.rows)

    def ids(self, numbers: np.ndarray) -> pa.Array:
        return take(self.table[0], self.rows[numbers])

    def text(self, numbers: np.ndarray) -> pa.Array:
        return take(self.table["text"], self.rows[numbers])

    def texts(self, numbers: np.ndarray) -> TextRows:
        return TextRows(self.table["text"], self.rows[numbers])

    def numbers(self, ids: pa.ChunkedArray) -> np.ndarray:
        """(m,) the number of each id."""
        return pc.index_in(ids, self.ids(np.arange(len(self)))).to_numpy().astype(np.int64)


@dataclass(frozen=True)
class Judgements:
    """Qrels as arrays (n,) of numbers; a split is its place in `names`, which are sorted."""

    query: np.ndarray
    document: np.ndarray
    split: np.ndarray
    score: np.ndarray
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.score)

    def only(self, rows: np.ndarray) -> Judgements:
        """Those at `rows`: a mask, or row numbers."""
        return replace(self, **{name: getattr(self, name)[rows] for name in ("query", "document", "split", "score")})

    def of_split(self, name: str) -> np.ndarray:
        """(n,) bool"""
        return self.split == (self.names.index(name) if name in self.names else -1)

    def distinct(self) -> Judgements:
        """One for each query, document and split, the highest; ordered by them."""
        ordered = self.only(np.lexsort((-self.score, self.split, self.document, self.query)))
        keys = np.stack([ordered.query, ordered.document, ordered.split])
        return ordered.only(np.append(True, (keys[:, 1:] != keys[:, :-1]).any(axis=0))[: len(self)])


def write_corpus(
    rows: Rows,
    splits: Splits,
    folder: Path,
    decontamination: Decontamination | None = None,
    data_root: str | None = None,
) -> dict[str, Any]:
    """Write documents, groups, classes, queries and qrels into `folder`; returns the counts for the manifest."""
    probes = read_probes(decontamination, data_root) if decontamination else None
    documents, queries = Side.of(rows.documents), Side.of(rows.queries)
    merged = first_equal(documents.keys)
    kept = np.unique(merged)
    bands = band_keys(documents.texts(kept), "documents: MinHash")
    group = np.arange(len(documents))
    group[kept] = kept[near_duplicate_groups(documents.texts(kept), bands)]
    judged = _judgements(rows, documents, queries, merged, group)
    _check_splits(judged, splits)
    counts = {
        "exact_duplicate_documents_merged": len(documents) - len(kept),
        "queries_without_positive_dropped": len(queries) - len(np.unique(judged.query[judged.score > 0])),
    }
    qrels, counts["duplicate_queries_merged"], counts["leaking_queries_dropped"] = _clean_queries(
        judged, queries.keys, splits.split
    )
    if probes:
        qrels, dropped, log, counts["contamination"] = _decontaminate(
            qrels, splits.split, documents, queries, kept, bands, probes
        )
        kept = np.setdiff1d(kept, dropped)
        write_parquet(folder / "contamination.parquet", log)
    if not qrels.of_split(splits.split).any():
        raise InputError(f"split {splits.split!r}: no query is left with a positive document; nothing to train on")
    asked = np.unique(np.stack([qrels.query, qrels.split]), axis=1)
    names = partial(take, pa.chunked_array([pa.array(qrels.names, pa.string())]))
    grouped, smallest = _groups(kept, group)
    _write_documents(folder / "documents.arrow", documents, kept)
    _write_rows(folder / "groups.parquet", GROUPS, (documents.ids, grouped), (documents.ids, smallest))
    _write_rows(
        folder / "queries.parquet", QUERIES, (queries.ids, asked[0]), (queries.text, asked[0]), (names, asked[1])
    )
    _write_rows(
        folder / "qrels.parquet",
        QRELS,
        (queries.ids, qrels.query),
        (documents.ids, qrels.document),
        (pa.array, qrels.score.astype(np.int32)),
        (names, qrels.split),
    )
    if "class" in rows.documents.column_names:
        classes, of_document, its_class = _classes(documents, merged, kept)
        counts["classes"] = len(classes)
        columns = (documents.ids, of_document), (partial(take, pa.chunked_array([classes])), its_class)
        _write_rows(folder / "classes.parquet", CLASSES, *columns)
    return {
        "pairs_seen": rows.seen,
        "pairs_used": len(rows.qrels),
        "documents": len(kept),
        "queries": {qrels.names[split]: int(np.count_nonzero(asked[1] == split)) for split in np.unique(asked[1])},
        "qrels": len(qrels),
        "near_duplicate_documents": len(grouped),
        "near_duplicate_groups": len(np.unique(smallest)),
        **counts,
    }


def split_of(name: str) -> str:
    """The split of a group, decided by its name alone."""
    bucket = stable_hash("split", name) % 100
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares sum to 100")


def _judgements(rows: Rows, documents: Side, queries: Side, merged: np.ndarray, group: np.ndarray) -> Judgements:
    """Qrels of the documents that stay; where the source has no split, the one of the document's group."""
    document = merged[documents.numbers(rows.qrels["document_id"])]
    split = rows.qrels["split"]
    groups, of_group = np.unique(group[document], return_inverse=True)
    own = split.is_null().to_numpy()
    by_group = [split_of(name) for name in documents.ids(groups).to_pylist()] if own.any() else []
    names = sorted({*pc.unique(split.drop_null()).to_pylist(), *by_group})
    numbers = pc.index_in(split, pa.array(names, pa.string())).fill_null(-1).to_numpy().astype(np.int64)
    if by_group:
        numbers = np.where(own, np.array([names.index(name) for name in by_group])[of_group], numbers)
    score = rows.qrels["score"].to_numpy()
    query = queries.numbers(rows.qrels["query_id"])
    return Judgements(query, document, numbers, score, tuple(names)).distinct()


def _check_splits(judged: Judgements, splits: Splits) -> None:
    positives = {name: np.count_nonzero(judged.score[judged.of_split(name)] > 0) for name in judged.names}
    for split in splits.searched:
        if not positives.get(split):
            found = ", ".join(name for name, count in positives.items() if count) or "none"
            raise InputError(f"split {split!r}: no query with a positive document; splits that have some: {found}")


def _clean_queries(judged: Judgements, keys: np.ndarray, train: str) -> tuple[Judgements, int, int]:
    """Judgements of queries with a positive, merged and free of leaks; numbers of queries merged and dropped."""
    judged = _with_positive(judged)
    text = first_equal(keys)[judged.query]
    is_train = judged.of_split(train)
    leaking = is_train & np.isin(text, text[~is_train])
    clean, text = judged.only(~leaking), text[~leaking]
    # ordered by query, so the first judgement of a split and text is the smallest query's
    _, first, number = np.unique(clean.split * len(keys) + text, return_index=True, return_inverse=True)
    before = len(np.unique(clean.split * len(keys) + clean.query))
    merged = replace(clean, query=clean.query[first][number]).distinct()
    return merged, before - len(first), len(np.unique(judged.query[leaking]))


def _with_positive(judged: Judgements) -> Judgements:
    """Judgements of the queries that have a positive in their split."""
    code = judged.query * len(judged.names) + judged.split
    return judged.only(np.isin(code, code[judged.score > 0]))


def _decontaminate(
    qrels: Judgements,
    train: str,
    documents: Side,
    queries: Side,
    kept: np.ndarray,
    bands: np.ndarray,
    probes: Probes,
) -> tuple[Judgements, np.ndarray, pa.Table, dict[str, Any]]:
    """Qrels without the queries and documents to be trained on that match a probe; the documents to drop; log; counts.

    A document that another split judges stays for it, with its judgements there.
    """
    is_train = qrels.of_split(train)
    asked = np.unique(qrels.query[is_train])
    texts = queries.texts(asked)
    found, query_log = find_matches(
        "query", queries.ids(asked), texts, queries.keys[asked], band_keys(texts, "queries: MinHash"), probes
    )
    bad_queries = np.unique(asked[found])
    found, document_log = find_matches(
        "document", documents.ids(kept), documents.texts(kept), documents.keys[kept], bands, probes
    )
    bad_documents = np.unique(kept[found])
    dropped = np.setdiff1d(bad_documents, qrels.document[~is_train])
    log = pa.concat_tables(
        [
            query_log.append_column("dropped", pa.array([True] * len(query_log), pa.bool_())),
            document_log.append_column("dropped", pa.array(np.isin(kept[found], dropped), pa.bool_())),
        ]
    ).cast(CONTAMINATION)
    bad = np.isin(qrels.query, bad_queries) | np.isin(qrels.document, bad_documents)
    cleaned = _with_positive(qrels.only(~(is_train & bad)))
    left = np.unique(cleaned.query[cleaned.of_split(train)])
    counts = {
        "queries_dropped": len(bad_queries),
        "documents_dropped": len(dropped),
        "documents_kept_for_other_splits": len(bad_documents) - len(dropped),
        "queries_left_without_positive_dropped": len(asked) - len(bad_queries) - len(left),
        "matches": count_by_task(log),
        "documents_that_tasks_search": count_searched(documents.keys[kept], probes),
    }
    return cleaned, dropped, log, counts


def _groups(kept: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Documents that have a near duplicate among those kept, and the smallest of each one's group."""
    _, first, number, size = np.unique(group[kept], return_index=True, return_inverse=True, return_counts=True)
    shared = size[number] > 1
    return kept[shared], kept[first][number][shared]


def _classes(documents: Side, merged: np.ndarray, kept: np.ndarray) -> tuple[pa.Array, np.ndarray, np.ndarray]:
    """Names of the classes; then documents, and a class of each: texts that were merged keep all of theirs."""
    column = documents.table["class"]
    names = pc.unique(column)
    names = names.take(pc.array_sort_indices(names))
    numbers = pc.index_in(column, names).to_numpy()[documents.rows]
    pairs = np.unique(np.stack([merged, numbers]), axis=1)
    pairs = pairs[:, np.isin(pairs[0], kept)]
    return names, pairs[0], pairs[1]


def _write_documents(path: Path, documents: Side, kept: np.ndarray) -> None:
    """In batches of BATCH_ROWS at most, and of BATCH_BYTES where a document is not larger than that itself."""
    size = pc.binary_length(documents.table["text"]).to_numpy()[documents.rows[kept]].astype(np.int64)
    total = np.cumsum(size)

    def batches() -> Iterator[pa.RecordBatch]:
        start = 0
        while start < len(kept):
            fitting = np.searchsorted(total, total[start] - size[start] + BATCH_BYTES, side="right")
            stop = min(max(int(fitting), start + 1), start + BATCH_ROWS, len(kept))
            numbers = kept[start:stop]
            yield pa.record_batch([documents.ids(numbers), documents.text(numbers)], schema=DOCUMENTS)
            start = stop

    write_arrow(path, batches(), DOCUMENTS)


def _write_rows(path: Path, schema: pa.Schema, *columns: tuple[Callable[[np.ndarray], pa.Array], np.ndarray]) -> None:
    """A Parquet file whose columns are `values(numbers)`, made and written BATCH_ROWS rows at a time."""
    with ParquetStream(path, schema) as stream:
        for start in range(0, max(len(columns[0][1]), 1), BATCH_ROWS):
            block = [values(numbers[start : start + BATCH_ROWS]) for values, numbers in columns]
            stream.write(pa.table(block, schema=schema))
