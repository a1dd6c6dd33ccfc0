"""What a build holds back for evaluation: documents, the judged queries of a split, and its retrievers' rankings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from common.cli import InputError
from common.steps import MANIFEST, read_arrow, read_manifest, read_parquet
from dataset_builders.schema import DOCUMENTS, OWN, QRELS, QUERIES, to_schema

DEPTH = 100  # documents ranked per query
# row -> prefix of its columns
RETRIEVERS = {"BM25": "bm25", "dense retriever": "dense", "RRF": "rrf", "convex sum": "convex"}

Ranking = dict[str, dict[str, float]]  # query id -> document id -> score, best first


class NoQueries(InputError):
    """A split that a build does not have."""


@dataclass(frozen=True)
class Documents:
    """A document collection, in file order."""

    ids: list[str]
    texts: list[str]


@dataclass(frozen=True)
class Queries:
    """The queries of one split that have a relevant document, and those documents' grades."""

    split: str
    ids: list[str]
    texts: list[str]
    qrels: dict[str, dict[str, int]]
    own: dict[str, list[str]] = field(default_factory=dict)  # documents that are a query's own text: in no ranking


def load_documents(data: Path) -> Documents:
    """All documents of a data folder, in file order."""
    path = data / "corpus" / "documents.arrow"
    table = to_schema(read_arrow(path, DOCUMENTS.names), DOCUMENTS, str(path))
    if not len(table):
        raise InputError(f"{path}: no documents; build the data again")
    return Documents(_unique(table["document_id"].to_pylist(), path), table["text"].to_pylist())


def load_queries(data: Path, split: str, document_ids: set[str]) -> Queries:
    """The queries of `split` with at least one relevant document (a measure is undefined for the others).

    Raises NoQueries where there is none.
    """
    queries_path, qrels_path = (data / "corpus" / name for name in ("queries.parquet", "qrels.parquet"))
    queries = to_schema(read_parquet(queries_path, QUERIES.names), QUERIES, str(queries_path)).to_pylist()
    qrels = to_schema(read_parquet(qrels_path, QRELS.names), QRELS, str(qrels_path)).to_pylist()
    grades: dict[str, dict[str, int]] = {}
    for row in qrels:
        if row["split"] == split:
            if row["document_id"] not in document_ids:
                raise InputError(
                    f"{qrels_path}: document {row['document_id']!r} of query {row['query_id']!r} is not in "
                    "documents.arrow; build the data again"
                )
            grades.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    judged = {query_id for query_id, graded in grades.items() if max(graded.values()) > 0}
    asked = [row for row in queries if row["split"] == split and row["query_id"] in judged]
    if not asked:
        splits = ", ".join(sorted({row["split"] for row in queries}))
        raise NoQueries(f"{data / 'corpus'}: split {split!r} has no query with a relevant document; splits: {splits}")
    ids = _unique([row["query_id"] for row in asked], queries_path)
    own: dict[str, list[str]] = {}
    path = data / "candidates" / "own.parquet"
    for row in read_parquet(path, OWN.names).to_pylist() if path.exists() else ():  # older builds have none
        own.setdefault(row["query_id"], []).append(row["document_id"])
    return Queries(split, ids, [row["text"] for row in asked], {query_id: grades[query_id] for query_id in ids}, own)


def _unique(ids: list[str], path: Path) -> list[str]:
    counts = pl.Series(ids).value_counts(sort=True)
    if counts["count"][0] > 1:
        raise InputError(f"{path}: id {counts[''][0]!r} occurs {counts['count'][0]} times; build the data again")
    return ids


def count(documents: Documents, queries: Queries) -> dict[str, int]:
    relevant = sum(grade > 0 for grades in queries.qrels.values() for grade in grades.values())
    return {"documents": len(documents.ids), "queries": len(queries.ids), "relevant": relevant}


def candidate_rankings(data: Path, queries: Queries, document_ids: set[str]) -> dict[str, tuple[Ranking, int]]:
    """The rankings of RETRIEVERS, as the candidates folder holds them.

    With each comes the rank down to which it is complete: with `fusion.top_k` the folder keeps the first documents of
    the fused list, and one that BM25 ranks 90th may not be among them.
    """
    try:
        top_k = read_manifest(data / "candidates")["inputs"]["fusion"]["top_k"] or math.inf
    except (KeyError, TypeError):
        where = data / "candidates" / MANIFEST
        raise InputError(f"{where}: no inputs.fusion.top_k in it; build the data again") from None
    path = data / "candidates" / "candidates.parquet"
    names = [f"{prefix}_{column}" for prefix in RETRIEVERS.values() for column in ("rank", "score")]
    table = pl.from_arrow(read_parquet(path, ["query_id", "document_id", *names]))
    table = table.filter(pl.col("query_id").is_in(queries.ids))
    if table.is_empty():
        raise InputError(
            f"{path}: no candidates for the queries of split {queries.split!r}; "
            f"name that split in the recipe's source.eval_splits and build the data again"
        )
    if unknown := set(table["document_id"]) - document_ids:
        raise InputError(f"{path}: document {min(unknown)!r} is not in documents.arrow; build the data again")
    cut = {query_id for (query_id,), rows in table.group_by("query_id") if len(rows) >= top_k}
    rankings = {}
    for name, prefix in RETRIEVERS.items():
        found = table.filter(pl.col(f"{prefix}_rank").is_not_null()).sort(f"{prefix}_rank")
        ranking: Ranking = {query_id: {} for query_id in queries.ids}
        complete = dict.fromkeys(cut, 0)
        for (query_id,), rows in found.group_by("query_id", maintain_order=True):
            ranking[query_id] = dict(zip(rows["document_id"], rows[f"{prefix}_score"], strict=True))
            if query_id in cut:
                complete[query_id] = int((rows[f"{prefix}_rank"].to_numpy() == np.arange(1, len(rows) + 1)).sum())
        rankings[name] = ranking, min(complete.values(), default=DEPTH)
    return rankings
