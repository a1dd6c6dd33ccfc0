"""What must hold for any input of the pure functions, each against a plain way of saying the same."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import polars as pl
import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.cli import one_line
from common.recipes import load_yaml
from dataset_builders.calibration import calibrate
from dataset_builders.candidates import reciprocal_rank_fusion
from dataset_builders.near_duplicates import band_keys, text_keys
from dataset_builders.schema import LABEL_FLOOR
from eval.metrics import ranking_scores
from modeling.merging import linear, slerp
from modeling.prompts import few_shot_prompt, instruction_prompt
from modeling.recipe import _budgets
from modeling.student import whitened
from modeling.validation import search_sample

words = st.text(max_size=20)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)

# --- recipes and messages -------------------------------------------------------------------------------------------

# YAML folds Unicode's own line breaks, and PyYAML writes them as they are: its own reader makes spaces of them.
text = st.text(st.characters(exclude_characters="\x85\u2028\u2029", exclude_categories=["Cs"]))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_what_safe_dump_writes_load_yaml_reads(value):
    assert load_yaml(yaml.safe_dump(value, allow_unicode=True)) == value


@given(st.text())
def test_load_yaml_reads_what_safe_load_does_or_refuses(text):
    """Never another value, and never another exception than ValueError."""
    try:
        found = load_yaml(text)
    except ValueError:
        return
    assert repr(found) == repr(yaml.safe_load(text))


@given(st.text(max_size=300), st.integers(20, 100))
def test_a_message_is_one_printable_line(text, longest):
    line = one_line(text, longest)
    assert line.isprintable() and len(line) <= longest
    if text.isascii() and text.isprintable() and len(text) <= longest:
        assert line == " ".join(text.split())


# --- retrieval ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 9), unique=True, max_size=8), max_size=4), st.integers(0, 80))
def test_fusion_is_exact_and_does_not_know_the_order_of_the_retrievers(rankings, k):
    exact = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            exact[document] = exact.get(document, Fraction(0)) + Fraction(1, k + rank)
    fused = reciprocal_rank_fusion(rankings, k)
    assert {document for document, _ in fused} == exact.keys()
    assert all(math.isclose(score, exact[document]) for document, score in fused)
    for other in list(permutations(rankings))[:6]:
        again = dict(reciprocal_rank_fusion(other, k))
        assert all(math.isclose(again[document], score) for document, score in fused)


@given(st.lists(words, min_size=1, max_size=6), st.data())
def test_signatures_of_a_text_do_not_know_its_neighbours(texts, data):
    order = data.draw(st.permutations(range(len(texts))))
    rows, shuffled = (pl.Series([texts[row] for row in numbers]) for numbers in (range(len(texts)), order))
    assert text_keys(rows)[list(order)].equals(text_keys(shuffled))
    assert np.array_equal(band_keys(rows)[list(order)], band_keys(shuffled))


judged = st.lists(st.integers(0, 2), min_size=3, max_size=14).filter(any)


@settings(max_examples=40)
@given(judged, st.data())
def test_measures_by_hand(grades, data):
    """nDCG@10 with gain = grade, R@100 and RR of one query, by their definitions."""
    found = data.draw(st.permutations(range(len(grades))))[: data.draw(st.integers(0, len(grades)))]
    qrels = {"q": {f"d{row}": grade for row, grade in enumerate(grades)}}
    scores = ranking_scores(qrels, {"q": [f"d{row}" for row in found]})
    gains = [grades[row] for row in found]

    def dcg(values):
        return sum(value / math.log2(rank + 1) for rank, value in enumerate(values[:10], start=1))

    first = next((rank for rank, gain in enumerate(gains, start=1) if gain), math.inf)
    ndcg = dcg(gains) / dcg(sorted(grades, reverse=True))
    assert scores["nDCG@10"] == pytest.approx(ndcg, abs=6e-5)
    assert scores["R@100"] == pytest.approx(sum(map(bool, gains)) / sum(map(bool, grades)), abs=6e-5)
    assert scores["RR"] == pytest.approx(1 / first, abs=6e-5)
    assert scores["per_query"] == [pytest.approx(ndcg)]


# --- grades ---------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(
    hnp.arrays(np.float64, st.integers(2, 15), elements=st.integers(-50, 50).map(float)),
    hnp.arrays(np.float64, st.integers(2, 15), elements=st.integers(-50, 50).map(float)),
    st.floats(0.01, 100),
    st.floats(-1000, 1000),
)
def test_labels_do_not_know_the_teachers_unit(positives, others, scale, shift):
    assume(positives.mean() > others.mean() + 5)
    calibration, _ = calibrate(positives, others)
    moved, _ = calibrate(scale * positives + shift, scale * others + shift)
    scores = np.sort(np.concatenate([positives, others]))
    labels = calibration(scores)
    assert np.all(np.diff(labels) >= 0), "a higher score is never a lower label"
    assert labels.min() >= LABEL_FLOOR * 0.99 and labels.max() <= 1 - LABEL_FLOOR * 0.99
    np.testing.assert_allclose(moved(scale * scores + shift), labels, atol=1e-3)


# --- weights --------------------------------------------------------------------------------------------------------


tensors = st.lists(hnp.arrays(np.float64, 5, elements=st.floats(-5, 5)).map(torch.from_numpy), min_size=2, max_size=4)


@given(tensors, st.data())
def test_averages_lie_between_and_know_no_order(models, data):
    weights = data.draw(st.lists(st.floats(0.01, 10), min_size=len(models), max_size=len(models)))
    order = data.draw(st.permutations(range(len(models))))
    mean = linear(models, weights)
    torch.testing.assert_close(mean, torch.from_numpy(np.average(np.stack(models), axis=0, weights=weights)))
    torch.testing.assert_close(linear([models[i] for i in order], [weights[i] for i in order]), mean)
    stacked = torch.stack(models)
    assert bool(((mean >= stacked.amin(0) - 1e-9) & (mean <= stacked.amax(0) + 1e-9)).all())
    for method in (linear, slerp):
        torch.testing.assert_close(method([models[0], models[0]], weights[:2]), models[0])
    torch.testing.assert_close(linear([2 * model for model in models], weights), 2 * mean)


# --- training -------------------------------------------------------------------------------------------------------


@given(words, st.lists(st.tuples(words, words), max_size=4), words, words)
def test_prompts_grow_by_whole_demonstrations(task, shots, query, response):
    """One more is that one's block after the others', before the instruction: nothing else moves."""
    before, after = few_shot_prompt(task, shots), few_shot_prompt(task, [*shots, (query, response)])
    own = instruction_prompt(task)
    assert before.endswith(own)
    assert after == before.removesuffix(own) + f"{own}{query}\nResponse: {response}\n\n{own}"


@given(st.integers(1, 9), st.integers(0, 200))
def test_budgets_share_all_steps_out_evenly(count, more):
    stages = {f"s{number}": {} for number in range(count)}
    shares = [keys["max_steps"] for keys in _budgets(count + more, {}, stages).values()]
    assert sum(shares) == count + more and max(shares) - min(shares) <= 1
    assert shares == sorted(shares, reverse=True)


@settings(max_examples=40)
@given(
    relevant=st.dictionaries(
        st.integers(0, 12), st.sets(st.integers(0, 20), min_size=1, max_size=4), min_size=1, max_size=9
    ),
    queries=st.integers(1, 12),
    documents=st.integers(1, 25),
    seed=st.integers(0, 5),
)
def test_samples_of_searches_are_whole(relevant, queries, documents, seed):
    """Every query keeps all of its relevant documents, whatever the sizes asked for."""
    from datasets import Dataset

    pairs = [(query, document) for query, found in relevant.items() for document in found]
    sample = search_sample(
        Dataset.from_dict({"query_id": [f"q{i}" for i in range(13)], "text": [f"query {i}" for i in range(13)]}),
        Dataset.from_dict({"document_id": [f"d{i}" for i in range(21)], "text": [f"text {i}" for i in range(21)]}),
        [{"query_id": f"q{q}", "document_id": f"d{d}", "score": 1, "split": "validation"} for q, d in pairs],
        max_queries=queries,
        max_documents=documents,
        seed=seed,
    )
    assert len(sample.queries) == min(queries, len(relevant))
    for name in sample.queries:
        assert sample.relevant[name] == {f"d{document}" for document in relevant[int(name[1:])]}
        assert sample.relevant[name] <= sample.documents.keys()
    needed = set().union(*sample.relevant.values())
    assert len(sample.documents) == max(len(needed), min(documents, 21))
    assert all(text == f"text {name[1:]}" for name, text in sample.documents.items())


@settings(max_examples=40)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(1, 8), st.integers(0, 10**6))
def test_whitened_vectors_have_the_angles_of_mahalanobis(count, width, size, seed):
    vectors = np.random.default_rng(seed).normal(size=(count, width)) * 3.0 ** np.arange(width)
    found = whitened(vectors, size)
    assert found.shape == (count, size)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    if size >= width:
        centred = vectors - vectors.mean(axis=0)
        products = centred @ np.linalg.pinv(np.cov(centred.T, bias=True).reshape(width, width), rcond=1e-8) @ centred.T
        lengths = np.sqrt(np.diag(products))
        np.testing.assert_allclose(found @ found.T, products / np.outer(lengths, lengths), atol=1e-6)
