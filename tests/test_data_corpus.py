import itertools
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_data import WORDS

from dataset_builders.cli import InputError
from dataset_builders.corpus import merge_duplicates, near_duplicate_groups, split_of, write_corpus
from dataset_builders.folders import read_parquet
from dataset_builders.sources import Rows, Splits

SENTENCE = (
    "Return the sorted list of all names that were defined in the given module, oldest first and without copies."
)


def grams(text: str) -> set[str]:
    text = " ".join(re.findall(r"\w+", text.casefold()))
    return {text[start : start + 5] for start in range(len(text) - 4)}


def test_near_duplicates_are_those_of_brute_force_jaccard():
    words = SENTENCE.split()
    variants = [SENTENCE, SENTENCE.upper(), SENTENCE + " Slow."]
    variants += [" ".join([*words[:place], "else", *words[place + 1 :]]) for place in (0, 5, 9)]
    variants += [
        " ".join(words[:6]),
        " ".join(reversed(words)),
        "Something else entirely about parsing dates in text.",
    ]
    documents = {f"d{row}": text for row, text in enumerate(variants)}
    expected = {frozenset((name,)) for name in documents}
    for one, other in itertools.combinations(documents, 2):
        a, b = grams(documents[one]), grams(documents[other])
        if len(a & b) / len(a | b) >= 0.8:
            joined = [group for group in expected if {one, other} & group]
            expected = expected.difference(joined) | {frozenset().union(*joined)}
    groups = near_duplicate_groups(documents)
    assert max(map(len, expected)) >= 4  # the case is not empty
    found = {frozenset(name for name in groups if groups[name] == group) for group in groups.values()}
    assert found == {group for group in expected if len(group) > 1}


def test_exact_duplicates_become_the_smallest_id():
    assert merge_duplicates({"c": "One  Text", "b": "one text", "a": "two"}) == {"a": "a", "b": "b", "c": "b"}


@given(st.text())
def test_a_split_depends_on_the_name_alone(name):
    assert split_of(name) == split_of(name) in {"train", "validation", "test"}


def test_split_shares():
    found = [split_of(f"name {number}") for number in range(5000)]
    assert [round(found.count(split) / 50) for split in ("train", "validation", "test")] == pytest.approx(
        [80, 10, 10], abs=2
    )


def test_no_query_stands_on_both_sides_and_duplicates_keep_their_positives(tmp_path):
    rows = Rows(
        documents={"d1": "alpha beta", "d2": "gamma delta", "d3": "Alpha  beta", "d4": "epsilon"},
        queries={
            "q1": "what is alpha",
            "q2": "What is  alpha",
            "q3": "what is epsilon",
            "q4": "WHAT IS EPSILON",
            "q5": "x",
        },
        qrels=[
            ("q1", "d1", 1, "train"),
            ("q2", "d2", 1, "train"),  # the same text as q1: one query with two positives
            ("q3", "d4", 1, "train"),  # the same text as the test query q4: it would leak
            ("q4", "d4", 1, "test"),
            ("q5", "d3", 0, "train"),  # judged not relevant: no positive
        ],
        seen=5,
    )
    counts = write_corpus(rows, Splits(), tmp_path)
    assert read_parquet(tmp_path / "queries.parquet")["query_id"].to_pylist() == ["q1", "q4"]
    positives = [
        (row["query_id"], row["document_id"], row["split"])
        for row in read_parquet(tmp_path / "qrels.parquet").to_pylist()
    ]
    assert positives == [("q1", "d1", "train"), ("q1", "d2", "train"), ("q4", "d4", "test")]
    assert counts["exact_duplicate_documents_merged"] == 1
    assert (counts["duplicate_queries_merged"], counts["leaking_queries_dropped"]) == (1, 1)
    assert counts["queries_without_positive_dropped"] == 1


def test_near_duplicates_share_a_split_where_we_make_the_splits(tmp_path):
    words = np.random.default_rng(0).choice(WORDS, (20, 40))
    documents = {f"d{row:02d}": " ".join(words[row // 2]) + " end" * (row % 2) for row in range(40)}
    rows = Rows(documents, {name: f"query {name}" for name in documents}, [(n, n, 1, None) for n in documents], 40)
    write_corpus(rows, Splits(), tmp_path)
    table = read_parquet(tmp_path / "groups.parquet").to_pylist()
    groups = {row["document_id"]: row["group"] for row in table}
    splits = {row["query_id"]: row["split"] for row in read_parquet(tmp_path / "queries.parquet").to_pylist()}
    assert len(groups) == 40 and len(set(splits.values())) > 1
    assert all(splits[name] == splits[group] for name, group in groups.items())


def test_a_split_without_positives_is_named_with_those_there_are(tmp_path):
    rows = Rows({"d": "text"}, {"q": "query"}, [("q", "d", 1, "test")], 1)
    with pytest.raises(InputError, match="splits that have some: test"):
        write_corpus(rows, Splits(), tmp_path)
