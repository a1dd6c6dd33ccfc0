"""Rows -> corpus/: one document for each distinct text, near duplicates grouped, no query on both sides of a split.

Rules, each with a count in the manifest:
- documents whose texts are equal (case and white space aside) become one, the smallest id's; qrels follow;
- near duplicates (character 5-grams of Jaccard similarity 0.8 or more) stay, and share a group;
- a source without splits gets them by a stable hash of the group, so near duplicates never part: 80 / 10 / 10;
- queries of one split whose texts are equal become one, with all their positives;
- a query to be trained on whose text also stands in another split is dropped: it would leak.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dataset_builders.cli import InputError
from dataset_builders.folders import write_parquet
from dataset_builders.schema import DOCUMENTS, GROUPS, QRELS, QUERIES
from dataset_builders.sources import Rows, Splits, stable_hash

NEAR_DUPLICATE = 0.8  # Jaccard similarity of the sets of character 5-grams
SHINGLE = 5
SPLIT_SHARES = {"train": 80, "validation": 10, "test": 10}  # of 100 hash buckets
_WORD = re.compile(r"\w+")


def write_corpus(rows: Rows, splits: Splits, folder: Path) -> dict[str, Any]:
    """Write documents, groups, queries and qrels into `folder`; returns the counts for the manifest."""
    kept = merge_duplicates(rows.documents)
    document_ids = sorted(set(kept.values()))
    texts = [rows.documents[document_id] for document_id in document_ids]
    groups = near_duplicate_groups(dict(zip(document_ids, texts, strict=True)))
    qrels = _remapped(rows, kept, groups)
    _check_splits(qrels, splits)
    queries, qrels, merged, leaked = _clean_queries(rows.queries, qrels, splits.split)
    if not any(split == splits.split for _, _, split in queries):
        raise InputError(f"split {splits.split!r}: no query is left with a positive document; nothing to train on")
    judged = {query_id for query_id, _, score, _ in rows.qrels if score > 0}
    write_parquet(folder / "documents.parquet", pa.table([document_ids, texts], schema=DOCUMENTS))
    write_parquet(folder / "groups.parquet", _columns(sorted(groups.items()), GROUPS))
    write_parquet(folder / "queries.parquet", _columns(queries, QUERIES))
    write_parquet(folder / "qrels.parquet", _columns(qrels, QRELS))
    return {
        "pairs_seen": rows.seen,
        "pairs_used": len(rows.qrels),
        "documents": len(document_ids),
        "queries": dict(sorted(Counter(split for _, _, split in queries).items())),
        "qrels": len(qrels),
        "exact_duplicate_documents_merged": len(rows.documents) - len(document_ids),
        "near_duplicate_documents": len(groups),
        "near_duplicate_groups": len(set(groups.values())),
        "duplicate_queries_merged": merged,
        "leaking_queries_dropped": leaked,
        "queries_without_positive_dropped": len(rows.queries) - len(judged),
    }


def normalised(text: str) -> str:
    """What two texts are compared by: case and white space do not make a difference."""
    return " ".join(text.split()).casefold()


def merge_duplicates(documents: Mapping[str, str]) -> dict[str, str]:
    """document_id -> the smallest id that has the same text."""
    first: dict[str, str] = {}
    return {
        document_id: first.setdefault(normalised(text), document_id) for document_id, text in sorted(documents.items())
    }


def near_duplicate_groups(documents: Mapping[str, str]) -> dict[str, str]:
    """document_id -> the smallest id of its group, for documents that have a near duplicate.

    MinHash and LSH propose pairs, the exact Jaccard similarity decides, and a chain of near duplicates is one group.
    """
    from datasketch import MinHash, MinHashLSH
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    names = list(documents)
    shingles = [_shingles(text) for text in documents.values()]
    # a threshold below ours, weighted towards recall: a proposed pair costs little, a missed one is lost
    index = MinHashLSH(threshold=NEAR_DUPLICATE - 0.1, num_perm=64, weights=(0.2, 0.8))
    pairs = []
    # the shingles are hashed already, and Python's integers are quicker to walk through than numpy's
    sketches = MinHash.generator((row.tolist() for row in shingles), num_perm=64, seed=0, hashfunc=int)
    for row, sketch in enumerate(sketches):
        pairs += [
            (other, row) for other in index.query(sketch) if _jaccard(shingles[other], shingles[row]) >= NEAR_DUPLICATE
        ]
        index.insert(row, sketch)
    if not pairs:
        return {}
    left, right = np.array(pairs).T
    graph = coo_array((np.ones(len(pairs)), (left, right)), shape=(len(names), len(names)))
    _, components = connected_components(graph, directed=False)
    members = defaultdict(list)
    for row in sorted({*left.tolist(), *right.tolist()}):
        members[components[row]].append(names[row])
    return {name: min(group) for group in members.values() for name in group}


def _shingles(text: str) -> np.ndarray:
    """The distinct 32-bit hashes of a text's 5-grams (bytes of its words in lower case, joined by one space)."""
    data = np.frombuffer(" ".join(_WORD.findall(text.casefold())).encode().ljust(SHINGLE), np.uint8)
    windows = np.lib.stride_tricks.sliding_window_view(data, SHINGLE).astype(np.uint64)
    powers = np.array([pow(1_000_003, place, 2**32) for place in range(SHINGLE)], np.uint64)
    return np.unique((windows @ powers) % 2**32)


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _remapped(rows: Rows, kept: Mapping[str, str], groups: Mapping[str, str]) -> list[tuple[str, str, int, str]]:
    """Qrels of the documents that stay; where the source has no split, the one of the document's group."""
    found: dict[tuple[str, str, str], int] = {}
    for query_id, document_id, score, split in rows.qrels:
        document_id = kept[document_id]
        key = (query_id, document_id, split or split_of(groups.get(document_id, document_id)))
        found[key] = max(score, found.get(key, score))
    return [(query_id, document_id, score, split) for (query_id, document_id, split), score in found.items()]


def split_of(name: str) -> str:
    bucket = stable_hash("split", name) % 100
    for split, share in SPLIT_SHARES.items():
        if bucket < share:
            return split
        bucket -= share
    raise AssertionError("the shares sum to 100")


def _check_splits(qrels: Sequence[tuple[str, str, int, str]], splits: Splits) -> None:
    positives = Counter(split for _, _, score, split in qrels if score > 0)
    for split in splits.searched:
        if not positives[split]:
            found = ", ".join(sorted(positives)) or "none"
            raise InputError(f"split {split!r}: no query with a positive document; splits that have some: {found}")


def _clean_queries(
    texts: Mapping[str, str], qrels: Sequence[tuple[str, str, int, str]], train_split: str
) -> tuple[list[tuple[str, str, str]], list[tuple[str, str, int, str]], int, int]:
    """Queries with a positive, merged and free of leaks, with their qrels; numbers of queries merged and dropped."""
    used = sorted({(split, query_id) for query_id, _, score, split in qrels if score > 0})
    held_out = {normalised(texts[query_id]) for split, query_id in used if split != train_split}
    first: dict[tuple[str, str], str] = {}
    target: dict[tuple[str, str], str] = {}
    leaked = 0
    for split, query_id in used:
        text = normalised(texts[query_id])
        if split == train_split and text in held_out:
            leaked += 1
            continue
        target[split, query_id] = first.setdefault((split, text), query_id)
    queries = sorted({(query_id, texts[query_id], split) for (split, _), query_id in target.items()})
    scores: dict[tuple[str, str, str], int] = {}
    for query_id, document_id, score, split in qrels:
        if (split, query_id) in target:
            key = (target[split, query_id], document_id, split)
            scores[key] = max(score, scores.get(key, score))
    cleaned = sorted((query_id, document_id, score, split) for (query_id, document_id, split), score in scores.items())
    return queries, cleaned, len(target) - len(queries), leaked


def _columns(rows: Sequence[tuple], schema: pa.Schema) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [()] * len(schema)
    return pa.table(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )
