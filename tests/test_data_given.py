"""Scores of a teacher that came with the texts: from any format, from the Hub, in bounded memory."""

import io
import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hub_client import run_python
from local_hub import LocalHub
from tiny_data import write_encoder, write_recipe

from common.cli import InputError
from common.steps import read_manifest
from dataset_builders import corpus, files
from dataset_builders.build import main
from dataset_builders.corpus import check_one_scale, write_corpus
from dataset_builders.sources import HubSource, LocalSource, Splits, read_rows


def local(folder: Path, **keys) -> LocalSource:
    return LocalSource(kind="local", path=str(folder), **keys)


def write_lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_that_came_with_the_texts_are_calibrated_in_a_teachers_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encoder = write_encoder(tmp_path / "encoder")
    rows = [
        {"query": f"balu {row}", "positive": f"fena {row}", "negative_1": f"corn {row}", "negative_2": f"gilo {row}"}
        | {"scores": [2 + row / 10, row / 9, -1]}
        for row in range(12)
    ]
    source = {"kind": "local", "path": str(write_lines(tmp_path / "rows.jsonl", rows))}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path, encoder, source=source, teacher={"kind": "given"})
    flags = ["--config", str(recipe), "--output_dir", "data", "--num_negatives", "1"]
    main(flags)
    scores = pl.read_parquet("data/scores/scores.parquet")
    assert sorted(scores["teacher_score"]) == pytest.approx(sorted(score for row in rows for score in row["scores"]))
    assert len(scores) == 36 and scores["is_positive"].sum() == 12, "what has no score of the source's is not graded"
    calibration = read_manifest(tmp_path / "data" / "scores")["calibration"]
    expected = 1 / (1 + np.exp(-(calibration["a"] * scores["teacher_score"].to_numpy() + calibration["b"])))
    np.testing.assert_allclose(scores["label"].to_numpy(), np.clip(expected, 1e-4, 1 - 1e-4), rtol=1e-4)
    assert "scores that came with the texts" in Path("data/hub/README.md").read_text()
    write_lines(tmp_path / "rows.jsonl", [{name: row[name] for name in ("query", "positive")} for row in rows])
    with pytest.raises(InputError, match="kind 'given': the source has no scores"):
        main([*flags[:3], "early", *flags[4:]])
    assert not Path("early").exists(), "it is told before anything is searched"


def test_scores_of_two_scales_are_refused():
    """Logits and the probabilities that they stand for, half of the queries each; either alone passes."""
    logits = np.random.default_rng(0).normal(0, 4, (40, 8))
    as_probabilities = 1 / (1 + np.exp(-logits))

    def check(scores):
        check_one_scale(pl.DataFrame({"len": [8] * 40, "given": np.abs(scores).max(axis=1)}))

    for scores in (logits, as_probabilities, 100 * as_probabilities):
        check(scores)
    with pytest.raises(InputError, match=r"20 queries have all of theirs within -1 and 1, .* two scales"):
        check(np.where(np.arange(40)[:, None] % 2, logits, as_probabilities))


# ---- lists of (query id, document ids, scores) ----------------------------------------------------------------------

QUERIES, DOCUMENTS, LISTED = 50, 40, 12


def scored_set() -> dict[str, dict[str, list]]:
    """Documents 0 and 1 say the same; every list begins with its query's positive."""
    rng = np.random.default_rng(1)
    lists = [rng.choice(DOCUMENTS, LISTED, replace=False) for _ in range(QUERIES)]
    texts = [f"text {max(row, 1)}" for row in range(DOCUMENTS)]
    return {
        "documents": {"document_id": list(range(DOCUMENTS)), "document": texts},
        "queries": {"query_id": list(range(QUERIES)), "query": [f"what is {row}" for row in range(QUERIES)]},
        "scores": {
            "query_id": list(range(QUERIES)),
            "document_ids": [row.tolist() for row in lists],
            "scores": [np.sort(rng.normal(size=LISTED)).round(3)[::-1].tolist() for _ in lists],
        },
    }


def given_of(source, folder: Path) -> list[tuple]:
    folder.mkdir()
    write_corpus(read_rows(source, None), Splits(), folder)
    assert not (folder / "given.shards").exists() or list((folder / "given.shards").iterdir())
    return pl.read_parquet(folder / "given.parquet").rows()


@pytest.mark.parametrize("suffix", ["parquet", "jsonl"])
def test_lists_of_scores_are_read_some_rows_at_a_time_to_the_same_table(tmp_path, monkeypatch, suffix):
    tables = scored_set()
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(
        folder / "qrels.jsonl",
        [{"query_id": q, "corpus_id": tables["scores"]["document_ids"][q][0], "score": 1} for q in range(QUERIES)],
    )
    for name, columns in tables.items():
        path = folder / f"{name}.{suffix}"
        if suffix == "parquet":
            pl.DataFrame(columns).write_parquet(path, row_group_size=7)
        else:
            write_lines(path, pl.DataFrame(columns).to_dicts())
    expected = {}
    for query, found, scores in zip(*tables["scores"].values(), strict=True):
        for document, score in zip(found, scores, strict=True):
            pair = str(query), str(max(document, 1) if document else 0)
            pair = pair[0], "0" if document in (0, 1) else pair[1]  # texts that are equal are one document
            expected[pair] = max(score, expected.get(pair, -9))
    whole = given_of(local(folder), tmp_path / "whole")
    assert whole == [(*pair, pytest.approx(score)) for pair, score in sorted(expected.items())]
    monkeypatch.setattr(files, "BATCH_BYTES", 200)  # a row or two
    monkeypatch.setattr(corpus, "GIVEN_QUERIES", 4)
    assert given_of(local(folder), tmp_path / "parts") == whole
    drawn = given_of(local(folder, num_pairs=9), tmp_path / "drawn")
    assert len({row[0] for row in drawn}) == 9 and set(drawn) < set(whole)
    tables["scores"]["scores"][2][4] = None  # not scored; no document of this list is another's equal
    write_lines(folder / "scores.jsonl", pl.DataFrame(tables["scores"]).to_dicts())
    (folder / "scores.parquet").unlink(missing_ok=True)
    left = given_of(local(folder), tmp_path / "unscored")
    unscored = "2", str(tables["scores"]["document_ids"][2][4])
    assert left == [row for row in whole if row[:2] != unscored] and len(left) == len(whole) - 1
    lists = tables["scores"]["document_ids"]
    lists[3][5] = 77
    write_lines(folder / "scores.jsonl", pl.DataFrame(tables["scores"]).to_dicts())
    with pytest.raises(InputError, match=r"scores.jsonl: document_id '77' \(and 0 more\) is not in .*documents"):
        given_of(local(folder), tmp_path / "unknown")


def test_a_table_of_scores_without_scores_names_what_they_may_be_called(tmp_path):
    tables = scored_set()
    tables["scores"]["grade"] = tables["scores"].pop("scores")
    for name, columns in tables.items():
        write_lines(tmp_path / f"{name}.jsonl", pl.DataFrame(columns).to_dicts())
    judged = [{"query_id": row, "corpus_id": row % DOCUMENTS, "score": 1} for row in range(QUERIES)]
    write_lines(tmp_path / "qrels.jsonl", judged)
    said = (
        r"scores\.jsonl: no column 'scores'; it has query_id, document_ids, grade, and none of score, labels, label; "
    )
    with pytest.raises(InputError, match=said + r"--columns '{given: THEIRS}' says which it is"):
        pl.concat(read_rows(local(tmp_path), None).given)
    given = pl.concat(read_rows(local(tmp_path, columns={"given": "grade"}), None).given)
    assert len(given) == QUERIES * LISTED


READ = """
from pathlib import Path
from dataset_builders.corpus import write_corpus
from dataset_builders.sources import HubSource, describe_source, read_rows
source = HubSource(kind="hub", dataset="org/scored", layout="corpus", split="fiqa", revision="main")
print(describe_source(source, None)["commit"])
write_corpus(read_rows(source, None), source, Path("{folder}"))
"""


def test_scores_on_the_hub_are_read_of_the_split_asked_for_alone(tmp_path):
    """As lightonai/embeddings-fine-tuning is published: three configs, a split for each origin, and no qrels."""
    tables, contents, configs = scored_set(), {}, []
    tables["scores"]["document_ids"][0][3] = 99  # a document that is not there
    for config, columns in tables.items():
        for split in ("fiqa", "nq"):
            stream = io.BytesIO()
            pl.DataFrame(columns).write_parquet(stream)
            contents[f"{config}/{split}.parquet"] = stream.getvalue()
        files_of_splits = [{"split": split, "path": f"{config}/{split}.parquet"} for split in ("fiqa", "nq")]
        configs.append({"config_name": config, "data_files": files_of_splits})
    contents["README.md"] = f"---\n{json.dumps({'configs': configs})}\n---\n".encode()
    with LocalHub() as hub:
        hub.create("datasets/org/scored", contents, commit_id="1" * 40)
        (tmp_path / "corpus").mkdir()
        done = run_python(READ.format(folder=tmp_path / "corpus"), hub, tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "1" * 40
        assert [line for line in hub.asked if "scores/fiqa" in line]
        assert not [line for line in hub.asked if "scores/nq" in line]
    assert "the first document of each list of scores is the query's positive" in done.stderr
    assert "1 scores whose document_id is not in corpus left out" in done.stderr
    given = pl.read_parquet(tmp_path / "corpus" / "given.parquet")
    qrels = pl.read_parquet(tmp_path / "corpus" / "qrels.parquet")
    merged = sum({0, 1} <= {*row} for row in tables["scores"]["document_ids"])
    assert len(given) == QUERIES * LISTED - 1 - merged and len(qrels) == QUERIES
    first = given.join(qrels, on=["query_id", "document_id"])["given"]
    assert sorted(first) == pytest.approx(sorted(row[0] for row in tables["scores"]["scores"]))


def test_scores_beside_texts_on_the_hub_are_read_where_columns_names_them(tmp_path):
    """As FlagEmbedding writes them: lists of texts, and of their scores."""
    rows = [
        {"query": f"q{row}", "pos": [f"p{row}"], "neg": [f"n{row}", "n"]}
        | {"pos_scores": [4.5 + row], "neg_scores": [-1.0, row / 4]}
        for row in range(3)
    ]
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "train.jsonl", rows)
    columns = {"positive": "pos", "negative": "neg", "positive_score": "pos_scores", "negative_score": "neg_scores"}
    source = HubSource(kind="hub", dataset=str(tmp_path / "set"), columns=columns)
    read = read_rows(source, None)
    texts = dict(read.documents.rows())
    asked = dict(read.queries.rows())
    found = {(asked[query], texts[document], score) for query, document, score in pl.concat(read.given).rows()}
    expected = {(row["query"], *pair) for row in rows for pair in zip(row["pos"], row["pos_scores"], strict=True)}
    expected |= {(row["query"], *pair) for row in rows for pair in zip(row["neg"], row["neg_scores"], strict=True)}
    assert found == expected and len(found) == 9
