"""index.html of an ablation: the intervals, and the queries with which each variant wins or loses most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.pages import MOST_ROWS, Row, write_page
from eval.held_out import load_documents, load_queries
from eval.intervals import format_interval

SHOWN = 20  # queries that a variant wins, and as many that it loses; fewer where many variants share a page


def write_ablation_page(
    result: Mapping[str, Any], scores: Mapping[str, Mapping[int, Sequence[float]]], data: Path, output: Path
) -> None:
    """Write index.html beside ablation.png.

    scores: variant -> seed -> the measure of each query of the reported split, as `load_queries` orders them.
    """
    compared = [row for row in result["rows"] if row["difference"]]
    documents = load_documents(data)
    texts = dict(zip(documents.ids, documents.texts, strict=True))
    queries = load_queries(data, result["split"], set(texts))
    shown = min(SHOWN, MOST_ROWS // (2 * len(compared)))
    rows: list[Row] = []
    for row in compared:
        name, seeds = row["name"], row["difference"]["seeds"]
        before, after = (
            np.mean([scores[system][seed] for seed in seeds], axis=0) for system in (result["baseline"], name)
        )
        for place in most_changed(after - before, shown):
            change = after[place] - before[place]
            query_id = queries.ids[place]
            relevant = [document for document, grade in queries.qrels[query_id].items() if grade > 0]
            facts = f"{name}: {change:+.3f} ({result['baseline']} {before[place]:.3f}, mean of {len(seeds)} seeds)"
            lines = [{"relevant document": document, "text": texts[document]} for document in relevant]
            tags = [name, "won" if change > 0 else "lost"]
            rows.append(Row(title=queries.texts[place], facts=facts, tags=tags, documents=lines))
    differences = [
        f"{row['name']} {row['difference']['mean']:+.4f} "
        f"{format_interval(row['difference']['low'], row['difference']['high'], '+.4f')}".rstrip()
        for row in compared
    ]
    introduction = (
        f"{result['metric']} against {result['baseline']}, {len(queries.ids):,} queries of split {result['split']}, "
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
