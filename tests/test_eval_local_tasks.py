"""Local copies of tasks' data: mteb's names and scores, told apart from the Hub's, read by the report."""

import numpy as np
import pytest
from scipy.stats import spearmanr
from tiny_data import write_table

from eval.leaderboard import read_leaderboard
from eval.local_tasks import LOCAL_TASKS
from eval.run_mteb import evaluate, load_for_mteb, load_tasks

PHRASES = ["parse a date", "read a file", "write a file", "open a file", "sort a list", "close a file", "sort", "read"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Every set of LOCAL_TASKS in its layout, with a few rows."""
    root = tmp_path_factory.mktemp("data")
    for task in LOCAL_TASKS.values():
        folder = root / task.folder
        folder.mkdir()
        if task.kind == "Retrieval":
            ids = [f"d{row}" for row in range(8)]
            write_table(folder / "corpus.parquet", _id=ids, title=[""] * 8, text=PHRASES)
            write_table(folder / "queries.parquet", _id=["q0", "q1", "q2"], text=["date", "list", "close"])
            splits = [task.split, task.split, "train"]
            write_table(
                folder / "qrels.parquet",
                query_id=["q0", "q1", "q2"],
                corpus_id=["d0", "d4", "d5"],
                score=[1, 1, 1],
                split=splits,
            )
            continue
        for number, file in enumerate(task.files):
            texts = PHRASES[number:] + PHRASES[:number]
            columns = {"text": texts * 4, "label_text": ["a", "b"] * 16, "label": [0, 1] * 16}
            if task.kind == "STS":
                scores = [float(row) for row in range(8)]
                columns = {"sentence1": texts, "sentence2": texts[::-1], "score": scores}
            elif task.kind == "PairClassification":
                labels = ["neutral", "contradiction", "entailment", "not", "duplicate", "entailment", "neutral", "not"]
                columns = {"text1": texts, "text2": texts[::-1], "label": range(8), "label_text": labels}
            write_table(folder / f"{file}.parquet", **columns)
    return root


EVALUATED = ["SICK-R", "TREC6Classification", "StackOverflow20Clustering", "SNLIPairs", "SciFact", "MedQuAD"]


@pytest.fixture(scope="module")
def found(root, tiny_encoder, tmp_path_factory):
    """A local task of each kind, evaluated: where the results are, and the results by name."""
    output = tmp_path_factory.mktemp("results")
    tasks = load_tasks(None, EVALUATED, root)
    results, failures = evaluate(load_for_mteb(str(tiny_encoder)), tasks, output, batch_size=8)
    assert failures == {} and [result.task_name for result in results] == EVALUATED
    return output, {result.task_name: result for result in results}


def test_every_set_has_a_task(root):
    tasks = load_tasks(None, ["local"], root)
    assert [task.metadata.name for task in tasks] == list(LOCAL_TASKS) and len(tasks) == 16
    for task in tasks:
        task.load_data()
        assert task.dataset["default" if task.metadata.type == "Retrieval" else task.metadata.eval_splits[0]]


def test_scores_are_those_computed_by_hand(found, tiny_encoder):
    """Of all three files of SICK-R, with the prompt of that name; nDCG of one relevant document by its rank."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tiny_encoder))
    first = [text for number in range(3) for text in PHRASES[number:] + PHRASES[:number]]
    other = [text for number in range(3) for text in (PHRASES[number:] + PHRASES[:number])[::-1]]
    one, two = (model.encode(texts, prompt_name="SICK-R") for texts in (first, other))
    expected = spearmanr((one * two).sum(axis=1), list(range(8)) * 3).statistic
    assert found[1]["SICK-R"].get_score() == pytest.approx(expected, abs=1e-4)
    scores = model.encode(["date", "list"], prompt_name="query") @ model.encode(PHRASES).T
    ranks = [(row > row[relevant]).sum() + 1 for row, relevant in zip(scores, (0, 4), strict=True)]
    assert found[1]["SciFact"].get_score() == pytest.approx(np.mean(1 / np.log2(np.add(ranks, 1))), abs=1e-4)


def test_the_report_reads_them_and_mteb_tells_them_from_the_hubs(found):
    output, results = found
    assert set(results["MedQuAD"].scores) == {"validation"} and set(results["SICK-R"].scores) == {"test"}
    board = read_leaderboard(output)
    assert {task.metadata.name for task in board.tasks} == set(EVALUATED) and np.isfinite(board.scores).all()
    assert board.types == ["Classification", "Clustering", "PairClassification", "Retrieval", "STS"]
    [hub] = load_tasks(None, ["SICK-R"])
    assert results["SICK-R"].dataset_revision != hub.metadata.revision
    assert not results["SICK-R"].is_mergeable(hub)


def test_named_tasks_take_the_local_copy_where_there_is_one(root):
    stsb, arguana = load_tasks(None, ["STSBenchmark", "ArguAna"], root)
    assert stsb.metadata.dataset["path"] == "local/stsb" and arguana.metadata.dataset["path"].startswith("mteb/")
    tasks = {task.metadata.name: task for task in load_tasks("MTEB(eng, v2)", None, root)}
    assert len(tasks) == 41 and tasks["STS12"].metadata.dataset["path"] == "local/sts12"
