"""Which queries one system wins and loses against another, with what was found for them: pages to look at."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import MOST_ROWS, Row, evenly, write_page
from eval.held_out import HeldOut, Ranking
from eval.intervals import format_mean

SHOWN = 3  # of each system's first documents, beside the relevant ones
CLOSE = 0.01  # nDCG@10: less is no difference
MOST_CHANGED = 20  # queries that a variant wins, and as many that it loses; fewer where many variants share a page


def write_queries_page(path: Path, asked: HeldOut, systems: Mapping[str, tuple[Ranking, Sequence[float]]]) -> None:
    """queries.html of eval.retrieval: queries by how much the second of two systems gains over the first, the worst
    first.

    systems: by name the ranking, and nDCG@10 of each query in the order of `asked.queries`.
    """
    (first, (_, before)), (second, (_, after)) = systems.items()
    changes = [later - earlier for earlier, later in zip(before, after, strict=True)]
    ids = list(asked.queries)
    order = sorted(range(len(ids)), key=changes.__getitem__)
    rows = []
    for place in (order[number] for number in evenly(len(order))):
        query_id = ids[place]
        relevant = asked.relevant(query_id)
        found = {name: list(ranking.get(query_id, {})) for name, (ranking, _) in systems.items()}
        shown = dict.fromkeys([*relevant, *found[first][:SHOWN], *found[second][:SHOWN]])
        lines = [
            {
                "document": document,
                "relevant": "yes" if document in relevant else "",
                **{name: _rank(document, ranked) for name, ranked in found.items()},
                "text": asked.documents[document],
            }
            for document in shown
        ]
        scores = {first: before[place], second: after[place]}
        tags = [_outcome(changes[place]), *(f"missed by {name}" for name, score in scores.items() if score == 0)]
        facts = "nDCG@10 " + ", ".join(f"{name} {score:.3f}" for name, score in scores.items())
        rows.append(Row(title=asked.queries[query_id], facts=facts, tags=tags, documents=lines))
    below = "" if len(order) <= MOST_ROWS else f"; {MOST_ROWS:,} of them are below, evenly spread"
    counts = Counter(map(_outcome, changes))
    introduction = (
        f"{len(order):,} queries of split {asked.split}{below}. {second} against {first}: lost {counts['lost']:,}, "
        f"won {counts['won']:,}, equal {counts['equal']:,} (nDCG@10 within {CLOSE}); the worst losses come first. "
        "Missed: no relevant document among the first 10."
    )
    write_page(path, f"{second} against {first}", introduction, {}, rows)


def _outcome(change: float) -> str:
    return "equal" if abs(change) < CLOSE else "won" if change > 0 else "lost"


def _rank(document: str, ranked: Sequence[str]) -> str:
    return str(ranked.index(document) + 1) if document in ranked else "-"


def write_ablation_page(
    result: Mapping[str, Any], scores: Mapping[str, Mapping[int, Sequence[float]]], asked: HeldOut, output: Path
) -> None:
    """index.html of eval.ablate, beside ablation.png: the queries that each variant wins and loses most.

    scores: variant -> seed -> the measure of each query of the reported split, in the order of `asked.queries`.
    """
    compared = [row for row in result["rows"] if row["difference"]]
    ids, baseline = list(asked.queries), result["baseline"]
    shown = min(MOST_CHANGED, MOST_ROWS // (2 * len(compared)))
    rows, differences = [], []
    for row in compared:
        name, seeds = row["name"], row["difference"]["seeds"]
        before, after = (np.mean([scores[system][seed] for seed in seeds], axis=0) for system in (baseline, name))
        differences.append(f"{name} {format_mean(row['difference'], '+.4f')}")
        for place in most_changed(after - before, shown):
            change = after[place] - before[place]
            facts = f"{name}: {change:+.3f} ({baseline} {before[place]:.3f}, mean of {len(seeds)} seeds)"
            relevant = asked.relevant(ids[place])
            lines = [{"relevant document": document, "text": asked.documents[document]} for document in relevant]
            tags = [name, "won" if change > 0 else "lost"]
            rows.append(Row(title=asked.queries[ids[place]], facts=facts, tags=tags, documents=lines))
    introduction = (
        f"{result['metric']} against {baseline}, {len(ids):,} queries of split {result['split']}, "
        f"with {result['interval']['level']:.0%} intervals: {'; '.join(differences)}. Below, for each variant, the "
        f"queries that it loses most and wins most, at most {shown} of each, over the mean of its seeds."
    )
    pictures = {"Differences with their intervals": output / "ablation.png"}
    write_page(output / "index.html", f"Ablation: {Path(result['config']).stem}", introduction, pictures, rows)


def most_changed(change: np.ndarray, most: int) -> list[int]:
    """Places of the `most` lowest below 0, the lowest first, and of the `most` highest above 0, the highest first.

    >>> most_changed(np.array([0.1, -0.3, 0.0, 0.4, -0.1, 0.2]), 2)
    [1, 4, 3, 5]
    """
    order = np.argsort(change, kind="stable")
    lost, won = order[:most], order[::-1][:most]
    return [*lost[change[lost] < 0].tolist(), *won[change[won] > 0].tolist()]
