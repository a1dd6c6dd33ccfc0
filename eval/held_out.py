"""What a build holds back for evaluation: documents, the judged queries of a split, and its retrievers' rankings."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from common.cli import InputError
from common.steps import MANIFEST, read_arrow, read_manifest, read_parquet
from dataset_builders.schema import DOCUMENTS, OWN, QRELS, QUERIES, to_schema

DEPTH = 100  # documents ranked per query
# row -> prefix of its columns
RETRIEVERS = {"BM25": "bm25", "dense retriever": "dense", "RRF": "rrf", "convex sum": "convex"}

Documents = dict[str, str]  # id -> text, in file order
Ranking = dict[str, dict[str, float]]  # query id -> document id -> score, best first


class NoQueries(InputError):
    """A split that a build does not have."""


@dataclass(frozen=True)
class HeldOut:
    """A build's documents, and the queries of a split that have a relevant one: for others no measure is defined."""

    split: str
    documents: Documents
    queries: dict[str, str]  # id -> text
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade, in the order of `queries`
    own: dict[str, list[str]] = field(default_factory=dict)  # documents that are a query's own text: in no ranking

    @property
    def counts(self) -> dict[str, int]:
        relevant = sum(len(self.relevant(query_id)) for query_id in self.queries)
        return {"documents": len(self.documents), "queries": len(self.queries), "relevant": relevant}

    def relevant(self, query_id: str) -> list[str]:
        return [document_id for document_id, grade in self.qrels[query_id].items() if grade > 0]


def load_documents(data: Path) -> Documents:
    """All documents of a data folder."""
    path = data / "corpus" / "documents.arrow"
    table = to_schema(read_arrow(path, DOCUMENTS.names), DOCUMENTS, str(path))
    if not len(table):
        raise InputError(f"{path}: no documents; build the data again")
    return _by_id(table["document_id"].to_pylist(), table["text"].to_pylist(), path)


def load_held_out(data: Path, split: str, documents: Documents | None = None) -> HeldOut:
    """The queries of `split`, and the documents where they are not given. Raises NoQueries where none is judged."""
    documents = documents or load_documents(data)
    queries_path, qrels_path = (data / "corpus" / name for name in ("queries.parquet", "qrels.parquet"))
    queries = to_schema(read_parquet(queries_path, QUERIES.names), QUERIES, str(queries_path)).to_pylist()
    qrels = to_schema(read_parquet(qrels_path, QRELS.names), QRELS, str(qrels_path)).to_pylist()
    grades: dict[str, dict[str, int]] = {}
    for row in qrels:
        if row["split"] == split:
            grades.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    _check_known(set().union(*grades.values()), documents, qrels_path)
    judged = {query_id for query_id, graded in grades.items() if max(graded.values()) > 0}
    asked = [row for row in queries if row["split"] == split and row["query_id"] in judged]
    if not asked:
        splits = ", ".join(sorted({row["split"] for row in queries}))
        raise NoQueries(f"{data / 'corpus'}: split {split!r} has no query with a relevant document; splits: {splits}")
    texts = _by_id([row["query_id"] for row in asked], [row["text"] for row in asked], queries_path)
    own: dict[str, list[str]] = {}
    path = data / "candidates" / "own.parquet"
    for row in read_parquet(path, OWN.names).to_pylist() if path.exists() else ():  # older builds have none
        own.setdefault(row["query_id"], []).append(row["document_id"])
    return HeldOut(split, documents, texts, {query_id: grades[query_id] for query_id in texts}, own)


def _by_id(ids: list[str], texts: list[str], path: Path) -> dict[str, str]:
    found = dict(zip(ids, texts, strict=True))
    if len(found) < len(ids):
        [(name, times)] = Counter(ids).most_common(1)
        raise InputError(f"{path}: id {name!r} occurs {times} times; build the data again")
    return found


def _check_known(document_ids: set[str], documents: Documents, path: Path) -> None:
    """A build that was killed between its steps has candidates or grades of other documents."""
    if unknown := document_ids - documents.keys():
        raise InputError(f"{path}: document {min(unknown)!r} is not in documents.arrow; build the data again")


def candidate_rankings(data: Path, held_out: HeldOut) -> dict[str, tuple[Ranking, int]]:
    """The first DEPTH places of RETRIEVERS' rankings, as the candidates folder holds them.

    With each comes the rank down to which it is complete: with `fusion.top_k` the folder keeps the first documents of
    the fused list, and one that BM25 ranks 90th may not be among them; a retriever's own top_k ends its list, too.
    """
    try:
        inputs = read_manifest(data / "candidates")["inputs"]
        top_k = inputs["fusion"]["top_k"] or math.inf
    except (KeyError, TypeError):
        where = data / "candidates" / MANIFEST
        raise InputError(f"{where}: no inputs.fusion.top_k in it; build the data again") from None
    path = data / "candidates" / "candidates.parquet"
    names = [f"{prefix}_{column}" for prefix in RETRIEVERS.values() for column in ("rank", "score")]
    table = pl.from_arrow(read_parquet(path, ["query_id", "document_id", *names]))
    table = table.filter(pl.col("query_id").is_in(list(held_out.queries)))
    if table.is_empty():
        raise InputError(
            f"{path}: no candidates for the queries of split {held_out.split!r}; "
            f"name that split in the recipe's source.eval_splits and build the data again"
        )
    _check_known(set(table["document_id"]), held_out.documents, path)
    is_cut = {prefix: pl.len() >= top_k for prefix in RETRIEVERS.values()}
    for own in ("bm25", "dense"):
        most = inputs.get(own, {}).get("top_k", DEPTH)
        if most < min(DEPTH, len(held_out.documents)):
            for prefix in {own, "rrf", "convex"}:
                is_cut[prefix] |= pl.col(f"{own}_rank").count() >= most
    rankings = {}
    for name, prefix in RETRIEVERS.items():
        rank, score = pl.col(f"{prefix}_rank"), pl.col(f"{prefix}_score")
        found = table.filter(rank <= DEPTH).sort(rank).group_by("query_id")
        in_place = (rank == pl.int_range(1, pl.len() + 1)).sum()
        rows = {query_id: rest for query_id, *rest in found.agg("document_id", score, in_place).iter_rows()}
        empty = [[], [], 0]
        cut = table.group_by("query_id").agg(is_cut[prefix].alias("cut")).filter("cut")["query_id"].to_list()
        ranking = {query_id: dict(zip(*rows.get(query_id, empty)[:2], strict=True)) for query_id in held_out.queries}
        rankings[name] = ranking, min((rows.get(query_id, empty)[2] for query_id in cut), default=DEPTH)
    return rankings
