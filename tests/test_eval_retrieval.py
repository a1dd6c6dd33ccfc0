"""Scores over a held-out split: by hand, and against vectors and metrics computed another way."""

import json
import math
import re
import shutil

import numpy as np
import pyarrow as pa
import pytest

from common.cli import InputError
from common.steps import read_parquet, write_json, write_parquet
from dataset_builders.fusion import convex_fusion
from eval import systems
from eval.held_out import HeldOut, candidate_rankings, load_held_out
from eval.metrics import final_row, read_metrics, with_differences
from eval.retrieval import (
    choose_weight,
    cosine_quantiles,
    dequantised,
    embed,
    main,
    missing_stages,
    model_row,
    retriever_row,
)
from eval.systems import System, run_systems
from modeling.prompts import baked_prompts, few_shot_prompts
from release.card_metadata import shortened_rows


def evaluate(run, output, *flags):
    main([*flags, "--data", str(run / "data"), "--output_dir", str(output)])
    return json.loads((output / "metrics.json").read_text())


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory):
    """The tiny run, whose final model carries a 2-shot prompt."""
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("retrieval") / "run")
    prompts = baked_prompts("Given a question, retrieve its answer", [("open", "open a file"), ("close", "list")])
    for name in ("retrieval", "model"):
        path = run / name / "config_sentence_transformers.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "prompts": prompts}))
    return run


@pytest.fixture(scope="module")
def metrics(run):
    return evaluate(run, run / "results", "--run", str(run))


@pytest.fixture(scope="module")
def rows(metrics):
    return {row["name"]: row for row in metrics["systems"]}


@pytest.fixture(scope="module")
def held_out(run):
    return load_held_out(run / "data", "test")


def sentence_transformers_scores(model, held_out, **options):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    return InformationRetrievalEvaluator(
        held_out.queries,
        held_out.documents,
        {query_id: set(grades) for query_id, grades in held_out.qrels.items()},
        write_csv=False,
        **options,
    )(SentenceTransformer(str(model)))


def test_rows_are_in_the_order_in_which_systems_came_to_be(metrics, rows):
    """The last stage's files are the final model's: one row, not two."""
    final = "after retrieval (final)"
    models = ["untrained", "after sts", final, f"{final}, 2-shot"]
    assert list(rows) == ["BM25", "dense retriever", "RRF", "convex sum", *models, f"BM25 + {final}"]
    assert [row["kind"] for row in metrics["systems"][-2:]] == ["model", "fusion"]
    assert metrics["counts"] == {"documents": 6, "queries": 3, "relevant": 3}
    assert metrics["not_evaluated"] == []


def test_retriever_rows_by_hand(rows):
    """d0 first for q0, d4 second for q1, nothing for q2, which has to count 0."""
    second = 1 / math.log2(3)
    assert rows["BM25"]["nDCG@10"] == pytest.approx((1 + second) / 3, abs=1e-4)
    assert rows["BM25"]["RR"] == pytest.approx((1 + 1 / 2) / 3, abs=1e-4)
    assert rows["BM25"]["R@100"] == pytest.approx(2 / 3, abs=1e-4)
    assert rows["dense retriever"]["nDCG@10"] == pytest.approx((second + 1) / 3, abs=1e-4)
    assert rows["BM25"]["difference"] is None
    assert rows["dense retriever"]["difference"]["mean"] == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("shots", "suffix"), [("", ""), ("-2-shot", ", 2-shot")])
def test_model_rows_are_those_of_sentence_transformers_own_evaluator(rows, run, held_out, shots, suffix):
    scores = sentence_transformers_scores(run / "model", held_out, query_prompt_name=f"query{shots}")
    row = rows[f"after retrieval (final){suffix}"]
    assert 0 < row["nDCG@10"] < 1 and row["shots"] == (2 if shots else 0)
    assert row["nDCG@10"] == pytest.approx(scores["cosine_ndcg@10"], abs=1e-4)
    assert row["RR"] == pytest.approx(scores["cosine_mrr@10"], abs=1e-4)


def test_cosines_are_those_of_relevant_documents_and_of_others(rows, run, held_out):
    """Against sentence-transformers' whole similarity matrix; all 6 documents are among the first 10."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(run / "model"))
    queries, documents = (list(texts.values()) for texts in (held_out.queries, held_out.documents))
    matrix = model.similarity(model.encode_query(queries), model.encode_document(documents)).numpy()
    relevant = np.array([[id in grades for id in held_out.documents] for grades in held_out.qrels.values()])
    found = rows["after retrieval (final)"]["cosines"]
    assert relevant.sum() == 3 and found["quantiles"] == [5, 25, 50, 75, 95]
    np.testing.assert_allclose(found["relevant"], np.percentile(matrix[relevant], found["quantiles"]), atol=1e-3)
    np.testing.assert_allclose(found["others"], np.percentile(matrix[~relevant], found["quantiles"]), atol=1e-3)


def test_cosines_by_hand():
    """A relevant document counts though it was not retrieved; without others there is nothing to tell of them."""
    vectors = np.eye(3, dtype=np.float32)
    qrels = {"p": {"a": 1}, "q": {"b": 1, "c": 1}}
    asked = HeldOut("test", dict.fromkeys("abc", ""), dict.fromkeys("pq", ""), qrels)
    found = cosine_quantiles((vectors[:2], vectors), {"p": {"a": 1.0}, "q": {"b": 1.0}}, asked)
    assert found == {"relevant": pytest.approx([0.1, 0.5, 1, 1, 1]), "others": None}


# --- fused with BM25 ------------------------------------------------------------------------------------------------


def test_the_weight_is_the_best_one_on_its_queries():
    """BM25 alone is right about q0, the model alone about q1; both with at least half the weight."""
    qrels = {"q0": {"a": 1}, "q1": {"b": 1}}
    sparse = {"q0": {"a": 3.0, "b": 1.0}, "q1": {"c": 2.0, "b": 1.9, "a": 1.0}}
    dense = {"q0": {"b": 0.9, "a": 0.5}, "q1": {"b": 0.9, "c": 0.2}}
    weight = choose_weight(qrels, sparse, dense)
    assert 0.5 <= weight < 0.91
    for query, best in (("q0", "a"), ("q1", "b")):
        assert convex_fusion(sparse[query], dense[query], weight)[0][0] == best
    assert convex_fusion(sparse["q0"], dense["q0"], 0.3)[0][0] == "b"
    assert convex_fusion({}, {"x": 0.4}, 0.7) == [("x", pytest.approx(0.3))]


def test_weights_are_chosen_on_validation_and_told(tiny_run, tmp_path, rows, metrics):
    """The tiny run holds back test queries alone: half and half. With a validation split, what is best there."""
    fused = rows["BM25 + after retrieval (final)"]
    assert fused["weight"] == 0.5 and "weight of BM25 0.50, not chosen" in metrics["notes"][0]
    run = shutil.copytree(tiny_run, tmp_path / "run")
    for name in ("queries", "qrels"):
        path = run / "data" / "corpus" / f"{name}.parquet"
        table = read_parquet(path)
        place = table.column_names.index("split")
        splits = pa.array(["validation" if id == "q1" else "test" for id in table["query_id"].to_pylist()])
        write_parquet(path, table.set_column(place, "split", splits))
    found = evaluate(run, tmp_path / "out", "--run", str(run))
    assert "chosen on 1 validation queries" in found["notes"][0] and found["counts"]["queries"] == 3
    best = evaluate(run, tmp_path / "out2", "--run", str(run), "--split", "validation")
    assert best["systems"][-1]["weight"] == found["systems"][-1]["weight"]
    write_parquet(path, read_parquet(path).set_column(1, "document_id", pa.array(["d0", "other", "d2", "d5"])))
    with pytest.raises(InputError, match=r"qrels.parquet: document 'other' is not in documents"):
        evaluate(run, tmp_path / "out3", "--run", str(run))  # of validation, but no reason to do without
    assert not (tmp_path / "out3").exists()


# --- any model, no run ----------------------------------------------------------------------------------------------


def test_any_models_are_compared_without_a_run(run, tiny_decoder, tmp_path, held_out, capsys):
    """A bare decoder (of 128 positions) is evaluated with last-token pooling; vectors also cut and quantised."""
    names = [str(run / "model"), str(tiny_decoder)]
    compressed = ["--truncate_dim", "8", "8", "--precision", "int8", "binary"]
    found = evaluate(run, tmp_path / "out", "--model", *names, *compressed)
    fused = [f"BM25 + {name}" for name in names]
    cut = [f"{name}, {how}" for name in names for how in ("8 dimensions", "int8", "binary")]
    assert [row["name"] for row in found["systems"]][4:] == [*names, *cut, *fused]
    page = (tmp_path / "out" / "queries.html").read_text()
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert len(data["rows"]) == 3 and {"lost", "won", "equal"} & set(data["tags"])
    for row in data["rows"]:  # the second model against the first, as the metrics have them
        shown = {line["document"]: line for line in row["documents"]}
        assert all(line[name] for line in shown.values() for name in names)
        [grades] = [held_out.qrels[query] for query, text in held_out.queries.items() if text == row["title"]]
        assert [document for document, line in shown.items() if line["relevant"]] == list(grades)
    [short] = shortened_rows(found, {"model": names[0]})
    assert short["name"] == f"{names[0]}, 8 dimensions" and final_row(found)["name"] == names[1]  # for the card
    assert found["run"] is None and all(row["difference"] for row in found["systems"][1:])
    scores = {row["name"]: row["nDCG@10"] for row in found["systems"]}
    truncated = sentence_transformers_scores(run / "model", held_out, query_prompt_name="query", truncate_dim=8)
    assert scores[f"{names[0]}, 8 dimensions"] == pytest.approx(truncated["cosine_ndcg@10"], abs=1e-4)
    assert f"| {names[0]} | {scores[names[0]]:.3f} |" in capsys.readouterr().out


def test_a_length_that_a_later_model_does_not_have_is_refused_before_any_is_scored(run, tmp_path, monkeypatch):
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense

    modules = [*SentenceTransformer(str(run / "model"))][:2]
    SentenceTransformer(modules=[*modules, Dense(32, 16)]).save(str(tmp_path / "short"))
    names = [str(run / "model"), str(tmp_path / "short")]
    monkeypatch.setattr("eval.retrieval.evaluate", lambda *args: pytest.fail("the first was scored"))
    for models, dimensions, said in ((names, "20", "20: .*short has 16"), (names[:1], "99", "99: .*model has 32")):
        with pytest.raises(InputError, match=f"--truncate_dim {said}; lower it"):
            evaluate(run, tmp_path / "out", "--model", *models, "--truncate_dim", "8", dimensions)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", [{"dimensions": 8}, {"precision": "int8"}])
def test_compressed_vectors_are_compared_as_the_model_says(run, held_out, tmp_path, how):
    """By inner products where these are its similarity: lengths count, and none is called a cosine."""
    from sentence_transformers import SentenceTransformer

    modules = [*SentenceTransformer(str(run / "model"))][:2]  # without the one that makes unit vectors
    SentenceTransformer(modules=modules, similarity_fn_name="dot").save(str(tmp_path / "dot"))
    model = SentenceTransformer(str(tmp_path / "dot"), truncate_dim=how.get("dimensions"))
    queries, documents = (list(texts.values()) for texts in (held_out.queries, held_out.documents))
    vectors = model.encode_query(queries), model.encode_document(documents)
    expected = model.similarity(*vectors).numpy()
    row, ranking = model_row(System("dot", str(tmp_path / "dot"), **how), tmp_path / "embeddings", held_out)
    found = [[scores[document] for document in held_out.documents] for scores in ranking.values()]
    np.testing.assert_allclose(found, expected, atol=0.5)  # int8's steps are 1/255 of a dimension's range
    lengths = [np.linalg.norm(side, axis=1) for side in vectors]
    assert np.abs(expected / np.outer(*lengths) - expected).max() > 1 and "cosines" not in row


def test_models_run_in_the_dtype_that_is_asked_for(run, held_out):
    """Weights and products of sentence-transformers in bfloat16, whose vectors are not those of float32."""
    from sentence_transformers import SentenceTransformer

    texts = list(held_out.queries.values())
    reference = SentenceTransformer(str(run / "model"), model_kwargs={"dtype": "bfloat16"})
    expected = reference.encode_query(texts, normalize_embeddings=True)
    found, saved = (
        np.asarray(embed(System("model", str(run / "model"), dtype=dtype), run / "dtypes", held_out)[0])
        for dtype in ("bfloat16", None)
    )
    assert np.abs(found - expected).max() < 2e-3 < np.abs(found - saved).max()


def test_quantised_vectors_stay_near():
    vectors = np.random.default_rng(0).normal(size=(50, 32)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    near = {kind: dequantised(vectors, kind) for kind in ("int8", "binary")}
    cosines = {
        kind: ((found * vectors).sum(axis=1) / np.linalg.norm(found, axis=1)).min() for kind, found in near.items()
    }
    assert cosines["int8"] > 0.999 and 0.6 < cosines["binary"] < 0.95


def test_a_published_embedder_starts_as_it_is_and_a_decoder_with_demonstrations(run, tiny_decoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    rows = pa.table({"query": ["open", "sort", "parse"], "positive": ["open a file", "sort a list", "parse a date"]})
    data = shutil.copytree(run / "data", tmp_path / "data")
    (data / "mined").mkdir()
    write_parquet(data / "mined" / "mined.parquet", rows)
    resolved = json.loads((run / "stages.json").read_text())
    resolved["stages"][-1]["keys"] |= {"instruction": "retrieve its answer", "max_seq_length": 128}

    def untrained(model, published):
        start = {"model": str(model), "revision": None, "published": published}
        write_json(tmp_path / "stages.json", resolved | {"start": start})
        return systems.untrained_systems(tmp_path, data, tmp_path / "out")

    zero, one, two, mean = untrained(tiny_decoder, None)
    names = [f"untrained{how}" for how in ("", ", 1-shot", ", 2-shot", ", mean pooling")]
    assert [system.name for system in (zero, one, two, mean)] == names
    assert one.model == two.model == zero.model and two.query_prompt.count("Response: ") == 2
    bare, averaged = (SentenceTransformer(system.model) for system in (zero, mean))
    assert bare.prompts["query"] == "Instruct: retrieve its answer\nQuery: "
    assert few_shot_prompts(averaged.prompts) == {1: one.query_prompt, 2: two.query_prompt}  # for run_mteb --shots
    assert (bare[1].pooling_mode, averaged[1].pooling_mode) == ("lasttoken", "mean")
    assert untrained(run / "model", {"pooling": "lasttoken"}) == [System("untrained", str(run / "model"))]
    shutil.rmtree(data / "mined")  # graded elsewhere
    assert [system.name for system in untrained(tiny_decoder, None)] == [names[0], names[-1]]


# --- resuming -------------------------------------------------------------------------------------------------------


def test_evaluating_again_embeds_nothing(run, tmp_path, metrics, monkeypatch, held_out):
    """A killed evaluation goes on where it stopped: vectors are found by what they were made from."""
    import sentence_transformers

    def refuse(*args, **kwargs):
        raise AssertionError("a model was loaded although its vectors are there")

    monkeypatch.setattr(sentence_transformers, "SentenceTransformer", refuse)
    moved = shutil.copytree(run, tmp_path / "moved")
    again, _ = model_row(System("final", str(moved / "model")), moved / "data" / "embeddings", held_out)
    assert again["nDCG@10"] == next(row for row in metrics["systems"] if "(final)" in row["name"])["nDCG@10"]


def test_a_finished_evaluation_is_kept_until_a_file_changes(run, metrics, tmp_path, capsys):
    copy = shutil.copytree(run, tmp_path / "run")
    path = copy / "results" / "metrics.json"
    before = path.read_bytes()
    assert read_metrics(copy / "results") == metrics
    main(["--run", str(copy), "--data", str(copy / "data"), "--output_dir", str(copy / "results")])
    assert path.read_bytes() == before and "| BM25 | 0.544 |" in capsys.readouterr().out
    judgements = copy / "data" / "corpus" / "qrels.parquet"
    write_parquet(judgements, read_parquet(judgements).slice(1))
    assert evaluate(copy, copy / "results", "--run", str(copy))["counts"]["queries"] == 2


def test_changed_weights_are_embedded_anew(run, tmp_path, metrics, held_out):
    import torch
    from safetensors.torch import load_file, save_file

    copy = shutil.copytree(run, tmp_path / "run")
    cache = copy / "data" / "embeddings"
    before = len(list(cache.iterdir()))
    torch.manual_seed(1)
    path = copy / "model" / "model.safetensors"
    weights = {name: torch.randn_like(weight) for name, weight in load_file(path).items()}
    save_file(weights, path, metadata={"format": "pt"})
    model_row(System("final model", str(copy / "model")), cache, held_out)
    assert len(list(cache.iterdir())) == before + 2  # queries and documents
    names = [system.name for system in run_systems(copy, copy / "data", tmp_path)]
    assert names == ["untrained", "after sts", "after retrieval", "final model", "final model, 2-shot"]


# --- what is told ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "known"), [(3, {"nDCG@10": False, "R@100": False}), (200, {"R@100": True})])
def test_a_cut_candidates_file_gives_no_recall(tiny_run, tmp_path, top_k, known, held_out):
    """Documents that BM25 found and fusion cut off would silently lower BM25's recall."""
    data = shutil.copytree(tiny_run / "data", tmp_path / "data")
    path = data / "candidates" / "candidates.parquet"
    lost_second = [
        {"query_id": "q2", "document_id": "d2", "dense_rank": 3, "dense_score": 0.3, "rrf_rank": 2, "rrf_score": 0.5},
        {"query_id": "q2", "document_id": "d5", "dense_rank": 4, "dense_score": 0.2, "rrf_rank": 3, "rrf_score": 0.3},
    ]
    table = read_parquet(path)
    write_parquet(path, pa.concat_tables([table, pa.Table.from_pylist(lost_second, table.schema)]))
    write_json(data / "candidates" / "manifest.json", {"inputs": {"fusion": {"top_k": top_k}}})
    row = retriever_row("dense retriever", held_out, *candidate_rankings(data, held_out)["dense retriever"])
    assert {measure: row[measure] is not None for measure in known} == known


def test_a_short_list_of_a_retriever_gives_no_recall_of_it_and_of_what_is_fused_from_it(
    tiny_run, tmp_path, held_out, monkeypatch
):
    """BM25 stopped at 2 of 6 documents; the dense retriever could have gone on to the end."""
    data = shutil.copytree(tiny_run / "data", tmp_path / "data")
    inputs = {"fusion": {"top_k": None}, "bm25": {"top_k": 2}, "dense": {"top_k": 6}}
    write_json(data / "candidates" / "manifest.json", {"inputs": inputs})
    monkeypatch.setattr("eval.held_out.DEPTH", 5)
    found = {name: complete for name, (_, complete) in candidate_rankings(data, held_out).items()}
    assert found == {"BM25": 2, "dense retriever": 5, "RRF": 2, "convex sum": 2}
    inputs["bm25"]["top_k"] = 6
    write_json(data / "candidates" / "manifest.json", {"inputs": inputs})
    assert {complete for _, complete in candidate_rankings(data, held_out).values()} == {5}


def test_fusion_looks_as_deep_as_it_says_however_many_documents_a_build_keeps(run, held_out, monkeypatch):
    """Deeper lists have a lower last score, so the same document would get another share of the sum."""
    whole = candidate_rankings(run / "data", held_out)
    monkeypatch.setattr("eval.held_out.DEPTH", 1)
    for name, (ranking, _) in candidate_rankings(run / "data", held_out).items():
        assert ranking == {query: dict([*found.items()][:1]) for query, found in whole[name][0].items()}


def test_intervals_hold_the_mean_and_are_paired():
    """A system that is better by the same amount on every query differs by exactly that, however queries vary."""
    generator = np.random.default_rng(0)
    baseline = generator.uniform(0, 0.5, 50)
    scores = {"BM25": baseline, "better": baseline + 0.25, "noisy": generator.uniform(0, 1, 50)}
    finished = with_differences([{"name": name, "per_query": values.tolist()} for name, values in scores.items()])
    found = {row["name"]: row.get("difference") for row in finished}
    assert found["BM25"] is None and all("per_query" not in row for row in finished)
    assert found["better"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    assert found["noisy"]["low"] < found["noisy"]["mean"] < found["noisy"]["high"]


def test_a_run_without_a_stage_says_so(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copy / "sts")
    assert missing_stages(copy) == ["sts"]
    assert "after sts" not in [system.name for system in run_systems(copy, copy / "data", tmp_path / "out")]


def test_a_folder_with_a_model_and_no_record_of_its_run_is_evaluated_as_it_is(tiny_encoder, tmp_path):
    shutil.copytree(tiny_encoder, tmp_path / "run" / "model")
    found = run_systems(tmp_path / "run", tmp_path / "data", tmp_path / "out")
    assert found == [System("final model", str(tmp_path / "run" / "model"), with_bm25=True)]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: not a training run"):
        run_systems(tmp_path / "empty", tmp_path / "data", tmp_path / "out")
