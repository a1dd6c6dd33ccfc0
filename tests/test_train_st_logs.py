"""What a run leaves to look at: files of tensorboard and of others, scores of NanoBEIR, a stage that ends early."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import NanoBEIREvaluator
from tiny_training import distance, train
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from common.cli import InputError
from modeling.trainer import EmbedderTrainer


@pytest.fixture(scope="module")
def recipe(recipe) -> dict:
    return {**recipe, "eval_strategy": "no", "max_steps": 4, "save_steps": 2, "logging_steps": 1}


class Writer:
    """What transformers' callback needs of tensorboard's SummaryWriter."""

    def __init__(self, log_dir: str) -> None:
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self.path = Path(log_dir) / f"events.{len(os.listdir(log_dir))}"
        self.path.touch()

    def add_scalar(self, name, value, step):
        with self.path.open("a") as file:
            file.write(f"{name} {step}\n")

    def add_text(self, *_):
        pass

    add_hparams = flush = close = add_text


class Emissions(TrainerCallback):
    """Writes beside the checkpoints, as codecarbon does; and dies once, at step 3 of the second stage."""

    died = False

    def on_step_end(self, args, state, control, **kwargs):
        Path(args.output_dir).mkdir(exist_ok=True)
        Path(args.output_dir, "emissions.csv").write_text(f"step {state.global_step}")
        if "retrieval" in args.output_dir and state.global_step == 3 and not self.died:
            Emissions.died = True
            raise KeyboardInterrupt


def test_event_files_and_what_lies_beside_checkpoints_survive_a_resumed_run(recipe, tmp_path, monkeypatch):
    original = EmbedderTrainer.__init__

    def with_emissions(self, **settings):
        original(self, **settings)
        self.add_callback(Emissions)

    monkeypatch.setattr(EmbedderTrainer, "__init__", with_emissions)
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", type("Module", (), {"SummaryWriter": Writer}))
    recipe = {**recipe, "report_to": ["tensorboard"]}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, recipe)
    output = train(tmp_path, recipe, "--resume_from_checkpoint", "true")
    losses = {}
    for path in (output / "logs").rglob("events.*"):
        lines = path.read_text().splitlines()
        losses[str(path.relative_to(output / "logs"))] = [line for line in lines if line.startswith("train/loss")]
    steps = [f"train/loss {step}" for step in range(1, 5)]
    assert losses == {"sts/events.0": steps, "retrieval/events.0": steps[:2], "retrieval/events.1": steps[2:]}
    assert [path.read_text() for path in (output / "logs").glob("*/emissions.csv")] == ["step 4"] * 2
    assert not list(output.rglob("checkpoint*"))
    assert not {"TENSORBOARD_LOGGING_DIR", "WANDB_DIR", "TRACKIO_DIR"} & set(os.environ)


def test_sets_of_nanobeir_are_measured_beside_validation(recipe, tmp_path, monkeypatch, capsys):
    """Read by sentence-transformers, with the stage's prompts; offline one line says so before anything is trained."""
    keys = {"eval_strategy": "steps", "eval_steps": 2, "nanobeir": ["nq", "msmarco"], "stages": recipe["stages"][1:]}
    with pytest.raises(InputError, match=r"'retrieval': nanobeir nq, msmarco: .*; it needs the Hub, or its sets in"):
        train(tmp_path, {**recipe, **keys})
    assert not (tmp_path / "run").exists()
    with pytest.raises(InputError, match="nanobeir is measured at evaluations; set eval_strategy"):
        train(tmp_path, {**recipe, **keys, "eval_strategy": "no"})

    asked = ["how do i read", "open file", "write"]

    def load(self, subset, split, required_columns):
        texts = {"NanoNQ": ["parse a date", "sort list"], "NanoMSMARCO": ["how do i read", "open file", "write"]}[
            split
        ]
        rows = [{"_id": f"{place}", "text": text} for place, text in enumerate(texts)]
        pairs = [{"query-id": row["_id"], "corpus-id": row["_id"]} for row in rows]
        return {"queries": rows, "corpus": rows, "qrels": pairs}[subset]

    monkeypatch.setattr(NanoBEIREvaluator, "_load_dataset_subset_split", load)
    with pytest.raises(InputError, match=r"metric_for_best_model is 'eval_nq'; .* eval_NanoNQ_cosine_ndcg@10"):
        train(tmp_path, {**recipe, **keys, "metric_for_best_model": "eval_nq", "load_best_model_at_end": True})
    output = train(tmp_path, {**recipe, **keys})
    history = json.loads((output / "logs/retrieval.json").read_text())
    model = SentenceTransformer(str(output / "model"))
    scores = model.similarity(model.encode_query(asked), model.encode_document(asked))
    ranks = (scores > scores.diag()[:, None]).sum(dim=1) + 1  # of each query's own text
    expected = (1 / (ranks + 1.0).log2()).mean().item()
    measured = [entry["eval_NanoMSMARCO_cosine_ndcg@10"] for entry in history if "eval_runtime" in entry]
    assert len(measured) == 2 and measured[-1] == pytest.approx(expected, abs=1e-6)
    lines = re.findall(r"nDCG@10 [\d.]+, nDCG@10 [\d.]+ \(NanoNQ\), nDCG@10 [\d.]+ \(NanoMS", capsys.readouterr().out)
    assert len(lines) == 2


def test_the_best_is_chosen_by_any_measure_that_is_named(recipe, tmp_path):
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 2, "load_best_model_at_end": True}
    recipe = {**recipe, **keys, "stages": recipe["stages"][:1]}
    for measure in ("ndcg", "mrr", "map", "recall", "precision", "accuracy"):
        (tmp_path / measure).mkdir()
        train(tmp_path / measure, recipe, "--metric_for_best_model", f"eval_validation_cosine_{measure}@10")
    with pytest.raises(InputError, match="evaluations measure eval_validation_cosine_ndcg@10, or mrr, map"):
        train(tmp_path, recipe, "--metric_for_best_model", "eval_validation_cosine_f1@10")


def test_a_stage_ends_when_evaluations_get_no_better_and_keeps_its_best(recipe, tmp_path, monkeypatch):
    """Of scores 0.1, 0.3, 0.2, 0.25, 0.4, patience 2 sees four, and the model is that of the second."""
    scores = dict(enumerate([0.1, 0.3, 0.2, 0.25, 0.4], start=1))
    best = "eval_validation_cosine_ndcg@10"

    def evaluate(self, *_, **__):
        metrics = {best: scores[self.state.global_step]}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    monkeypatch.setattr(EmbedderTrainer, "evaluate", evaluate)
    keys = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 5}
    recipe = {**recipe, **keys, "stages": recipe["stages"][:1]}
    (tmp_path / "whole").mkdir()
    output = train(tmp_path, recipe, "--early_stopping_patience", "2")
    history = json.loads((output / "logs/sts.json").read_text())
    assert [entry[best] for entry in history if best in entry] == [0.1, 0.3, 0.2, 0.25]
    (tmp_path / "best").mkdir()
    alone = train(tmp_path / "best", recipe, "--save_strategy", "best", "--max_steps", "4")
    kept = [entry[best] for entry in json.loads((alone / "logs/sts.json").read_text()) if best in entry]
    assert kept == [0.1, 0.3, 0.2, 0.25]
    scores[5] = 0.0
    recipe["save_steps"] = 3  # the best is saved between
    whole = train(tmp_path / "whole", recipe, "--load_best_model_at_end", "true")
    assert len(json.loads((whole / "logs/sts.json").read_text())) > len(history)
    assert distance(whole / "model", output / "model") == 0
