"""Fusing the rankings of several retrievers: pure functions on the documents of one query."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Identifier = TypeVar("Identifier", bound=Hashable)


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
