"""Rows with fewer negatives than columns, graded pairs, and what each objective reads."""

import math
import shutil
from pathlib import Path

import polars as pl
import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from common.cli import InputError
from modeling.keys import LOSSES
from modeling.objectives import OBJECTIVES
from modeling.training_data import Source, count_cut, cut_line, known_positives, training_rows

ROWS = [
    {"query": "q0", "positive": "p0", "negative_1": "a0", "negative_2": "b0", "label": [0.9, 0.4, 0.2]},
    {"query": "q1", "positive": "p1", "negative_1": None, "negative_2": "b1", "label": [0.8, None, 0.1]},
    {"query": "q2", "positive": "p2", "negative_1": "a2", "negative_2": None, "label": [0.7, 0.3]},
    {"query": "q3", "positive": "p3", "negative_1": None, "negative_2": None, "label": [0.6]},
]


def made(rows: list[dict], loss: str = "soft_info_nce", **keys) -> list[dict]:
    return list(training_rows(Dataset.from_list(rows), loss, [], **keys))


def test_missing_negatives_are_empty_texts_and_nan():
    rows = made(ROWS)
    assert [(row["negative_1"], row["negative_2"]) for row in rows] == [("a0", "b0"), ("", "b1"), ("a2", ""), ("", "")]
    nan = math.nan
    expected = [[0.9, 0.4, 0.2], [0.8, nan, 0.1], [0.7, 0.3, nan], [0.6, nan, nan]]
    assert [row["label"] for row in rows] == [pytest.approx(label, nan_ok=True) for label in expected]
    assert [list(row) for row in rows] == [["query", "positive", "negative_1", "negative_2", "label"]] * 4


def test_a_missing_negative_needs_no_label_and_keeps_none():
    """A teacher's score of nothing is no score; NaN is as good as null."""
    changed = [*ROWS[:1], {**ROWS[1], "label": [0.8, 0.5, 0.1]}, {**ROWS[2], "label": [0.7, 0.3, math.nan]}, ROWS[3]]
    rows = made(changed)
    assert rows[1]["label"] == pytest.approx([0.8, math.nan, 0.1], nan_ok=True)
    assert rows[2]["label"] == pytest.approx([0.7, 0.3, math.nan], nan_ok=True)


def test_the_first_negatives_of_a_row_can_be_enough():
    rows = made(ROWS, num_negatives=1)
    assert list(rows[0]) == ["query", "positive", "negative_1", "label"]
    assert [row["label"] for row in rows] == [
        pytest.approx(label, nan_ok=True) for label in ([0.9, 0.4], [0.8, math.nan], [0.7, 0.3], [0.6, math.nan])
    ]
    assert made(ROWS[:1], num_negatives=1) == [
        {"query": "q0", "positive": "p0", "negative_1": "a0", "label": [0.9, 0.4]}
    ]
    assert made(ROWS[:1], "info_nce", num_negatives=0) == [{"query": "q0", "positive": "p0"}]
    with pytest.raises(InputError, match="rows have 2 negatives; num_negatives is 3"):
        made(ROWS, num_negatives=3)


def test_a_data_folder_built_anew_is_read_anew(tmp_path):
    """datasets caches a folder by name and README: a rebuilt hub/, or another run's, would give the old rows."""
    for folder, count in (("a", 5), ("b", 7), ("a", 9)):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
        publish(tmp_path / folder / "hub", train={"query": ["q"] * count})
        assert len(Source(str(tmp_path / folder / "hub")).read("train")) == count


def publish(folder: Path, **tables: dict) -> None:
    folder.mkdir(parents=True)
    for name, columns in tables.items():
        pl.DataFrame(columns).write_parquet(folder / f"{name}.parquet")
    configs = [f"{{config_name: {name}, data_files: {name}.parquet}}" for name in tables]
    (folder / "README.md").write_text(f"---\nconfigs: [{', '.join(configs)}]\n---\n")


def test_info_nce_on_ragged_rows_is_told_what_is_missing():
    unlabelled = [{key: value for key, value in row.items() if key != "label"} for row in ROWS]
    assert "label" not in made(unlabelled[:1], "info_nce")[0]
    rows = made(unlabelled, "info_nce")
    assert [[math.isnan(label) for label in row["label"]] for row in rows] == [
        [False, False, False],
        [False, True, False],
        [False, False, True],
        [False, True, True],
    ]


def test_all_objectives_are_losses_of_a_recipe():
    assert sorted(LOSSES) == sorted([*OBJECTIVES, "cosent"])


@pytest.mark.parametrize("loss", LOSSES)
def test_every_objective_gets_its_columns(loss):
    """Graded triples for all of them but CoSENT; pairs for those that learn from one document's label."""
    triple, pair = ROWS[:1], [{"sentence1": "a", "sentence2": "b", "label": 0.5}]
    if loss == "cosent":
        with pytest.raises(InputError, match="no column 'sentence1'"):
            made(triple, loss)
    else:
        assert ("label" in made(triple, loss)[0]) == (loss != "info_nce")
    if loss in ("cosent", "bixse"):
        assert made(pair, loss) == [{**pair[0], "label": [0.5] if loss == "bixse" else 0.5}]
    else:
        with pytest.raises(InputError, match="no column 'query'"):
            made(pair, loss)


BAD = {
    "negative of spaces": ({**ROWS[0], "negative_2": " "}, "row 1: column 'negative_2' is empty; make it null"),
    "no positive": ({**ROWS[0], "positive": None}, "row 1: column 'positive' is empty"),
    "no label of a document": ({**ROWS[0], "label": [0.9, 0.4]}, "row 1: label must hold 3 numbers"),
    "null label of a document": ({**ROWS[0], "label": [0.9, None, 0.2]}, "row 1: labels must lie in"),
    "label of nothing": ({**ROWS[3], "label": [0.9, 0.4, 0.2, 0.1]}, "row 1: label must hold 3 numbers"),
    "no label": ({**ROWS[0], "label": None}, "row 1: label must hold 3 numbers"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows(case):
    row, message = BAD[case]
    with pytest.raises(InputError, match=f"^{message}"):
        made([ROWS[0], row])


def test_scores_of_pairs_that_are_no_soft_labels():
    pairs = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (0.5, 4.2)]
    assert len(made(pairs, "cosent")) == 2
    with pytest.raises(InputError, match="row 1: label must lie in"):
        made(pairs, "bixse")


PUBLISHED = {
    "rows alone": {},
    "positives": {"positives": {"query": ["q0", "q0", "q1", "q9"], "positive": ["p0", "p4", "p1", "p9"]}},
    "qrels": {
        "queries": {"query_id": ["a", "b", "c"], "text": ["q0", "q1", "q9"], "split": ["train"] * 3},
        "documents": {"document_id": list("xyz"), "text": ["p0", "p4", "p1"]},
        "qrels": {
            "query_id": ["a", "a", "a", "b", "c", "c"],
            "document_id": ["x", "y", "z", "z", "x", "y"],
            "score": [1, 2, 0, 1, 1, 1],
            "split": ["train"] * 6,
        },
    },
}


@pytest.mark.parametrize("case", PUBLISHED)
def test_known_positives_are_those_of_the_rows_and_what_lies_beside_them(tmp_path, case):
    """q2 has two in the rows; q0 a second one that no row brings; q9 is no query of the rows."""
    rows = {"query": ["q0", "q1", "q2", "q2"], "positive": ["p0", "p1", "p2", "p3"], "negative_1": ["n"] * 4}
    publish(tmp_path / "hub", train=rows, **PUBLISHED[case])
    found = known_positives(Dataset.from_dict(rows), Source(str(tmp_path / "hub")))
    assert found == {"q2": ["p2", "p3"], **({"q0": ["p0", "p4"]} if case != "rows alone" else {})}


@pytest.mark.parametrize("relabel", ["none", "exclude", "promote"])
def test_rows_that_were_relabelled_otherwise_have_positives_of_their_own(tmp_path, relabel):
    rows = {"query": ["q0"], "positive": ["p0"], "negative_1": ["n"]}
    own = {f"positives-{name}": {"query": ["q0"], "positive": [name]} for name in ("none", "exclude", "promote")}
    publish(tmp_path / "hub", train=rows, positives={"query": ["q0"], "positive": ["p4"]}, **own)
    config = "train-n1-m90" + (f"-{relabel}" if relabel != "none" else "") + "-random"
    source = Source(str(tmp_path / "hub"))
    assert known_positives(Dataset.from_dict(rows), source, config) == {"q0": sorted(["p0", relabel])}
    assert known_positives(Dataset.from_dict(rows), source) == {"q0": ["p0", "p4"]}


def test_cut_texts_are_counted_by_column(tiny_encoder):
    """Lengths by hand: BOS, EOS, one token a word; the prompt's words count too."""
    tokenizer = AutoTokenizer.from_pretrained(str(tiny_encoder))
    rows = Dataset.from_dict(
        {
            "query": ["read a file", "read a file a file"],
            "positive": ["sort a list " * 4 + "read", "sort a list " * 4 + "write"],
            "negative_1": ["", "sort a list " * 4],
            "label": [[0.9, 0.1]] * 2,
        }
    )
    counts = count_cut(rows, tokenizer, 8, {"query": "query : "})
    assert counts == {"query": (1, 2, False, 15), "positive": (2, 2, True, 16), "negative_1": (1, 1, False, 8)}
    line = "4 of 5 texts are cut at 8 tokens; all 2 of positive read the same; negative_1: 1 of 1, more than half"
    assert cut_line(counts, 8) == line + "; raise max_seq_length"
    assert cut_line(counts, 8, "train_max_seq_length") == line + "; raise train_max_seq_length"
    assert cut_line(count_cut(rows, tokenizer, 15, {}), 15) is None
    assert count_cut(rows, tokenizer, 8, {}, max_rows=1)["positive"].texts == 1
