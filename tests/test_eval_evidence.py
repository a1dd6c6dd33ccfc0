"""What a run's files say about its model: only its own results, pictures and data, and nothing of a broken run."""

import json
import shutil
from pathlib import Path

import pytest
from tiny_mteb import write_mteb

from common.cli import InputError
from common.steps import read_parquet, write_json, write_parquet
from eval import evidence, report
from eval.evidence import changed_since, provenance, read_evidence
from modeling.recipe import read_stages


@pytest.fixture
def copy(reported_run, tmp_path):
    return shutil.copytree(reported_run, tmp_path / "run")


def test_provenance_is_that_of_the_manifests(graded_data, tmp_path):
    found = provenance(graded_data / "hub")
    assert (found["title"], found["split"], found["commit"]) == ("questions", "train", None)
    assert found["rows"]["train"] == 40 and found["compared"] == ["SciFact"] and found["mined"]
    assert found["models"] == {"dense": "teacher", "teacher": "teacher"}
    assert provenance(tmp_path) is None


def test_what_data_were_compared_with_is_known_or_left_open(graded_data, tmp_path):
    """Pairs of sentences have a manifest of their own; of data/hub alone nobody can say that nothing was dropped."""
    shutil.copytree(graded_data / "hub", tmp_path / "hub")
    assert provenance(tmp_path / "hub")["compared"] is None
    shutil.copytree(graded_data / "corpus", tmp_path / "sts")
    assert provenance(tmp_path / "hub")["compared"] == ["SciFact"]


def test_zero_shot_share_needs_every_source_to_state_its_own():
    entry = {"benchmark": "MTEB(eng, v2)"}
    known = {"a": {**entry, "training_datasets": ["ArguAna"]}, "b": {**entry, "training_datasets": ["MSMARCO"]}}
    found = evidence.disclosure(known)
    assert found["training_datasets"] == ["ArguAna", "MSMARCO"] and found["trained_on"] == ["ArguAna"]
    assert 90 < found["zero_shot_percentage"] < 100
    on_e5 = evidence.disclosure(known, "intfloat/e5-mistral-7b-instruct")  # which mteb knows to have seen FEVER
    assert on_e5["training_datasets"] == found["training_datasets"] and "FEVERHardNegatives" in on_e5["trained_on"]
    private = evidence.disclosure({"a": {**entry, "training_datasets": []}})
    assert (private["training_datasets"], private["zero_shot_percentage"]) == ([], 100)
    assert evidence.disclosure({**known, "c": None}) is None
    assert evidence.disclosure({**known, "c": {**entry, "training_datasets": None}}) is None
    assert evidence.disclosure({}) is None


def test_the_data_of_a_model_that_was_averaged_in_are_the_models_too(copy, graded_data, tmp_path):
    """Of another run, and of a model of which nothing is known: then no zero-shot share is told."""
    own = [*read_evidence(copy)["data"]]
    other = tmp_path / "other"
    other.mkdir()
    datasets = {"a": {"dataset_name": "org/a"}, "b": {"dataset_name": own[0]}}
    write_json(other / "stages.json", {"start": {}, "stages": [{"name": "nli", "keys": {}, "datasets": datasets}]})
    text, found = (copy / "recipe.yaml").read_text(), []
    for name in (other / "nli", tmp_path / "alone"):
        (copy / "recipe.yaml").write_text(f"{text}merge: {{stages: [retrieval, {name}]}}\n")
        found.append([*read_evidence(copy)["data"]])
    assert len(own) == 1 and found == [[*own, "org/a"], [*own, str(tmp_path / "alone")]]


def test_only_results_of_these_weights_are_the_models(reported_run, copy, tmp_path):
    """They are found by the hash of the weights, or by a commit that has the same files."""
    commits = ["a" * 40, "b" * 40]
    written = write_mteb(tmp_path / "more", reported_run / "model", {"ArguAna": ("test", "ndcg_at_10", 0.25)})
    scores = {found.task_name: found.get_score() for found in read_evidence(reported_run, tmp_path / "more")["mteb"]}
    assert scores == {"ArguAna": 0.25, "STSBenchmark": 0.75, "SciFact": 0.9}  # a named folder comes first
    written.rename(written.with_name(commits[0]))
    [found] = read_evidence(reported_run, tmp_path / "more", commits=commits)["mteb"][:1]
    assert (found.task_name, found.get_score()) == ("ArguAna", 0.25)
    with pytest.raises(InputError, match=r"neither metrics\.json nor mteb's results"):
        read_evidence(reported_run, tmp_path / "more", commits=commits[1:])
    change(copy / "model")
    (copy / "results" / "metrics.json").unlink()
    assert read_evidence(reported_run)["mteb"] and not read_evidence(copy)["mteb"]


@pytest.mark.parametrize("run", [None, "../../elsewhere"], ids=["models compared", "another run"])
def test_scores_of_others_are_not_the_models(copy, run):
    """The last model of a comparison may be anyone's."""
    metrics = json.loads((copy / "results" / "metrics.json").read_text())
    write_json(copy / "results" / "metrics.json", {**metrics, "run": run})
    with pytest.raises(InputError, match=r"metrics.json: is not of .*eval.retrieval --run"):
        read_evidence(copy)


def change(model):
    config = model / "config_sentence_transformers.json"
    config.write_text(config.read_text().replace("its answer", "an answer"))


def test_scores_of_an_earlier_training_are_not_the_models(copy):
    """Trained anew and not evaluated anew."""
    change(copy / "model")
    for read in (lambda: read_evidence(copy), lambda: report.main([str(copy / "results"), "--output_dir", "out"])):
        with pytest.raises(InputError, match=r"metrics\.json: of another model than .* is now; run `python -m ev"):
            read()


def test_pictures_of_other_results_are_refused(copy):
    """Evaluated anew and not reported anew: table and picture would disagree."""
    metrics = json.loads((copy / "results" / "metrics.json").read_text())
    write_json(copy / "results" / "metrics.json", {**metrics, "key": "another"})
    with pytest.raises(InputError, match=r"systems.png: drawn from other results .*eval.report"):
        read_evidence(copy)


def test_data_that_were_built_again_after_training_are_told(finished, hub, tmp_path):
    """Of a real run: the files that its stages were trained on, and one of them with another row."""
    stages = read_stages(finished)["stages"]
    assert changed_since(finished, stages) == set() and {Path(own["dataset_name"]) for own in datasets(stages)} == {
        hub
    }
    again = shutil.copytree(hub, tmp_path / "hub")
    for own in datasets(stages):
        own["dataset_name"] = str(again)
    assert changed_since(finished, stages) == set(), "the same files elsewhere"
    write_parquet(again / "train.parquet", read_parquet(again / "train.parquet").slice(1))
    assert changed_since(finished, stages) == {str(again)}


def datasets(stages):
    return [own for stage in stages for own in stage["datasets"].values()]
