"""Thresholds: probabilities of relevance, and precision and recall by plain counting."""

import numpy as np
import pytest
from scipy.special import expit

from eval.thresholds import relevance


def drawn(seed, count=300, a=9.0, b=-4.0):
    """Queries whose first 12 documents are relevant with probability sigmoid(a * cosine + b)."""
    rng = np.random.default_rng(seed)
    ids = [f"q{number}" for number in range(count)]
    ranking, qrels = {}, {}
    for query in ids:
        cosines = np.sort(rng.uniform(0.1, 0.9, 12))[::-1]
        ranking[query] = {f"d{place}": float(cosine) for place, cosine in enumerate(cosines)}
        qrels[query] = {f"d{place}": int(rng.random() < expit(a * cosine + b)) for place, cosine in enumerate(cosines)}
        qrels[query]["never found"] = 1
    return qrels, ranking


def test_constants_are_those_that_relevance_was_drawn_by_and_counts_are_plain():
    qrels, ranking = drawn(1)
    found = relevance(*drawn(0, count=2000), qrels, ranking)
    assert (found["a"], found["b"]) == (pytest.approx(9, rel=0.1), pytest.approx(-4, rel=0.1))
    assert found["queries"] == 2000 and len(found["table"]) > 10
    everything = sum(sum(grades.values()) for grades in qrels.values())
    for row in found["table"]:
        left = [
            qrels[query][document]
            for query in qrels
            for place, (document, cosine) in enumerate(ranking[query].items())
            if place < 10 and cosine >= row["cosine"] - 1e-9
        ]
        assert row["precision"] == pytest.approx(np.mean(left), abs=1e-4)
        assert row["recall"] == pytest.approx(sum(left) / everything, abs=1e-4)
    assert [row["recall"] for row in found["table"]] == sorted((row["recall"] for row in found["table"]), reverse=True)


def test_cosines_that_tell_nothing_give_no_thresholds():
    qrels, ranking = drawn(0, count=5)
    nothing = {query: {"never found": 1} for query in qrels}
    assert relevance(nothing, ranking, qrels, ranking) is None
    many, found = drawn(2, count=500)
    turned = {query: {document: -cosine for document, cosine in row.items()} for query, row in found.items()}
    assert relevance(many, found, qrels, ranking) and relevance(many, turned, qrels, ranking) is None
