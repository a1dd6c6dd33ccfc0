import itertools
import re

import numpy as np
import polars as pl
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import WORDS

from dataset_builders import near_duplicates
from dataset_builders.near_duplicates import (
    BANDS,
    ROWS,
    band_keys,
    jaccard,
    near_duplicate_groups,
    near_matches,
    shingles,
    text_keys,
)

SENTENCE = (
    "Return the sorted list of all names that were defined in the given module, oldest first and without copies."
)
words = st.lists(st.sampled_from(WORDS[:6]), max_size=6).map(" ".join)


def series(texts: list[str]) -> pl.Series:
    return pl.Series("text", texts, dtype=pl.String)


def grams(text: str) -> set[str]:
    text = " ".join(re.findall(r"\w+", text.casefold()))
    return {text[start : start + 5] for start in range(len(text) - 4)}


def similarity(one: str, other: str) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


def groups_by_brute_force(texts: list[str]) -> set[frozenset[int]]:
    groups = {frozenset((row,)) for row in range(len(texts))}
    sets = [grams(text) for text in texts]
    for one, other in itertools.combinations(range(len(texts)), 2):
        if len(sets[one] & sets[other]) / len(sets[one] | sets[other]) >= 0.8:
            joined = [group for group in groups if {one, other} & group]
            groups = groups.difference(joined) | {frozenset().union(*joined)}
    return groups


def groups_found(texts: list[str]) -> set[frozenset[int]]:
    group = near_duplicate_groups(series(texts), band_keys(series(texts)))
    members = [frozenset(np.flatnonzero(group == root).tolist()) for root in set(group.tolist())]
    assert all(min(found) in set(group.tolist()) for found in members)  # a group is named by its smallest row
    return set(members)


def variants_of_a_sentence() -> list[str]:
    words = SENTENCE.split()
    variants = [SENTENCE, SENTENCE.upper(), SENTENCE + " Slow."]
    variants += [" ".join([*words[:place], "else", *words[place + 1 :]]) for place in (0, 5, 9)]
    return [
        *variants,
        " ".join(words[:6]),
        " ".join(reversed(words)),
        "Something else entirely about parsing dates in text.",
    ]


def test_near_duplicates_are_those_of_brute_force_jaccard():
    texts = variants_of_a_sentence()
    expected = groups_by_brute_force(texts)
    assert max(map(len, expected)) >= 4  # the case is not empty
    assert groups_found(texts) == expected


def test_matches_between_two_sets_are_those_of_brute_force():
    texts, others = (
        variants_of_a_sentence(),
        [SENTENCE[:-15], "Something else entirely about parsing dates in a text."],
    )
    expected = {
        (row, other): similarity(texts[row], others[other])
        for row, other in itertools.product(range(len(texts)), range(len(others)))
        if similarity(texts[row], others[other]) >= 0.8
    }
    one, other = series(texts), series(others)
    found = near_matches(one, band_keys(one), other, band_keys(other), similarity=0.8)
    assert len(expected) >= 3
    assert {(row, match): score for row, match, score in found.iter_rows()} == pytest.approx(expected)
    assert near_matches(one, band_keys(one), series([]), band_keys(series([]))).is_empty()


def test_minima_are_those_of_datasketch():
    texts = [
        "",
        "ab",
        "é",
        "!!! ???",
        "東京 の 天気",
        "word " * 1500,
        *(f"{WORDS[i % 7]} number {i}" for i in range(50)),
    ]
    found = near_duplicates.band_keys(pl.Series(texts))
    for text, keys in zip(texts, found, strict=True):
        sketch = MinHash(num_perm=BANDS * ROWS, seed=0, hashfunc=int)
        sketch.update_batch(shingles(text).tolist())
        assert np.array_equal(near_duplicates._fold(sketch.hashvalues[None])[0], keys)
    assert len(np.unique(found, axis=0)) == len(texts)


def test_thousands_of_alike_texts_cost_no_square(monkeypatch):
    """1,000 texts from one template and 500 copies: a square would be a million comparisons."""
    rng = np.random.default_rng(0)
    fill = [" ".join(rng.choice(WORDS, 2)) for _ in range(1000)]
    texts = [
        f"What are the known side effects of the medicine called {name}, and how common are they?" for name in fill
    ]
    texts += ["The same words, again and again: " + SENTENCE + "!" * row for row in range(500)]
    compared = 0

    def counted(one, other):
        nonlocal compared
        compared += 1
        return jaccard(one, other)

    monkeypatch.setattr(near_duplicates, "jaccard", counted)
    group = near_duplicate_groups(series(texts), band_keys(series(texts)))
    assert set(group[1000:].tolist()) == {1000}  # the same 5-grams are always one group
    assert compared < 25 * 17 * len(texts) / 4


@given(words, words)
def test_similarity_of_hashes_is_that_of_sets(one, other):
    if min(len(grams(one)), len(grams(other))) > 0:
        assert jaccard(shingles(one), shingles(other)) == similarity(one, other)
    assert jaccard(shingles("+ + + + +"), shingles("☂☂☂☂☂")) == 0 and shingles("").size == 1


@given(st.lists(st.sampled_from(["a b", "A  b", "ab", " c", "C", ""]), max_size=12))
def test_equal_texts_are_known_by_their_keys(texts):
    keys = text_keys(series(texts)).to_list()
    normal = [" ".join(text.split()).casefold() for text in texts]
    assert [keys.index(key) for key in keys] == [normal.index(text) for text in normal]
