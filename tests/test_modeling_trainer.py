"""Runs that end early: killed ones go on with the batches they would have had, non-finite numbers stop one at once."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
from torch import nn
from transformers import TrainerCallback

from common.cli import InputError
from modeling.demonstrations import Demonstrations
from modeling.losses import GradedLoss
from modeling.prompts import instruction_prompt
from modeling.trainer import EmbedderTrainer, last_checkpoint, log_line

INSTRUCTION = "retrieve answer"
VOCABULARY = ["how", "do", "i", "parse", "date", "read", "write", "file", "open", "close", "sort", "list"]


def mined(rows: int, seed: int) -> Dataset:
    """Mined rows of 6-word texts, whose documents several rows share."""
    generator = np.random.default_rng(seed)
    documents = [" ".join(generator.choice(VOCABULARY, 6)) for _ in range(10 * rows)]
    drawn = generator.integers(0, len(documents), (rows, 3))
    columns = [[documents[number] for number in drawn[:, at]] for at in range(3)]
    queries = [" ".join(generator.choice(VOCABULARY, 6)) for _ in range(rows)]
    names = ("query", "positive", "negative_1", "negative_2")
    return Dataset.from_dict(dict(zip(names, [queries, *columns], strict=True)) | {"label": [[0.9, 0.3, 0.1]] * rows})


class Recorder(nn.Module):
    """A loss that also writes down what it was given, as token ids."""

    def __init__(self, model: SentenceTransformer, batches: list) -> None:
        super().__init__()
        self.loss, self.batches = GradedLoss(model), batches
        self.in_batch_negatives = True

    def forward(self, columns, labels):
        columns = list(columns)
        self.batches.append([column["input_ids"].tolist() for column in columns])
        return self.loss(columns, labels)


def trainer(model: Path, folder: Path, batches: list, *callbacks: TrainerCallback, **settings) -> EmbedderTrainer:
    """Two data sets of unequal shares, one of them with demonstrations; 3 epochs of 12 steps (of 6 on two devices)."""
    encoder = SentenceTransformer(str(model), device="cpu")
    data = {"shown": mined(24, 0), "plain": mined(24, 1)}
    prompts = {"shown": {"query": instruction_prompt(INSTRUCTION)}, "plain": {"query": "query : "}}
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        prompts=prompts,
        save_steps=5,
        save_total_limit=1,
        logging_steps=4,
        disable_tqdm=True,
        report_to="none",
        use_cpu=True,
        seed=3,
        **settings,
    )
    return EmbedderTrainer(
        model=encoder,
        args=arguments,
        train_dataset=data,
        loss={name: Recorder(encoder, batches) for name in data},
        weights={"shown": 2, "plain": 1},
        demonstrations={"shown": Demonstrations(data["shown"], INSTRUCTION, shots=2, zero_shot_probability=0.3)},
        callbacks=list(callbacks),
    )


class Failure(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise RuntimeError("struck by lightning")


def test_a_resumed_run_has_the_batches_of_a_whole_one(tiny_encoder, tmp_path):
    """Rows, their order and their prompts, in the second epoch (after step 12) and in the third."""
    expected, struck = [], 18
    run = trainer(tiny_encoder, tmp_path / "whole", expected)
    run.train()
    assert len(expected) == 36
    assert [len({str(batch[0]) for batch in expected[begin : begin + 12]}) for begin in (0, 12, 24)] == [12] * 3
    assert expected[:12] != expected[12:24] != expected[24:]
    shown = [batch[0][0] for batch in expected]
    assert len({len(ids) for ids in shown}) > 3  # prompts of several lengths

    before = []
    with pytest.raises(RuntimeError, match="lightning"):
        trainer(tiny_encoder, tmp_path, before, Failure(struck)).train()
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint.endswith(f"-{struck // 5 * 5}")
    after = []
    resumed = trainer(tiny_encoder, tmp_path, after)
    resumed.train(resume_from_checkpoint=checkpoint)
    assert before == expected[:struck]
    assert after == expected[struck // 5 * 5 :]
    weights = [dict(each.model.named_parameters()) for each in (run, resumed)]
    assert max((value - weights[1][name]).abs().max().item() for name, value in weights[0].items()) < 1e-6
    assert [entry["tokens"] for entry in resumed.state.log_history] == [
        entry["tokens"] for entry in run.state.log_history
    ]


# --- non-finite numbers ---------------------------------------------------------------------------------------------


class Poisoned(nn.Module):
    """Finite until its third call; then the loss, or its gradient alone, is not."""

    def __init__(self, model: SentenceTransformer, what: str) -> None:
        super().__init__()
        self.loss, self.what, self.calls = GradedLoss(model), what, 0

    def forward(self, columns, labels):
        self.calls += 1
        loss = self.loss(columns, labels)
        if self.calls < 8:
            return loss
        if self.what == "gradient":
            loss.register_hook(lambda gradient: gradient * float("nan"))
            return loss
        return loss * float(self.what)


@pytest.mark.parametrize("what", ["nan", "gradient"])
def test_a_non_finite_number_stops_training(tiny_encoder, tmp_path, what):
    """Before the optimizer's step: the checkpoint that is named, and the weights, stay good."""
    run = trainer(tiny_encoder, tmp_path, [])
    poisoned = Poisoned(run.model, what)
    run.loss = dict.fromkeys(run.loss, poisoned)
    name = "norm of the gradient is nan" if what == "gradient" else f"loss on data set '.*' is {what}"
    with pytest.raises(InputError, match=f"^step 8: the {name}; lower learning_rate .* checkpoint is .*checkpoint-5$"):
        run.train()
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert run.state.global_step == 7


def test_a_cost_reads_the_clock_once(tiny_encoder, tmp_path, monkeypatch):
    """Two readings are now and then a hundredth apart: one device's seconds would not be those of training."""
    run = trainer(tiny_encoder, tmp_path, [])
    monkeypatch.setattr("modeling.trainer.time", SimpleNamespace(monotonic=itertools.count(run.started).__next__))
    cost = run.cost(None)
    assert cost["device_seconds"] == cost["training_seconds"]


# --- what a person reads --------------------------------------------------------------------------------------------


def test_evaluations_show_ndcg_alone():
    logs = {"eval_a_cosine_ndcg@10": 0.31, "eval_a_cosine_map@100": 0.2, "eval_runtime": 3.0, "seconds": 1.0}
    assert log_line(5, 9, {**logs, "tokens": 1000}) == "step 5/9: nDCG@10 0.3100 (a), 1 s, 1,000 tokens"
    assert log_line(9, 9, {"train_runtime": 3.0, "train_loss": 0.2, "seconds": 1.0, "tokens": 1}) == ""
