"""From a cosine to a probability of relevance, and what is lost where one cuts: fitted on validation queries.

A document is shown to a searcher because it is among the first; whether it is relevant depends on its cosine. So the
logistic regression is fitted on the first 10 documents of each validation query, as often relevant as they are, and
the table of thresholds is of the evaluated queries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from eval.held_out import Queries

FIRST = 10  # documents of a query
STEP = 0.05  # between thresholds


def relevance(
    validation: Queries, found: Mapping[str, Mapping[str, float]], queries: Queries, ranking: Mapping[str, Mapping]
) -> dict[str, Any] | None:
    """{"a", "b", "queries", "table"}: P(relevant) = sigmoid(a * cosine + b) among a query's first 10 documents.

    found, ranking: cosines by document of each query of `validation` and of `queries`, best first. None where all or
    none of the validation's documents are relevant, or cosines do not tell which.
    """
    from sklearn.linear_model import LogisticRegression

    pairs = [pair for shown in first_documents(validation, found) for pair in shown]
    cosines, is_relevant = np.array(pairs, np.float64).reshape(-1, 2).T
    if len(set(is_relevant)) < 2 or not (spread := cosines.std()):
        return None
    fit = LogisticRegression().fit(((cosines - cosines.mean()) / spread)[:, None], is_relevant)
    a = float(fit.coef_[0, 0] / spread)
    if a <= 0:
        return None
    b = float(fit.intercept_[0] - a * cosines.mean())
    table = thresholds(list(first_documents(queries, ranking)), relevant_documents(queries))
    return {"a": round(a, 4), "b": round(b, 4), "queries": len(validation.ids), "table": table}


def first_documents(
    queries: Queries, ranking: Mapping[str, Mapping[str, float]]
) -> Iterator[list[tuple[float, bool]]]:
    """Of each query: cosine, and whether it is relevant, of its first 10 documents."""
    for query_id in queries.ids:
        grades = queries.qrels[query_id]
        yield [(cosine, grades.get(document, 0) > 0) for document, cosine in list(ranking[query_id].items())[:FIRST]]


def relevant_documents(queries: Queries) -> int:
    return sum(grade > 0 for grades in queries.qrels.values() for grade in grades.values())


def thresholds(shown: Sequence[Sequence[tuple[float, bool]]], relevant: int) -> list[dict[str, float]]:
    """For each cosine to cut at: precision of what is left, recall of all `relevant` documents, and the share of
    queries that are left with any document.

    >>> thresholds([[(0.52, True), (0.4, False)], [(0.44, False)]], relevant=2)[-1]
    {'cosine': 0.5, 'precision': 1.0, 'recall': 0.5, 'answered': 0.5}
    """
    pairs = np.array([pair for query in shown for pair in query], np.float64).reshape(-1, 2)
    best = np.array([max((cosine for cosine, _ in query), default=-1.0) for query in shown])
    table = []
    for step in range(int(np.ceil(pairs[:, 0].min() / STEP)), int(np.floor(pairs[:, 0].max() / STEP)) + 1):
        left = pairs[pairs[:, 0] >= step * STEP]
        table.append(
            {
                "cosine": round(step * STEP, 2),
                "precision": round(float(left[:, 1].mean()), 4),
                "recall": round(float(left[:, 1].sum() / relevant), 4),
                "answered": round(float((best >= step * STEP).mean()), 4),
            }
        )
    return table
