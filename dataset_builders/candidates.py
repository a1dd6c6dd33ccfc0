"""corpus/ -> candidates/: for each query the best documents by BM25 and by a dense encoder, fused by rank.

Both searches go part by part through the corpus, for a block of queries at a time: memory grows with neither, and
the parts' best documents merge into the whole's. Ties go to the smaller document id, so a build does not depend on
the machine's luck.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import Field

from common.recipes import Section
from common.steps import ParquetStream
from dataset_builders.bm25 import search_bm25
from dataset_builders.build_record import Build
from dataset_builders.columns import TextColumn, take
from dataset_builders.dense import search_dense
from dataset_builders.engines import Shards
from dataset_builders.fusion import reciprocal_rank_fusion
from dataset_builders.hits import NONE, merge_keys, positions_and_scores
from dataset_builders.near_duplicates import normalised
from dataset_builders.schema import CANDIDATES

PART = 65_536  # documents searched at a time, at least: 100 MB of vectors of 384 dimensions
MAX_PARTS = 64  # of a larger corpus; each keeps its own best documents for every query until they are merged
SEARCH_BLOCK = 8192  # queries that one search of a part answers
QUERY_BLOCK = 1024  # queries in a row group: what the later steps hold in memory


class Fusion(Section):
    rrf_k: int = Field(60, ge=0, le=1_000_000)
    top_k: int = Field(100, ge=1)


def write_candidates(build: Build, folder: Path) -> dict[str, Any]:
    """Write candidates.parquet into `folder`; returns the counts for the manifest."""
    bm25, dense, fusion = build.recipe.bm25, build.recipe.dense, build.recipe.fusion
    documents, query_ids, texts = build.documents, list(build.queries), list(build.queries.values())
    parts = _ranges(len(documents), PART * -(-len(documents) // (PART * MAX_PARTS)))
    blocks = _ranges(len(texts), SEARCH_BLOCK)
    sparse = search_bm25(bm25, documents, parts, texts, blocks, folder, build.engine)
    found = search_dense(dense, build.query_vectors, blocks, build.document_vectors, parts, folder, build.engine)
    counts = {"bm25_only": 0, "dense_only": 0, "both": 0}
    own = _own_documents(texts, documents) if build.symmetric else np.full(len(texts), -1)
    with ParquetStream(folder / "candidates.parquet", CANDIDATES) as stream:
        for rows in _ranges(len(texts), QUERY_BLOCK):
            hits = [
                _merged(shards, rows, len(parts), section.top_k)
                for shards, section in ((sparse, bm25), (found, dense))
            ]
            part = slice(rows.start, rows.stop)
            table = _fuse(*hits, own[part], fusion, query_ids[part], build.document_ids)
            stream.write(table)
            _count(table, counts)
    total = sum(counts.values())
    share = {name: round(count / max(total, 1), 4) for name, count in counts.items()}
    return {"queries": len(texts), "documents": len(documents), "candidates": total, "share": share}


def _ranges(count: int, size: int) -> list[range]:
    return [range(start, min(start + size, count)) for start in range(0, count, size)]


def _own_documents(queries: Sequence[str], documents: TextColumn) -> np.ndarray:
    """The position of the document that is the query's own text, or -1."""
    places = {normalised(text): -1 for text in queries}
    for rows in _ranges(len(documents), PART):
        for place, text in enumerate(documents[rows.start : rows.stop], start=rows.start):
            if (text := normalised(text)) in places:
                places[text] = place
    return np.array([places[normalised(text)] for text in queries])


def _merged(shards: Shards, rows: range, parts: int, top_k: int) -> np.ndarray:
    """(queries, up to top_k) keys over the whole corpus, for some queries of one search block."""
    block, start = divmod(rows.start, SEARCH_BLOCK)
    return merge_keys([shards[block * parts + part][start : start + len(rows)] for part in range(parts)], top_k)


def _fuse(
    sparse: np.ndarray,
    dense: np.ndarray,
    own: np.ndarray,
    fusion: Fusion,
    query_ids: list[str],
    document_ids: pa.ChunkedArray,
) -> pa.Table:
    """The candidates of some queries, best first, from their keys by each retriever."""
    fused = [_fused_query(*query, fusion) for query in zip(sparse, dense, own.tolist(), strict=True)]
    counts = [len(positions) for positions, _ in fused]
    positions = np.concatenate([positions for positions, _ in fused])
    columns = np.concatenate([columns for _, columns in fused])
    table = {
        "query_id": pa.array(query_ids).take(np.repeat(np.arange(len(query_ids)), counts)),
        "document_id": take(document_ids, positions),
        **{name: pa.array(columns[name], mask=np.isnan(columns[name])) for name in columns.dtype.names},
    }
    return pa.table(table).select(CANDIDATES.names).cast(CANDIDATES)


def _count(table: pa.Table, counts: dict[str, int]) -> None:
    by_bm25, by_dense = (table[f"{name}_rank"].is_valid().to_numpy() for name in ("bm25", "dense"))
    counts["bm25_only"] += int((by_bm25 & ~by_dense).sum())
    counts["dense_only"] += int((by_dense & ~by_bm25).sum())
    counts["both"] += int((by_bm25 & by_dense).sum())


_FUSED = np.dtype([(name, np.float64) for name in CANDIDATES.names[2:]])


def _fused_query(sparse: np.ndarray, dense: np.ndarray, own: int, fusion: Fusion) -> tuple[np.ndarray, np.ndarray]:
    """Document positions by falling RRF score, and their ranks and scores (NaN: not retrieved)."""
    retrieved = []
    for keys in (sparse, dense):
        positions, scores = positions_and_scores(keys[keys != NONE])
        retrieved.append((positions[positions != own], scores[positions != own]))
    fused = reciprocal_rank_fusion([positions.tolist() for positions, _ in retrieved], fusion.rrf_k, fusion.top_k)
    columns = np.full(len(fused), np.nan, _FUSED)
    place = {position: index for index, (position, _) in enumerate(fused)}
    for name, (positions, scores) in zip(("bm25", "dense"), retrieved, strict=True):
        kept = [(place[position], rank) for rank, position in enumerate(positions.tolist()) if position in place]
        if kept:
            places, ranks = np.array(kept).T
            columns[f"{name}_rank"][places] = ranks + 1
            columns[f"{name}_score"][places] = scores[ranks]
    columns["rrf_score"] = [score for _, score in fused]
    columns["rrf_rank"] = np.arange(1, len(fused) + 1)
    return np.array(list(place), np.int64), columns
