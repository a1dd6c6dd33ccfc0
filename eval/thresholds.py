"""From a cosine to a probability of relevance, and what is lost where one cuts: fitted on validation queries.

A document is shown to a searcher because it is among the first; whether it is relevant depends on its cosine. So the
logistic regression is fitted on the first 10 documents of each validation query, as often relevant as they are, and
the table of thresholds is of the evaluated queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

FIRST = 10  # documents of a query
STEP = 0.05  # between thresholds

Qrels = Mapping[str, Mapping[str, int]]
Shown = list[tuple[float, bool]]  # cosine, and whether it is relevant, of a query's first documents


def relevance(
    validation: Qrels, found: Mapping[str, Mapping[str, float]], qrels: Qrels, ranking: Mapping[str, Mapping]
) -> dict[str, Any] | None:
    """{"a", "b", "queries", "table"}: P(relevant) = sigmoid(a * cosine + b) among a query's first 10 documents.

    found, ranking: cosines by document of each query of `validation` and of `qrels`, best first. None where all or
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
    relevant = sum(grade > 0 for grades in qrels.values() for grade in grades.values())
    table = thresholds(first_documents(qrels, ranking), relevant)
    return {"a": round(a, 4), "b": round(b, 4), "queries": len(validation), "table": table}


def first_documents(qrels: Qrels, ranking: Mapping[str, Mapping[str, float]]) -> list[Shown]:
    return [
        [(cosine, grades.get(document, 0) > 0) for document, cosine in islice(ranking[query_id].items(), FIRST)]
        for query_id, grades in qrels.items()
    ]


def thresholds(shown: Sequence[Shown], relevant: int) -> list[dict[str, float]]:
    """For each cosine to cut at: precision of what is left, recall of all `relevant` documents, and the share of
    queries that are left with any document.

    >>> thresholds([[(0.52, True), (0.4, False)], [(0.44, False)]], relevant=2)[-1]
    {'cosine': 0.5, 'precision': 1.0, 'recall': 0.5, 'answered': 0.5}
    """
    pairs = np.array([pair for query in shown for pair in query], np.float64).reshape(-1, 2)
    best = np.array([max((cosine for cosine, _ in query), default=-1.0) for query in shown])
    table = []
    for step in range(int(np.ceil(pairs[:, 0].min() / STEP)), int(np.floor(pairs[:, 0].max() / STEP)) + 1):
        left = pairs[pairs[:, 0] >= step * STEP, 1]
        shares = {"precision": left.mean(), "recall": left.sum() / relevant, "answered": (best >= step * STEP).mean()}
        rounded = {name: round(float(share), 4) for name, share in shares.items()}
        table.append({"cosine": round(step * STEP, 2), **rounded})
    return table
