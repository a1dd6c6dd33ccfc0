"""corpus/ -> candidates/: for each query the best documents by BM25 and by a dense encoder, fused by rank."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from pydantic import Field

from common.recipes import Section
from common.steps import parquet_writer
from dataset_builders.bm25 import search_bm25
from dataset_builders.build_record import Build
from dataset_builders.columns import TextColumn, take
from dataset_builders.dense import search_dense
from dataset_builders.embeddings import warn_of_cut_texts
from dataset_builders.fusion import reciprocal_rank_fusion as reciprocal_rank_fusion  # imported from here outside
from dataset_builders.near_duplicates import normalised
from dataset_builders.schema import CANDIDATES
from dataset_builders.top_k import Ranking, ranges

PART = 65_536  # documents searched at a time, at least: 100 MB of vectors of 384 dimensions
MAX_PARTS = 64  # of a larger corpus; each keeps its own best documents for every query until they are merged
SEARCH_BLOCK = 8192  # queries that one search of a part answers
QUERY_BLOCK = 1024  # queries in a row group: what the later steps hold in memory


class Fusion(Section):
    rrf_k: int = Field(60, ge=0, le=1_000_000)  # added to ranks; smaller ones favour first places
    top_k: int = Field(100, ge=1)  # candidates kept for a query


def write_candidates(build: Build, folder: Path) -> dict[str, Any]:
    """Write candidates.parquet into `folder`; returns the counts for the manifest."""
    documents, texts, query_ids = build.documents, list(build.queries.values()), pa.array(build.queries, pa.string())
    parts = ranges(len(documents), PART * -(-len(documents) // (PART * MAX_PARTS)))
    blocks = ranges(len(texts), SEARCH_BLOCK)
    sparse = search_bm25(
        build.recipe.bm25, documents, parts, texts, blocks, folder, build.engine, build.splits.language
    )
    vectors = (build.query_vectors, blocks, build.document_vectors, parts)
    dense = search_dense(build.recipe.dense, *vectors, folder, build.engine)
    warnings = warn_of_cut_texts(build.document_vectors, build.recipe.dense)
    warnings += warn_of_nothing_found(len(texts), bm25=sparse, dense=dense)
    own = own_documents(texts, documents) if build.symmetric else np.full(len(texts), -1)
    total, found_by = 0, {"bm25_only": 0, "dense_only": 0, "both": 0}
    with parquet_writer(folder / "candidates.parquet", CANDIDATES) as stream:
        for rows in ranges(len(texts), QUERY_BLOCK):
            fused = fuse(sparse[rows], dense[rows], own[rows.start : rows.stop], build.recipe.fusion)
            ids = {
                "query_id": query_ids.take(pa.array(fused["query"].to_numpy() + rows.start)),
                "document_id": take(build.document_ids, fused["document"].to_numpy()),
            }
            columns = {name: fused[name].to_arrow() for name in CANDIDATES.names[2:]}
            stream.write(pa.table({**ids, **columns}).cast(CANDIDATES))
            by_bm25, by_dense = (fused[name].is_not_null() for name in ("bm25_rank", "dense_rank"))
            total += len(fused)
            found_by["bm25_only"] += int((by_bm25 & ~by_dense).sum())
            found_by["dense_only"] += int((by_dense & ~by_bm25).sum())
            found_by["both"] += int((by_bm25 & by_dense).sum())
    share = {name: round(count / max(total, 1), 4) for name, count in found_by.items()}
    return {
        "queries": len(texts),
        "documents": len(documents),
        "candidates": total,
        "share": share,
        "queries_cut": build.query_vectors.count_cut,
        "documents_cut": build.document_vectors.count_cut,
        "warnings": warnings,
    }


def fuse(sparse: np.ndarray, dense: np.ndarray, own: np.ndarray, fusion: Fusion) -> pl.DataFrame:
    """Each query's candidates by `reciprocal_rank_fusion`, in order: query (its row), document (its position), and
    the columns of CANDIDATES after the ids; rank and score are null where that retriever did not return the document.

    sparse, dense: FOUND (queries, k), best first. own: (queries,) a document that is no candidate; -1: none.
    """
    lists = []
    for name, found in (("bm25", sparse), ("dense", dense)):
        kept = (found["document"] >= 0) & (found["document"] != own[:, None])
        columns = {
            "query": np.nonzero(kept)[0],
            "document": found["document"][kept],
            f"{name}_rank": np.cumsum(kept, axis=1)[kept],
            f"{name}_score": found["score"][kept],
        }
        lists.append(pl.DataFrame(columns))
    bm25, dense_part = ((1 / (fusion.rrf_k + pl.col(f"{name}_rank"))).fill_null(0.0) for name in ("bm25", "dense"))
    fused = (
        lists[0]
        .join(lists[1], on=["query", "document"], how="full", coalesce=True)
        .with_columns(rrf_score=bm25 + dense_part)
        .sort("query", "rrf_score", "document", descending=[False, True, False])
        .with_columns(rrf_rank=pl.int_range(1, pl.len() + 1).over("query"))
    )
    return fused.filter(pl.col("rrf_rank") <= fusion.top_k)


def own_documents(queries: Sequence[str], documents: TextColumn) -> np.ndarray:
    """The position of the document that is the query's own text, or -1."""
    places = {normalised(text): -1 for text in queries}
    for rows in ranges(len(documents), PART):
        for place, text in enumerate(documents[rows.start : rows.stop], start=rows.start):
            if (text := normalised(text)) in places:
                places[text] = place
    return np.array([places[normalised(text)] for text in queries])


def warn_of_nothing_found(queries: int, **rankings: Ranking) -> list[str]:
    """Print, and return, one line for each retriever that finds no document for more than half of the queries."""
    warnings = []
    for name, ranking in rankings.items():
        found = sum((ranking[rows]["document"][:, 0] >= 0).sum() for rows in ranges(queries, QUERY_BLOCK))
        if 2 * found < queries:
            warnings.append(f"{name} finds no document for {queries - found:,} of {queries:,} queries")
            print(f"warning: {warnings[-1]}; is source.language that of the texts?", file=sys.stderr, flush=True)
    return warnings
