"""corpus/ -> candidates/: for each query the best documents by BM25 and by a dense encoder, fused by rank."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from common.steps import parquet_writer, write_parquet
from dataset_builders.bm25 import search_bm25
from dataset_builders.build_record import Build
from dataset_builders.columns import take
from dataset_builders.dense import search_dense
from dataset_builders.embeddings import warn_of_cut_texts
from dataset_builders.fusion import DEFAULT_WEIGHT, FEW, Fusion, best_weight, normalised_score
from dataset_builders.fusion import reciprocal_rank_fusion as reciprocal_rank_fusion  # imported from here outside
from dataset_builders.near_duplicates import normalised
from dataset_builders.schema import CANDIDATES, OWN
from dataset_builders.top_k import Ranking, ranges

PART = 65_536  # documents searched at a time, at least: 100 MB of vectors of 384 dimensions
MAX_PARTS = 64  # of a larger corpus; each keeps its own best documents for every query until they are merged
SEARCH_BLOCK = 8192  # queries that one search of a part answers
QUERY_BLOCK = 1024  # queries in a row group: what the later steps hold in memory
FITTED = 1000  # queries that choose the weight of the convex sum, at most


def write_candidates(build: Build, folder: Path) -> dict[str, Any]:
    """Write candidates.parquet and own.parquet into `folder`; returns the counts for the manifest."""
    documents, texts, query_ids = build.documents, list(build.queries.values()), pa.array(build.queries, pa.string())
    fusion = build.recipe.fusion
    parts = ranges(len(documents), PART * -(-len(documents) // (PART * MAX_PARTS)))
    blocks = ranges(len(texts), SEARCH_BLOCK)
    sparse = search_bm25(
        build.recipe.bm25, documents, parts, texts, blocks, folder, build.engine, build.splits.language
    )
    vectors = (build.query_vectors, blocks, build.document_vectors, parts)
    dense = search_dense(build.recipe.dense, *vectors, folder, build.engine)
    warnings = warn_of_cut_texts(build.document_vectors, build.recipe.dense)
    warnings += warn_of_nothing_found(len(texts), bm25=sparse, dense=dense)
    own = own_documents(build)
    write_parquet(folder / "own.parquet", _ids_of(own, query_ids, build.document_ids))
    weight = fusion.weight if fusion.weight is not None else fitted_weight(build, sparse, dense, own)
    trained = build.positives.filter(pl.col("split") == build.splits.split).select("query", "document")
    total, found_by = 0, {"bm25_only": 0, "dense_only": 0, "both": 0}
    with parquet_writer(folder / "candidates.parquet", CANDIDATES) as stream:
        for rows in ranges(len(texts), QUERY_BLOCK):
            known = trained.filter(pl.col("query").is_between(rows.start, rows.stop - 1))
            known = known.with_columns(pl.col("query") - rows.start)
            fused = fuse(sparse[rows], dense[rows], own[rows.start : rows.stop], fusion, weight, known)
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
        "queries_with_own_document": int((own >= 0).any(axis=1).sum()),
        "bm25_weight": weight,
        "queries_cut": build.query_vectors.count_cut,
        "documents_cut": build.document_vectors.count_cut,
        "warnings": warnings,
    }


def fuse(
    sparse: np.ndarray,
    dense: np.ndarray,
    own: np.ndarray,
    fusion: Fusion,
    weight: float,
    positives: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """Each query's candidates, best first by `fusion.kind`: query (its row), document (its position), and the columns
    of CANDIDATES after the ids; rank and score are null where that retriever did not return the document.

    sparse, dense: FOUND (queries, k), best first. own: (queries, n) documents that are no candidates; -1: none.
    weight: BM25's, in the convex sum. positives: query, document. Where they fill more than half of `fusion.top_k`, as
    dozens of them do, candidates are kept down to half as many others: there would be no negatives else.
    """
    bm25, by_rank = ((1 / (fusion.rrf_k + pl.col(f"{name}_rank"))).fill_null(0.0) for name in ("bm25", "dense"))
    table = merged(sparse, dense, own).with_columns(
        rrf_score=bm25 + by_rank,
        convex_score=weight * normalised_score("bm25", fusion.norm)
        + (1 - weight) * normalised_score("dense", fusion.norm),
    )
    for name in ("rrf", "convex"):
        table = table.sort("query", f"{name}_score", "document", descending=[False, True, False])
        table = table.with_columns(pl.int_range(1, pl.len() + 1).over("query").alias(f"{name}_rank"))
    rank = f"{fusion.kind}_rank"
    table = table.sort("query", rank)
    if fusion.top_k is None:
        return table
    if positives is None:
        return table.filter(pl.col(rank) <= fusion.top_k)
    known = positives.select("query", "document", is_other=pl.lit(False))
    table = table.join(known, on=["query", "document"], how="left", maintain_order="left")
    is_other = pl.col("is_other").fill_null(True)
    is_needed = is_other & (is_other.cum_sum().over("query") <= fusion.top_k // 2)
    depth = pl.max_horizontal(pl.lit(fusion.top_k), pl.col(rank).filter(is_needed).max().over("query"))
    return table.filter(pl.col(rank) <= depth).drop("is_other")


def merged(sparse: np.ndarray, dense: np.ndarray, own: np.ndarray) -> pl.DataFrame:
    """All that either retriever found but `own`: query, document, and rank and score of each (null: not found)."""
    lists = []
    for name, found in (("bm25", sparse), ("dense", dense)):
        kept = (found["document"] >= 0) & (found["document"][:, :, None] != own[:, None]).all(axis=2)
        columns = {
            "query": np.nonzero(kept)[0],
            "document": found["document"][kept],
            f"{name}_rank": np.cumsum(kept, axis=1)[kept],
            f"{name}_score": found["score"][kept],
        }
        lists.append(pl.DataFrame(columns))
    return lists[0].join(lists[1], on=["query", "document"], how="full", coalesce=True)


def fitted_weight(build: Build, sparse: Ranking, dense: Ranking, own: np.ndarray) -> float:
    """BM25's weight with the best nDCG@10 on FITTED queries, evenly spread, of the split that is trained on."""
    gains = build.positives.filter(pl.col("split") == build.splits.split)
    rows = gains["query"].unique().sort().to_numpy()
    if len(rows) <= FEW:
        return DEFAULT_WEIGHT
    rows = rows[:: -(-len(rows) // FITTED)]
    norm = build.recipe.fusion.norm
    tables = []
    for block in ranges(len(build.queries), QUERY_BLOCK):
        here = rows[(rows >= block.start) & (rows < block.stop)] - block.start
        table = merged(sparse[block][here], dense[block][here], own[block.start : block.stop][here])
        tables.append(table.with_columns(query=pl.Series(block.start + here[table["query"].to_numpy()])))
    table = pl.concat(tables).with_columns(bm25=normalised_score("bm25", norm), dense=normalised_score("dense", norm))
    return best_weight(table, gains.filter(pl.col("query").is_in(rows)).select("query", "document", "gain"))


def own_documents(build: Build) -> np.ndarray:
    """(queries, 2) positions of the documents that are a query's own text, -1 for none: one with an equal text, and
    one under the query's id that holds its text (behind a title, say).

    What ignore_identical_ids is in BEIR and mteb, decided by the data: equal ids alone mean nothing where queries and
    documents are numbered each on their own. A labelled positive is never a query's own text.
    """
    import pyarrow.compute as pc  # slow to import: --help needs none

    texts = [normalised(text) for text in build.queries.values()]
    places = dict.fromkeys(texts, -1)
    for rows in ranges(len(build.documents), PART):
        for place, text in enumerate(build.documents[rows.start : rows.stop], start=rows.start):
            if (text := normalised(text)) in places:
                places[text] = place
    own = np.stack([[places[text] for text in texts], np.full(len(texts), -1)], axis=1)
    of_query = pc.index_in(build.document_ids, pa.array(build.queries, pa.string())).to_numpy()
    same_id = np.flatnonzero(~np.isnan(of_query))
    for place, text in zip(same_id, build.documents[same_id], strict=True):
        query = int(of_query[place])
        if texts[query] in normalised(text):
            own[query, 1] = place
    with_own = np.flatnonzero((own >= 0).any(axis=1))
    labelled = build.positives.filter(pl.col("query").is_in(with_own)).select("query", "document")
    for query, place in labelled.iter_rows():
        own[query, own[query] == place] = -1
    return own


def _ids_of(own: np.ndarray, query_ids: pa.Array, document_ids: pa.ChunkedArray) -> pa.Table:
    rows, columns = np.nonzero(own >= 0)
    return pa.table([query_ids.take(pa.array(rows)), take(document_ids, own[rows, columns])], schema=OWN)


def warn_of_nothing_found(queries: int, **rankings: Ranking) -> list[str]:
    """Print, and return, one line for each retriever that finds no document for more than half of the queries."""
    warnings = []
    for name, ranking in rankings.items():
        found = sum((ranking[rows]["document"][:, 0] >= 0).sum() for rows in ranges(queries, QUERY_BLOCK))
        if 2 * found < queries:
            warnings.append(f"{name} finds no document for {queries - found:,} of {queries:,} queries")
            print(f"warning: {warnings[-1]}; is source.language that of the texts?", file=sys.stderr, flush=True)
    return warnings
