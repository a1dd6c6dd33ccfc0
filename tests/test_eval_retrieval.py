"""Scores over a held-out split: by hand, and against vectors and metrics computed another way."""

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pytest

from common.cli import InputError
from common.steps import read_parquet, write_json, write_parquet
from eval.retrieval import (
    Queries,
    System,
    candidate_rankings,
    cosine_quantiles,
    load_documents,
    load_queries,
    main,
    missing_stages,
    model_row,
    ranking_scores,
    retriever_row,
    run_systems,
    with_differences,
)


@pytest.fixture(scope="module")
def metrics(tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("out") / "results"
    main(["--run", str(tiny_run), "--data", str(tiny_run / "data"), "--output_dir", str(output)])
    return json.loads((output / "metrics.json").read_text())


def test_rows_are_in_the_order_in_which_systems_came_to_be(metrics):
    """The last stage's files are the final model's: one row, not two."""
    names = [row["name"] for row in metrics["systems"]]
    assert names == ["BM25", "dense teacher", "RRF", "untrained", "after sts", "after retrieval (final)"]
    assert metrics["counts"] == {"documents": 6, "queries": 3, "relevant": 3}
    assert metrics["not_evaluated"] == []


def test_retriever_rows_by_hand(metrics):
    """d0 first for q0, d4 second for q1, nothing for q2, which has to count 0."""
    rows = {row["name"]: row for row in metrics["systems"]}
    second = 1 / math.log2(3)
    assert rows["BM25"]["nDCG@10"] == pytest.approx((1 + second) / 3, abs=1e-4)
    assert rows["BM25"]["RR"] == pytest.approx((1 + 1 / 2) / 3, abs=1e-4)
    assert rows["BM25"]["R@100"] == pytest.approx(2 / 3, abs=1e-4)
    assert rows["dense teacher"]["nDCG@10"] == pytest.approx((second + 1) / 3, abs=1e-4)
    assert rows["BM25"].get("difference") is None
    assert rows["dense teacher"]["difference"]["mean"] == pytest.approx(0, abs=1e-4)


def test_model_rows_are_those_of_sentence_transformers_own_evaluator(metrics, tiny_run):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    documents = load_documents(tiny_run / "data")
    queries = load_queries(tiny_run / "data", "test", set(documents.ids))
    model = SentenceTransformer(str(tiny_run / "model"))
    scores = InformationRetrievalEvaluator(
        dict(zip(queries.ids, queries.texts, strict=True)),
        dict(zip(documents.ids, documents.texts, strict=True)),
        {query_id: set(grades) for query_id, grades in queries.qrels.items()},
        query_prompt_name="query",
        write_csv=False,
    )(model)
    [final] = [row for row in metrics["systems"] if row["name"] == "after retrieval (final)"]
    assert 0 < final["nDCG@10"] < 1
    assert final["nDCG@10"] == pytest.approx(scores["cosine_ndcg@10"], abs=1e-4)
    assert final["RR"] == pytest.approx(scores["cosine_mrr@10"], abs=1e-4)


def test_cosines_are_those_of_relevant_documents_and_of_others(metrics, tiny_run):
    """Against sentence-transformers' whole similarity matrix; all 6 documents are among the first 10."""
    from sentence_transformers import SentenceTransformer

    documents = load_documents(tiny_run / "data")
    queries = load_queries(tiny_run / "data", "test", set(documents.ids))
    model = SentenceTransformer(str(tiny_run / "model"))
    matrix = model.similarity(model.encode_query(queries.texts), model.encode_document(documents.texts)).numpy()
    relevant = np.array([[id in queries.qrels[query] for id in documents.ids] for query in queries.ids])
    assert relevant.sum() == 3
    found = metrics["systems"][-1]["cosines"]
    assert found["quantiles"] == [5, 25, 50, 75, 95]
    np.testing.assert_allclose(found["relevant"], np.percentile(matrix[relevant], found["quantiles"]), atol=1e-3)
    np.testing.assert_allclose(found["others"], np.percentile(matrix[~relevant], found["quantiles"]), atol=1e-3)


def test_cosines_by_hand():
    """A relevant document counts though it was not retrieved; without others there is nothing to tell of them."""
    vectors = np.eye(3, dtype=np.float32)
    positions, scores = np.array([[0], [1]]), np.array([[1.0], [1.0]], np.float32)
    found = cosine_quantiles(vectors[:2], vectors, positions, scores, [[0], [1, 2]])
    assert found == {"relevant": pytest.approx([0.1, 0.5, 1, 1, 1]), "others": None}


def test_a_model_with_a_few_shot_prompt_has_a_row_for_it(tiny_run, tmp_path):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    from modeling.prompts import baked_prompts

    run = shutil.copytree(tiny_run, tmp_path / "run")
    prompts = baked_prompts("Given a question, retrieve its answer", [("open", "open a file"), ("close", "list")])
    for name in ("retrieval", "model"):
        path = run / name / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": prompts}))
    main(["--run", str(run), "--data", str(run / "data"), "--output_dir", str(run / "results")])
    *_, final, few_shot = json.loads((run / "results" / "metrics.json").read_text())["systems"]
    assert (final["name"], final["shots"]) == ("after retrieval (final)", 0)
    assert (few_shot["name"], few_shot["shots"]) == ("after retrieval (final), 2-shot", 2)
    assert few_shot["cosines"] != final["cosines"]
    documents = load_documents(run / "data")
    queries = load_queries(run / "data", "test", set(documents.ids))
    scores = InformationRetrievalEvaluator(
        dict(zip(queries.ids, queries.texts, strict=True)),
        dict(zip(documents.ids, documents.texts, strict=True)),
        {query_id: set(grades) for query_id, grades in queries.qrels.items()},
        query_prompt_name="query-2-shot",
        write_csv=False,
    )(SentenceTransformer(str(run / "model")))
    assert few_shot["nDCG@10"] == pytest.approx(scores["cosine_ndcg@10"], abs=1e-4)


def test_evaluating_again_embeds_nothing(tiny_run, tmp_path, metrics, monkeypatch):
    """A killed evaluation goes on where it stopped: vectors are found by what they were made from."""
    import sentence_transformers

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded although its vectors are there")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", refuse)
    moved = tmp_path / "moved"  # paths are no part of the key
    shutil.copytree(tiny_run, moved)
    documents = load_documents(moved / "data")
    queries = load_queries(moved / "data", "test", set(documents.ids))
    again = model_row(System("final model", moved / "model"), moved / "data", documents, queries)
    assert again["nDCG@10"] == metrics["systems"][-1]["nDCG@10"]


def test_a_finished_evaluation_is_kept(tiny_run, tmp_path, capsys):
    run, output = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "out"
    argv = ["--run", str(run), "--data", str(run / "data"), "--output_dir", str(output)]
    main(argv)
    before, shown = (output / "metrics.json").read_bytes(), capsys.readouterr().out
    main(argv)
    assert ((output / "metrics.json").read_bytes(), capsys.readouterr().out) == (before, shown)
    path = run / "data" / "corpus" / "qrels.parquet"
    write_parquet(path, read_parquet(path).slice(1))
    main(argv)
    assert json.loads((output / "metrics.json").read_bytes())["counts"]["queries"] == 2


def test_changed_weights_are_embedded_anew(tiny_run, tmp_path, metrics):
    import torch
    from safetensors.torch import load_file, save_file

    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = len(list((run / "data" / "embeddings").iterdir()))
    weights = load_file(run / "model" / "model.safetensors")
    torch.manual_seed(1)
    save_file(
        {name: torch.randn_like(weight) for name, weight in weights.items()},
        run / "model" / "model.safetensors",
        metadata={"format": "pt"},
    )
    documents = load_documents(run / "data")
    queries = load_queries(run / "data", "test", set(documents.ids))
    model_row(System("final model", run / "model"), run / "data", documents, queries)
    assert len(list((run / "data" / "embeddings").iterdir())) == before + 2  # queries and documents
    assert [system.name for system in run_systems(run, tmp_path)] == [
        "untrained",
        "after sts",
        "after retrieval",
        "final model",
    ]


def test_untrained_row_is_the_encoder_before_training(tiny_run, tmp_path):
    from sentence_transformers import SentenceTransformer

    from modeling.encoder import build_encoder
    from modeling.prompts import baked_prompts

    saved = SentenceTransformer(str(run_systems(tiny_run, tmp_path)[0].folder))
    built = build_encoder(
        tiny_run / "student", max_seq_length=64, prompts=baked_prompts("Given a question, retrieve its answer")
    )
    assert saved.prompts == built.prompts
    np.testing.assert_allclose(saved.encode_query(["sort a list"]), built.encode_query(["sort a list"]), atol=1e-6)


@pytest.mark.parametrize(("top_k", "known"), [(3, {"nDCG@10": False, "R@100": False}), (200, {"R@100": True})])
def test_a_cut_candidates_file_gives_no_recall(tiny_run, tmp_path, top_k, known):
    """Documents that BM25 found and fusion cut off would silently lower BM25's recall."""
    data = tmp_path / "data"
    shutil.copytree(tiny_run / "data", data)
    path = data / "candidates" / "candidates.parquet"
    lost_second = [
        {"query_id": "q2", "document_id": "d2", "bm25_rank": None, "dense_rank": 3, "rrf_rank": 2},
        {"query_id": "q2", "document_id": "d5", "bm25_rank": None, "dense_rank": 4, "rrf_rank": 3},
    ]
    table = read_parquet(path)
    write_parquet(path, pa.concat_tables([table, pa.Table.from_pylist(lost_second, table.schema)]))
    write_json(data / "candidates" / "manifest.json", {"inputs": {"fusion": {"top_k": top_k}}})
    queries = load_queries(data, "test", {f"d{number}" for number in range(6)})
    row = retriever_row(
        "dense teacher", queries, *candidate_rankings(data, queries, set(load_documents(data).ids))["dense teacher"]
    )
    assert {measure: row[measure] is not None for measure in known} == known


def test_candidates_of_other_documents_are_refused(tiny_run, tmp_path):
    """A build that was killed between its steps has them. BM25 would find nothing and be easy to beat."""
    data = tmp_path / "data"
    shutil.copytree(tiny_run / "data", data)
    path = data / "candidates" / "candidates.parquet"
    table = read_parquet(path)
    names = [f"old-{name}" for name in table["document_id"].to_pylist()]
    write_parquet(path, table.set_column(table.column_names.index("document_id"), "document_id", [names]))
    flags = ["--run", str(tiny_run), "--data", str(data), "--output_dir", str(tmp_path / "results")]
    with pytest.raises(InputError, match=r"'old-d0' is not in documents\.arrow; build the data again"):
        main(flags)
    assert not (tmp_path / "results").exists()


def test_intervals_hold_the_mean_and_are_paired():
    """A system that is better by the same amount on every query differs by exactly that, however queries vary."""
    generator = np.random.default_rng(0)
    baseline = generator.uniform(0, 0.5, 50)
    rows = [
        {"name": "BM25", "per_query": baseline.tolist()},
        {"name": "better", "per_query": (baseline + 0.25).tolist()},
        {"name": "noisy", "per_query": generator.uniform(0, 1, 50).tolist()},
    ]
    found = {row["name"]: row.get("difference") for row in with_differences(rows)}
    assert found["BM25"] is None
    assert found["better"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["noisy"]["low"] < found["noisy"]["mean"] < found["noisy"]["high"]
    assert all("per_query" not in row for row in with_differences(rows))


def test_graded_relevance_counts():
    queries = Queries("test", ["q"], ["?"], {"q": {"a": 2, "b": 1, "c": 0}})
    best = ranking_scores(queries, {"q": ["a", "b", "c"]})
    swapped = ranking_scores(queries, {"q": ["b", "a", "c"]})
    assert (
        best["nDCG@10"]
        == 1
        > swapped["nDCG@10"]
        == pytest.approx((1 + 2 / math.log2(3)) / (2 + 1 / math.log2(3)), abs=1e-4)
    )


def test_a_query_without_relevant_documents_is_not_asked(tiny_run, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(tiny_run / "data", data)
    qrels = read_parquet(data / "corpus" / "qrels.parquet")
    write_parquet(data / "corpus" / "qrels.parquet", qrels.slice(1))
    queries = load_queries(data, "test", {f"d{number}" for number in range(6)})
    assert queries.ids == ["q1", "q2"]


def test_a_run_without_a_stage_says_so(tiny_run, tmp_path):
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "sts")
    assert missing_stages(tmp_path / "run") == ["sts"]
    assert "after sts" not in [system.name for system in run_systems(tmp_path / "run", tmp_path / "out")]
    shutil.rmtree(tmp_path / "run" / "model")
    with pytest.raises(InputError, match="finish the training"):
        run_systems(tmp_path / "run", tmp_path / "out")
