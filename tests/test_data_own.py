"""Files as people have them: what is read from each format, and what is told about the others."""

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import polars as pl
import pytest
from datasets import Dataset, DatasetDict

from common.cli import InputError
from dataset_builders import tables
from dataset_builders.files import read_file
from dataset_builders.sources import LocalSource, read_rows

ROWS = [
    {"id": "T-1", "question": "how, to pay?", "answer": "by\ncard"},
    {"id": "T-2", "question": "who", "answer": "we"},
]


def write(path: Path, content: str | bytes | list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **keys):
    return read_rows(LocalSource(kind="local", path=str(path), **keys), None)


def judged(path: Path, **keys) -> set[tuple]:
    """(query, document, score, split) in texts."""
    rows = read(path, **keys)
    queries, documents = (dict(table.rows()) for table in (rows.queries, rows.documents.drop("class", strict=False)))
    return {(queries[query], documents[document], *rest) for query, document, *rest in rows.qrels.iter_rows()}


def as_csv(separator: str, start: str = "") -> str:
    lines = [separator.join(ROWS[0]), *(separator.join(f'"{value}"' for value in row.values()) for row in ROWS)]
    return start + "\n".join(lines) + "\n"


COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
FORMATS = {
    "rows.csv": as_csv(","),
    "excel.csv": as_csv(";", "\ufeff"),
    "ROWS.CSV": as_csv(","),
    "powershell.jsonl": "\ufeff" + "\n".join(map(json.dumps, ROWS)),
    "rows.tsv": as_csv("\t"),
    "rows.jsonl": ROWS,
    "rows.json": json.dumps(ROWS, indent=1),
    "columns.json": json.dumps(COLUMNS),
    "lines.json": ROWS,
    "rows.parquet": pl.DataFrame(COLUMNS).write_parquet,
    "rows.arrow": pl.DataFrame(COLUMNS).write_ipc,
    "saved": lambda path: DatasetDict({"train": Dataset.from_dict(COLUMNS)}).save_to_disk(str(path)),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_of_every_format_gives_the_same_rows_with_their_ids(tmp_path, capsys, name):
    path, content = tmp_path / "set [1]" / name, FORMATS[name]  # the brackets are no pattern
    path.parent.mkdir()
    content(path) if callable(content) else write(path, content)
    for place in {path, path.parent if path.is_file() else path}:  # a folder with one file is that file
        rows = read(place)
        assert sorted(rows.documents.rows()) == [("T-1", "by\ncard"), ("T-2", "we")]
        assert sorted(rows.queries.rows()) == [("T-1", "how, to pay?"), ("T-2", "who")]
        assert sorted(rows.qrels.rows()) == [("T-1", "T-1", 1, "train"), ("T-2", "T-2", 1, "train")]
        told = f"{place}: reads question as query, answer as positive; --columns changes that\n"
        assert capsys.readouterr().err.endswith(told)


LABELS = {"yes": "entailment", "no": "contradiction", "maybe": "neutral", " P": "entailment"}
LAYOUTS = {
    "triplets": ([{"anchor": "q", "positive": "p", "negative": "n"}], {("q", "p", 1), ("q", "n", 0)}),
    "numbered": (
        [{"query": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}],
        {("q", "p", 1), ("q", "n", 0), ("q", "m", 0)},
    ),
    "no negative": (
        [{"query": "q", "pos": ["p"], "neg": ["n"]}, {"query": "r", "pos": ["s"], "neg": []}],
        {("q", "p", 1), ("q", "n", 0), ("r", "s", 1)},
    ),
    "lists in JSON": (
        [{"query": "q", "positive": '["p", "s"]', "negative": '["n"]'}, {"query": "r", "positive": "[]"}],
        {("q", "p", 1), ("q", "s", 1), ("q", "n", 0)},
    ),
    "lists as pandas writes them, and blank cells": (
        [
            {"query": "q", "positive": "['p', \"it's\"]", "negative": " ['n'] "},
            {"query": "r", "positive": "['s']", "negative": " "},
        ],
        {("q", "p", 1), ("q", "it's", 1), ("q", "n", 0), ("r", "s", 1)},
    ),
    "most are lists": (
        [{"query": "q", "positive": ["p", "s"], "negative": "n"}, {"query": "r", "positive": "t", "negative": ["m"]}],
        {("q", "p", 1), ("q", "s", 1), ("q", "n", 0), ("r", "t", 1), ("r", "m", 0)},
    ),
    "judged": (
        [{"query": "q", "passage": "p", "relevance": 2}, {"query": "q", "passage": "n", "relevance": 0}],
        {("q", "p", 2), ("q", "n", 0)},
    ),
    "labelled": ([{"Text": "a", "Category": 1}, {"Text": "b", "Category": 1}], {("a", "b", 1), ("b", "a", 1)}),
    "labelled in lists": (
        [{"sentences": ["a", "b"], "labels": ["1", "1"]}, {"sentences": ["c"], "labels": ["2"]}],
        {("a", "b", 1), ("b", "a", 1)},
    ),
    "of several classes": (
        [{"text": "a", "label": ["x", "y"]}, {"text": "b", "label": ["y"]}, {"text": "c", "label": ["x"]}],
        {("a", "b", 1), ("b", "a", 1), ("a", "c", 1), ("c", "a", 1)},
    ),
    "labelled pairs": (  # the last is what it is compared with
        [
            {"premise": "p", "hypothesis": text, "label": label}
            for text, label in {
                "yes": "entailment",
                "no": "contradiction",
                "so": "neutral",
                " P": "entailment",
            }.items()
        ],
        {("p", "yes", 1), ("p", "no", 0)},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_columns_are_known_by_their_names(tmp_path, name):
    rows, expected = LAYOUTS[name]
    found = judged(write(tmp_path / "rows.jsonl", rows))
    assert found == {(*row, "train") for row in expected}


def test_texts_that_look_like_lists_are_told_and_read_as_what_most_of_their_column_is(tmp_path, capsys):
    rows = [
        {"query": f"q{row}", "positive": f"p{row}", "negative": '["n", "m"]' if row < 2 else "n"} for row in range(5)
    ]
    found = judged(write(tmp_path / "rows.jsonl", rows))
    assert {document for _, document, score, _ in found if not score} == {'["n", "m"]', "n"}
    assert "column 'negative': 2 of 5 values look like lists; all are read as single texts" in capsys.readouterr().err
    for row in rows[:4]:
        row["negative"] = '["n", "m"]'
    assert {d for _, d, score, _ in judged(write(tmp_path / "rows.jsonl", rows)) if not score} == {"n", "m"}
    assert "4 of 5 values look like lists; the others are read as single texts" in capsys.readouterr().err


def test_files_of_a_split_may_hold_lists_or_texts_and_files_of_no_split_are_told(tmp_path, capsys):
    write(tmp_path / "train-1.jsonl", [{"query": "q", "positive": ["p", "s"]}])
    write(tmp_path / "train-2.csv", "query,positive\nr,t\n")
    write(tmp_path / "more.csv", "query,positive\nu,v\n")
    assert judged(tmp_path) == {("q", "p", 1, "train"), ("q", "s", 1, "train"), ("r", "t", 1, "train")}
    assert (
        f"{tmp_path}: does not read more.csv: named after no split (train, validation, test)"
        in capsys.readouterr().err
    )


def write_beir(folder: Path) -> Path:
    write(
        folder / "Corpus.jsonl",
        [{"_id": f"d{row}", "title": "T", "text": f"text {row}", "metadata": {}} for row in (1, 2)],
    )
    write(folder / "queries.jsonl", [{"_id": f"q{row}", "text": f"ask {row}", "metadata": {}} for row in (1, 2)])
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq1\td1\t1\n")
    write(folder / "qrels" / "dev.tsv", "query-id\tcorpus-id\tscore\nq2\td2\t1\n")
    return folder


def test_a_folder_of_beir_is_read_as_it_lies_on_disk_and_dev_is_validation(tmp_path):
    folder = write_beir(tmp_path / "beir")
    rows = read(folder, eval_splits=["validation"])
    assert sorted(rows.documents.rows()) == [("d1", "T text 1"), ("d2", "T text 2")]
    assert sorted(rows.qrels.rows()) == [("q1", "d1", 1, "train"), ("q2", "d2", 1, "validation")]
    assert {split for *_, split in read(folder, eval_splits=["dev"]).qrels.rows()} == {"train", "dev"}
    write(folder / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\nq1\td9\t1\n")
    with pytest.raises(InputError, match=r"qrels/dev\.tsv: document_id 'd9' \(and 0 more\) is not in .*Corpus\.jsonl"):
        read(folder)


def test_qrels_of_trec_and_tables_of_any_format_are_a_collection(tmp_path):
    write(tmp_path / "collection.tsv", "docid\ttext\n1\tone\n2\ttwo\n")
    write(tmp_path / "topics.csv", "qid,query\n7,uno\n8,due\n")
    write(tmp_path / "qrels.trec.txt", "7 0 1 2\n8  Q0\t2 1\n8 0 1 -1\n")
    found = {("uno", "one", 2, "train"), ("due", "two", 1, "train"), ("due", "one", -1, "train")}
    assert judged(tmp_path) == found


def test_tables_of_ms_marco_have_no_header_and_a_run_of_trec_is_a_teachers_scores(tmp_path, capsys):
    write(tmp_path / "collection.tsv", '0\t"the presence\n1\tof mind\n2\tbody text\n')
    write(tmp_path / "queries.tsv", "7\twhat presence\n8\twhose mind\n")
    write(tmp_path / "qrels.dev.tsv", "7\t0\t0\t1\n8\t0\t1\t1\n")
    write(tmp_path / "bm25.run", "7 Q0 0 1 12.5 me\n7 Q0 2 2 1.5e-1 me\n8\tQ0\t1\t1\t-3\tme\n")
    found = {("what presence", '"the presence', 1, "validation"), ("whose mind", "of mind", 1, "validation")}
    assert judged(tmp_path, split="validation") == found
    given = pl.concat(read(tmp_path, split="validation").given)
    assert "reads corpus_id as document_ids, score as given" in capsys.readouterr().err
    assert sorted(given.rows()) == [("7", "0", 12.5), ("7", "2", pytest.approx(0.15)), ("8", "1", -3.0)]
    drawn = read(tmp_path, split="validation", num_pairs=1)
    assert len(drawn.queries) == 1 and {*pl.concat(drawn.given)["query_id"]} == {*drawn.queries["query_id"]}
    write(tmp_path / "queries.tsv", "number\ttext\n7\twhat presence\n8\twhose mind\n")
    with pytest.raises(InputError, match=r"queries\.tsv: no column '_id'; it has number, text, and none of docid, "):
        read(tmp_path, split="validation")  # a header with one name that is known is one


def test_a_hold_out_is_a_stable_tenth_for_each_and_no_text_is_on_both_sides(tmp_path):
    rows = [
        {"question": f"Question  {row % 900}" if row % 2 else f"question {row % 900}", "answer": f"answer {row}"}
        for row in range(1000)
    ]
    assert LocalSource(kind="local", path="rows.jsonl", holdout=0.1).eval_splits == ("validation", "test")
    split_of = {}
    for query, _, _, split in judged(write(tmp_path / "rows.jsonl", rows), holdout=0.1):
        assert split_of.setdefault(" ".join(query.lower().split()), split) == split
    shares = {split: round(count / 90) for split, count in Counter(split_of.values()).items()}
    assert len(split_of) == 900 and shares == {"train": 8, "validation": 1, "test": 1}
    write(tmp_path / "rows.jsonl", rows[::-1][:-1])  # another order, and one row less: every other stays where it was
    for query, _, _, split in judged(tmp_path / "rows.jsonl", holdout=0.1):
        assert split_of[" ".join(query.lower().split())] == split


def test_a_hold_out_makes_what_is_missing_and_keeps_texts_of_pairs_together(tmp_path):
    write(tmp_path / "set" / "train.csv", "question,answer\n" + "".join(f"q{row},a{row}\n" for row in range(50)))
    write(tmp_path / "set" / "test.csv", "question,answer\nasked,said\n")
    found = judged(tmp_path / "set", holdout=0.2)
    assert {query for query, *_, split in found if split == "test"} == {"asked"}
    assert 2 < sum(split == "validation" for *_, split in found) < 25
    pairs = [
        {"question1": f"a{row}", "question2": f"{'bc'[row % 2]}{row // 2}", "label": "duplicate"} for row in range(200)
    ]
    split_of = {}
    for one, other, _, split in judged(write(tmp_path / "pairs.jsonl", pairs), holdout=0.2):
        assert {split_of.setdefault(text, split) for text in (one, other)} == {split}
    assert {*split_of.values()} == {"train", "validation", "test"}
    beir = write_beir(tmp_path / "beir")
    write(beir / "queries.jsonl", [{"_id": f"q{row}", "text": f"ask {row}"} for row in range(40)])
    write(
        beir / "qrels" / "train.tsv", "query-id\tcorpus-id\tscore\n" + "".join(f"q{row}\td1\t1\n" for row in range(40))
    )
    found = judged(beir, holdout=0.3)
    assert [query for query, *_, split in found if split == "validation"] == ["ask 2"], "which the set has"
    assert 2 < sum(split == "test" for *_, split in found) < 25


def test_a_row_that_answers_with_a_question_held_out_is_not_trained_on(tmp_path, capsys):
    """Questions that answer questions, each a query once and a positive once: a ring, texts and lists alike."""
    for number, answer in enumerate((lambda row: f"question {row}", lambda row: [f"question {row}", "said"])):
        rows = [{"question": f"question {row}", "answer": answer((row + 1) % 200)} for row in range(200)]
        found = judged(write(tmp_path / f"rows{number}.jsonl", rows), holdout=0.1)
        held_out = {query for query, *_, split in found if split != "train"}
        trained = [(query, text) for query, text, *_, split in found if split == "train"]
        assert 15 < len(held_out) < 80 and held_out.isdisjoint(text for pair in trained for text in pair)
        followed = {f"question {(int(query.split()[1]) - 1) % 200}" for query in held_out} - held_out
        assert len({query for query, _ in trained}) == 200 - len(held_out) - len(followed)
        assert f"{len(followed)} rows left out, their positive is a query held out" in capsys.readouterr().err


PAIR = "question,answer\n"
BAD = {
    "one column": ("x.csv", "question\nwhy\n", {}, r"x\.csv: columns question \(is its separator a comma"),
    "mixed encodings": ("x.csv", f"{PAIR}çà,b\n".encode() + b"caf\xe9,c\n", {}, r"line 3 is not UTF-8 \(byte 0xe9\)"),
    "UTF-16": ("x.csv", f"{PAIR}a,b\n".encode("utf-16"), {}, "line 1 is not UTF-8"),
    "broken JSON": ("x.jsonl", '{"query": "a", "positive": "b"}\n{"query": \n', {}, r"x\.jsonl: line 2 is no JSON"),
    "no rows": ("x.json", "3", {}, "it holds no list of rows"),
    "cut Parquet": ("train.parquet", b"PAR1\xff\xff", {}, r"train\.parquet: not a readable Parquet file: Parquet"),
    "ragged": ("x.csv", f"{PAIR}a,b,c\n", {}, "found more fields"),
    "numpy's lists": (
        "x.csv",
        "query,positive\nq,\"['a' 'b']\"\n",
        {},
        r"column 'positive': \"\['a' 'b'\]\" looks like a list and is none of JSON's or Python's; write lists as JSON",
    ),
    "lists joined": (
        "x.csv",
        "query,title,pos\nq,t,\"['a']\"\n",
        {"columns": {"positive": ["title", "pos"]}},
        "'positive' joins title, pos, and 'pos' holds lists; name one",
    ),
    "ids twice": ("x.csv", "id,query,answer\n1,a,b\n1,c,d\n", {}, "id '1' stands for two texts; make ids unique, or"),
    "ids of texts": ("x.csv", "id,text,label\n1,a,b\n1,c,b\n2,d,b\n", {}, "id '1' stands for two texts"),
    "scores of others": (
        "x.jsonl",
        [{"query": "q", "positive": ["a", "b"], "positive_score": [1.0]}],
        {},
        "row 0 has not as many positive_score as positive",
    ),
    "labels of others": ("x.jsonl", [{"text": ["a", "b"], "label": ["x"]}], {}, "row 0 has not as many label as text"),
    "score is none": (
        "x.csv",
        "query,positive,positive_score\nq,a,nan\n",
        {},
        "row 0 has a positive_score that is NaN",
    ),
    "in another file": (
        "dev.csv",
        f"{PAIR}a,b\nc,\n",
        {"split": "validation"},
        r"dev\.csv: row 1 has no 'positive'",
    ),
    "nothing held out": ("x.csv", f"{PAIR}a,b\nc,d\n", {"holdout": 0.01}, "of 2 queries leaves none for 'validation'"),
    "no such split": ("train.csv", f"{PAIR}a,b\n", {"eval_splits": ["test"]}, "no such file, nor as .* are: train"),
    "unknown columns": (
        "x.csv",
        "frage,antwort\na,b\n",
        {},
        r"columns antwort, frage \(is this line its header\?\); .* say which yours are: --columns",
    ),
    "no files": ("README.md", "x", {}, r"train\.parquet: no such file, nor as arrow, csv, .* there are: none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path, name):
    file, content, keys, message = BAD[name]
    write(tmp_path / file, content)
    with pytest.raises(InputError, match=message) as raised:
        read(tmp_path, **keys)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["faq.csv.gz", "faq.xlsx", "faq", "faq.txt"])
def test_a_file_of_another_format_is_told_by_its_name(tmp_path, name):
    with pytest.raises(InputError, match=rf"/{name}: no table in a format that is read alone; these are \.parquet, "):
        read(write(tmp_path / name, f"{PAIR}a,b\n"))


def test_memory_does_not_grow_with_a_file_of_json_lines(tmp_path):
    """Its texts stay on disk, mapped. (2.1 GB take about 100 MB; of a small file most is buffers of a fixed size.)"""
    line = json.dumps({"query": "why", "positive": "because of that " * 100}) + "\n"
    path = tmp_path / "large.jsonl"
    with path.open("w") as stream:
        stream.writelines(line * 1000 for _ in range(120))
    before = most = anonymous_bytes()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_file, path)
        while not reading.done():
            most = max(most, anonymous_bytes())
            time.sleep(0.01)
    table = reading.result()
    assert len(table) == 120_000 and table.nbytes > 1.5e8
    assert most - before < table.nbytes


def test_a_holdout_reads_its_file_once(tmp_path, monkeypatch):
    write(tmp_path / "pairs.jsonl", [{"query": f"q {i}", "positive": f"p {i}"} for i in range(99)])
    reads = []
    monkeypatch.setattr(tables, "read_file", lambda *args: reads.append(args) or read_file(*args))
    rows = read(tmp_path, holdout=0.2)
    assert len(reads) == 1 and {*rows.qrels["split"]} == {"train", "validation", "test"}


def anonymous_bytes() -> int:
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
