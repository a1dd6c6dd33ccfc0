import itertools

import numpy as np
import polars as pl
import pytest
from tiny_data import WORDS

from common.cli import InputError
from common.steps import files_of, read_arrow, read_parquet
from dataset_builders import corpus
from dataset_builders.corpus import split_of, write_corpus
from dataset_builders.readers import Rows
from dataset_builders.sources import Splits


def make_rows(documents: dict, queries: dict, qrels: list[tuple], classes: list[str] | None = None) -> Rows:
    columns = {"document_id": list(documents), "text": list(documents.values())}
    schema = {"query_id": pl.String, "document_id": pl.String, "score": pl.Int32, "split": pl.String}
    return Rows(
        documents=pl.DataFrame(columns | ({"class": classes} if classes else {})),
        queries=pl.DataFrame({"query_id": list(queries), "text": list(queries.values())}),
        qrels=pl.DataFrame(qrels, schema, orient="row"),
        seen=len(qrels),
    )


def rows_of(path) -> list[tuple]:
    return [tuple(row.values()) for row in read_parquet(path).to_pylist()]


SMALL = {
    "documents": {"d3": "Alpha  beta", "d1": "alpha beta", "d2": "gamma delta", "d4": "epsilon"},
    "queries": {
        "q1": "what is alpha",
        "q2": "What is  alpha",
        "q3": "what is epsilon",
        "q4": "WHAT IS EPSILON",
        "q5": "x",
    },
    "qrels": [
        ("q1", "d1", 1, "train"),
        ("q2", "d2", 1, "train"),  # the same text as q1: one query with two positives
        ("q2", "d4", 0, "train"),  # judged and not relevant: kept
        ("q3", "d4", 1, "train"),  # the same text as the test query q4: it would leak
        ("q4", "d4", 1, "test"),
        ("q5", "d3", 0, "train"),  # judged not relevant: no positive
    ],
}


def test_no_query_stands_on_both_sides_and_duplicates_keep_their_positives(tmp_path):
    counts = write_corpus(make_rows(**SMALL), Splits(), tmp_path)
    documents = read_arrow(tmp_path / "documents.arrow").to_pylist()
    assert [tuple(row.values()) for row in documents] == [
        ("d1", "alpha beta"),  # and not d3's text
        ("d2", "gamma delta"),
        ("d4", "epsilon"),
    ]
    queries = rows_of(tmp_path / "queries.parquet")
    assert queries == [("q1", "what is alpha", "train"), ("q4", "WHAT IS EPSILON", "test")]
    assert rows_of(tmp_path / "qrels.parquet") == [
        ("q1", "d1", 1, "train"),
        ("q1", "d2", 1, "train"),
        ("q1", "d4", 0, "train"),
        ("q4", "d4", 1, "test"),
    ]
    assert counts == {
        "pairs_seen": 6,
        "pairs_used": 6,
        "documents": 3,
        "queries": {"test": 1, "train": 1},
        "qrels": 4,
        "near_duplicate_documents": 0,
        "near_duplicate_groups": 0,
        "exact_duplicate_documents_merged": 1,
        "queries_without_positive_dropped": 1,
        "duplicate_queries_merged": 1,
        "leaking_queries_dropped": 1,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "documents.arrow",
        "groups.parquet",
        "qrels.parquet",
        "queries.parquet",
    ]


def test_the_order_of_rows_and_the_size_of_batches_make_no_difference(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, 30)) for _ in range(30)]
    texts += [text + " end" for text in texts[:10]] + [text.upper() for text in texts[5:15]]
    documents = {f"d{row:02d}": text for row, text in enumerate(texts)}
    queries = {f"q{row:02d}": f"query {row % 40}" for row in range(50)}
    qrels = [(query, name, 1, None) for query, name in zip(queries, documents, strict=True)]
    classes = [f"c{row % 3}" for row in range(50)]
    expected = None
    for shuffled in range(4):
        rows = make_rows(documents, queries, qrels, classes)
        if shuffled:
            frames = (rows.documents, rows.queries, rows.qrels)
            documents_, *others = (table[rng.permutation(len(table))] for table in frames)
            chunked = [documents_.slice(0, 7), documents_.slice(7, 0), documents_.slice(7)]
            rows = Rows(pl.concat(chunked, rechunk=False), *others, rows.seen)
        folder = tmp_path / str(shuffled)
        folder.mkdir()
        counts = write_corpus(rows, Splits(), folder)
        expected = expected or (files_of(folder), counts)
        assert (files_of(folder), counts) == expected
    assert counts["near_duplicate_groups"] == 10 and counts["exact_duplicate_documents_merged"] == 10
    whole = read_arrow(folder / "documents.arrow")
    monkeypatch.setattr(corpus, "BATCH_ROWS", 7)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 500)
    (tmp_path / "small").mkdir()
    write_corpus(rows, Splits(), tmp_path / "small")
    batched = read_arrow(tmp_path / "small" / "documents.arrow")
    assert batched.equals(whole) and batched["text"].num_chunks >= 40 / 7
    assert all(chunk.nbytes < 1000 for chunk in batched["text"].chunks)
    for name in ("queries", "qrels", "groups", "classes"):
        assert rows_of(tmp_path / "small" / f"{name}.parquet") == rows_of(folder / f"{name}.parquet")


def test_a_merged_document_has_the_classes_of_both(tmp_path):
    documents = {"b": "text one", "a": "Text  one", "c": "text two"}
    qrels = [("q", "b", 1, "train"), ("q", "c", 0, "train")]
    write_corpus(make_rows(documents, {"q": "?"}, qrels, ["zebra", "ant", "zebra"]), Splits(), tmp_path)
    assert rows_of(tmp_path / "classes.parquet") == [("a", "ant"), ("a", "zebra"), ("c", "zebra")]


def test_split_shares():
    found = [split_of(f"name {number}") for number in range(5000)]
    assert [round(found.count(split) / 50) for split in ("train", "validation", "test")] == pytest.approx(
        [80, 10, 10], abs=2
    )


def test_near_duplicates_share_a_split_where_we_make_the_splits(tmp_path):
    words = np.random.default_rng(0).choice(WORDS, (20, 40))
    documents = {f"d{row:02d}": " ".join(words[row // 2]) + " end" * (row % 2) for row in range(40)}
    queries = {name: f"query {name}" for name in documents}
    write_corpus(make_rows(documents, queries, [(n, n, 1, None) for n in documents]), Splits(), tmp_path)
    groups = dict(rows_of(tmp_path / "groups.parquet"))
    splits = {query: split for query, _, split in rows_of(tmp_path / "queries.parquet")}
    assert len(groups) == 40 and len(set(splits.values())) > 1
    assert all(splits[name] == splits[group] == split_of(group) for name, group in groups.items())
    assert all(group == min(name for name in groups if groups[name] == group) for group in groups.values())


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ([("q", "d", 1, "test")], "splits that have some: test"),
        ([("q", "d", 0, "train")], "splits that have some: none"),
        ([("q", "d", 1, "train"), ("p", "d", 1, "test")], "nothing to train on"),
    ],
)
def test_a_split_without_queries_is_told(tmp_path, qrels, message):
    rows = make_rows({"d": "text"}, {"q": "query", "p": "Query"}, qrels)
    with pytest.raises(InputError, match=message):
        write_corpus(rows, Splits(), tmp_path)
    assert not any(tmp_path.iterdir())


def test_against_a_plain_reading_of_the_rules(tmp_path):
    """Random qrels with duplicate texts on both sides, and the rules once more in plain Python."""
    rng = np.random.default_rng(0)
    for round_ in range(20):
        documents = {f"d{row}": f"text {rng.integers(6)}" for row in range(8)}
        queries = {f"q{row}": f"query {rng.integers(5)}" for row in range(8)}
        pairs = list(itertools.product(queries, documents))
        drawn = [pairs[row] for row in rng.choice(len(pairs), 20, replace=False)]
        qrels = [(*pair, int(rng.integers(3)), ["train", "test", "dev"][rng.integers(3)]) for pair in drawn]
        qrels += [("q0", "d0", 1, "train"), ("only", "d0", 1, "train")]
        queries["only"] = "a query of its own"
        smallest = {name: min(n for n in documents if documents[n] == documents[name]) for name in documents}
        positive = {(query, split) for query, _, score, split in qrels if score}
        held_out = {queries[query] for query, split in positive if split != "train"}
        asked = {pair for pair in positive if pair[1] != "train" or queries[pair[0]] not in held_out}
        expected = {}
        for query, document, score, split in qrels:
            if (query, split) in asked:
                first = min(q for q, s in asked if s == split and queries[q] == queries[query])
                key = (first, smallest[document], split)
                expected[key] = max(score, expected.get(key, 0))
        (tmp_path / str(round_)).mkdir()
        write_corpus(make_rows(documents, queries, qrels), Splits(), tmp_path / str(round_))
        found = rows_of(tmp_path / str(round_) / "qrels.parquet")
        assert found == sorted(
            ((q, d, score, s) for (q, d, s), score in expected.items()), key=lambda r: (r[:2], r[3])
        )
