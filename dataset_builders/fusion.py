"""Fusing the rankings of two retrievers: pure functions on the documents of one query, and on tables of many."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
import polars as pl
from pydantic import Field

from common.recipes import Section

Identifier = TypeVar("Identifier", bound=Hashable)
CUTOFF = 10  # of the nDCG that chooses a weight
WEIGHTS = np.linspace(0, 1, 21).round(2).tolist()
# BM25's share where no labelled positive can choose it: the best of four on docstrings, in the middle of a flat top.
DEFAULT_WEIGHT = 0.35
FEW = 30  # queries with a positive: on no more than these nothing is fitted
LOWEST = {"bm25": 0.0, "dense": -1.0}  # that a retriever's score can be


class Fusion(Section):
    """How two rankings become one. Both orders are computed and stored; `kind` says which one `top_k` cuts."""

    kind: Literal["rrf", "convex"] = "rrf"  # reciprocal ranks, the report's, or a weighted sum of scores
    rrf_k: int = Field(60, ge=0, le=1_000_000)  # added to ranks; smaller ones favour first places
    weight: float | None = Field(None, ge=0, le=1)  # BM25's in the sum; null: the training split chooses
    norm: Literal["min_max", "theoretical_min"] = "min_max"  # what becomes 0: the lowest score found, or possible
    # 100 of two lists of 100 lost up to a sixth of the recall.
    top_k: int | None = Field(None, ge=1)  # candidates kept, labelled positives besides; null: all that were found


def reciprocal_rank_fusion(
    rankings: Sequence[Sequence[Identifier]], k: int = 60, top_k: int | None = None
) -> list[tuple[Identifier, float]]:
    """(document, score) best first, score = sum over rankings of 1 / (k + rank), rank from 1; ties by document id.

    Source: Cormack, Clarke and Buettcher, SIGIR 2009.

    >>> reciprocal_rank_fusion([["a", "b"], ["b", "c"]], k=1)
    [('b', 0.8333333333333333), ('a', 0.5), ('c', 0.3333333333333333)]
    """
    scores: dict[Identifier, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            scores[document] = scores.get(document, 0.0) + 1 / (k + rank)
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_k]


def convex_fusion(
    sparse: Mapping[Identifier, float], dense: Mapping[Identifier, float], weight: float, top_k: int | None = None
) -> list[tuple[Identifier, float]]:
    """(document, score) best first, score = weight * sparse + (1 - weight) * dense, both min-max normalised.

    A document that one retriever did not find gets 0 from it; ties by document id.

    Args:
        sparse: retrieved documents and their scores, of any range.
        dense: the same by the other retriever.
        weight: of `sparse`, in [0, 1].

    Source: Bruch, Gai and Ingber, ACM TOIS 42(1), 2023 (arXiv 2210.11934).

    >>> convex_fusion({"a": 9.0, "b": 5.0, "c": 1.0}, {"b": 0.9, "d": 0.7}, weight=0.5)
    [('b', 0.75), ('a', 0.5), ('c', 0.0), ('d', 0.0)]
    """
    scores: dict[Identifier, float] = {}
    for found, share in ((sparse, weight), (dense, 1 - weight)):
        low, high = min(found.values(), default=0.0), max(found.values(), default=0.0)
        for document, score in found.items():
            normalised = (score - low) / (high - low) if high > low else 1.0
            scores[document] = scores.get(document, 0.0) + share * normalised
    return sorted(scores.items(), key=lambda item: (-item[1], item[0]))[:top_k]


def normalised_score(retriever: Literal["bm25", "dense"], norm: str) -> pl.Expr:
    """The retriever's score in [0, 1] among the documents of a `query`, as in `convex_fusion`.

    `theoretical_min` takes the lowest score that there can be (0, and a cosine of -1) for the lowest that was found.
    """
    score = pl.col(f"{retriever}_score").cast(pl.Float64)
    low = score.min().over("query") if norm == "min_max" else pl.lit(LOWEST[retriever])
    spread = score.max().over("query") - low
    return pl.when(score.is_null()).then(0.0).when(spread > 0).then((score - low) / spread).otherwise(1.0)


def best_weight(fused: pl.DataFrame, gains: pl.DataFrame) -> float:
    """The one of WEIGHTS, BM25's share of the convex sum, with the best mean nDCG@10; of equal ones the middle.

    fused: query, document, `bm25` and `dense` (normalised scores). gains: query, document, gain (above 0).
    DEFAULT_WEIGHT where no weight finds a relevant document.
    """

    def discounted(table: pl.DataFrame, score: pl.Expr) -> pl.DataFrame:
        place = pl.int_range(1, pl.len() + 1).over("query")
        best = table.sort("query", score, "document", descending=[False, True, False]).filter(place <= CUTOFF)
        return best.group_by("query").agg((pl.col("gain") / (pl.int_range(2, pl.len() + 2)).log(2)).sum())

    ideal = discounted(gains, pl.col("gain")).rename({"gain": "ideal"})
    table = fused.join(gains, on=["query", "document"], how="left").with_columns(pl.col("gain").fill_null(0))
    means = []
    for weight in WEIGHTS:
        found = discounted(table, weight * pl.col("bm25") + (1 - weight) * pl.col("dense"))
        means.append(round(found.join(ideal, on="query").select((pl.col("gain") / pl.col("ideal")).sum()).item(), 9))
    chosen = np.flatnonzero(np.array(means) == max(means))
    return WEIGHTS[chosen[len(chosen) // 2]] if max(means) > 0 else DEFAULT_WEIGHT
