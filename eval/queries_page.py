"""queries.html: which queries one system wins over another, and what both found for them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from common.pages import MOST_ROWS, Row, evenly, write_page
from eval.held_out import Documents, Queries, Ranking

SHOWN = 3  # of each system's first documents, beside the relevant ones
CLOSE = 0.01  # nDCG@10: less is no difference


def write_queries_page(
    path: Path,
    documents: Documents,
    queries: Queries,
    names: tuple[str, str],
    rankings: tuple[Ranking, Ranking],
    scores: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Write `path`: queries by how much the second of two systems gains over the first, the worst first.

    scores: nDCG@10 of each query, in the order of `queries`.
    """
    texts = dict(zip(documents.ids, documents.texts, strict=True))
    order = sorted(range(len(queries.ids)), key=lambda place: scores[1][place] - scores[0][place])
    rows: list[Row] = []
    for place in (order[number] for number in evenly(len(order))):
        query_id = queries.ids[place]
        found = [list(ranking.get(query_id, {})) for ranking in rankings]
        relevant = [document for document, grade in queries.qrels[query_id].items() if grade > 0]
        shown = dict.fromkeys([*relevant, *found[0][:SHOWN], *found[1][:SHOWN]])
        lines = [
            {
                "document": document,
                "relevant": "yes" if document in relevant else "",
                **{name: _rank(document, ranked) for name, ranked in zip(names, found, strict=True)},
                "text": texts[document],
            }
            for document in shown
        ]
        first, second = (score[place] for score in scores)
        missed = {f"missed by {name}": score == 0 for name, score in zip(names, (first, second), strict=True)}
        tags = [_outcome(first, second), *(tag for tag, holds in missed.items() if holds)]
        facts = f"nDCG@10 {names[0]} {first:.3f}, {names[1]} {second:.3f}"
        rows.append(Row(title=queries.texts[place], facts=facts, tags=tags, documents=lines))
    shown = "" if len(order) <= MOST_ROWS else f"; {MOST_ROWS:,} of them are below, evenly spread"
    counts = Counter(_outcome(*pair) for pair in zip(*scores, strict=True))
    introduction = (
        f"{len(order):,} queries of split {queries.split}{shown}. "
        f"{names[1]} against {names[0]}: lost {counts['lost']:,}, "
        f"won {counts['won']:,}, equal {counts['equal']:,} (nDCG@10 within {CLOSE}); the worst losses come first. "
        "Missed: no relevant document among the first 10."
    )
    write_page(path, f"{names[1]} against {names[0]}", introduction, {}, rows)


def _outcome(first: float, second: float) -> str:
    return "equal" if abs(second - first) < CLOSE else "won" if second > first else "lost"


def _rank(document: str, ranked: Sequence[str]) -> str:
    return str(ranked.index(document) + 1) if document in ranked else "-"
