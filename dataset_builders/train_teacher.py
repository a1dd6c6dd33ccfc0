r"""Fine-tunes a cross-encoder on a build's candidates, so that it can grade them and no query grades itself.

    python -m dataset_builders.train_teacher --config recipes/teacher/teacher.yaml
    python -m dataset_builders.build --config recipes/demo/data.yaml --output_dir DIR \
        --teacher.kind cross_encoder --teacher.model "runs/teacher/without-{fold}"

A hash of a query's text decides its fold. Of each fold a model is trained on all others, into
output_dir/without-FOLD, a plain CrossEncoder folder; where `{fold}` stands in `teacher.model`, a query is graded by
the model that has not seen it. `folds: 1` trains one model on all queries, into output_dir/all: for other sets alone.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from pydantic import Field

from common.cli import ArgumentParser, InputError, run
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import folder_step, read_manifest, read_parquet
from dataset_builders.embeddings import load_model
from dataset_builders.mine import read_graded, rule_out, texts_of
from dataset_builders.teachers import Teacher, fold_of


class TeacherRecipe(Section):
    """What a cross-encoder is trained on, and how."""

    data: str  # folder of a build, with finished corpus/ and candidates/
    output_dir: str  # a folder for each model comes here
    model: str  # to start from: Hub id, folder or package:NAME
    max_seq_length: int | None = Field(None, ge=8)  # tokens of query and document together; null: the model's own
    folds: int = Field(2, ge=1)  # of the queries; a model for each
    num_negatives: int = Field(4, ge=1)  # candidates of a query, drawn evenly from those that are no positive
    learning_rate: float = Field(1e-4, gt=0)
    num_train_epochs: float = Field(1, gt=0)
    per_device_train_batch_size: int = Field(32, ge=1)
    bf16: bool = False  # arithmetic in bfloat16, weights in float32
    seed: int = Field(0, ge=0)

    @property
    def start(self) -> Teacher:
        return Teacher(kind="cross_encoder", model=self.model, max_seq_length=self.max_seq_length)


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m dataset_builders.train_teacher", description=__doc__)
    parser.add_argument("--config", required=True, help="a YAML recipe; see recipes/teacher/")
    options, flags = parser.parse_known_args(argv)
    recipe = parse_recipe(TeacherRecipe, read_yaml(options.config), options.config, flags)
    read = {name: read_manifest(Path(recipe.data, name))["files"] for name in ("corpus", "candidates")}
    keys = recipe.model_dump(exclude={"data", "output_dir"}) | {"model": recipe.start.describe(), "steps": read}
    pairs = labelled_pairs(Path(recipe.data), recipe.num_negatives, recipe.seed)
    folds = pl.Series([fold_of(query, recipe.folds) for query in pairs["query"]])
    if folds.n_unique() < recipe.folds:
        raise InputError(f"{recipe.data}: too few queries for {recipe.folds} folds; lower folds")
    for fold in range(recipe.folds):
        rows = pairs.filter(folds != fold) if recipe.folds > 1 else pairs
        folder = Path(recipe.output_dir, f"without-{fold}" if recipe.folds > 1 else "all")
        with folder_step(folder, {**keys, "fold": fold}) as step:
            if not step.done:
                step.finish(**train(recipe, rows, step.path))
        manifest = read_manifest(folder)
        print(
            f"{folder}: {manifest['pairs']:,} pairs, {manifest['positives']:,} positive, {manifest['seconds']:.0f} s"
        )


def labelled_pairs(data: Path, num_negatives: int, seed: int) -> pl.DataFrame:
    """query, document (texts) and label (1.0 or 0.0): a build's labelled positives of the split that it trains on, and
    `num_negatives` other candidates of each query, drawn evenly: no positive, no near duplicate of one, not its class.

    Raises InputError where there is no positive, or no other candidate.
    """
    pair, split = ["query_id", "document_id"], read_manifest(data / "candidates")["inputs"]["split"]
    graded = read_graded(data / "corpus", data / "scores")
    judged = pl.from_arrow(read_parquet(data / "corpus" / "qrels.parquet", [*pair, "score", "split"]))
    positives = judged.filter((pl.col("split") == split) & (pl.col("score") > 0)).select(*pair, is_positive=True)
    found = pl.from_arrow(read_parquet(data / "candidates" / "candidates.parquet", pair))
    found = found.join(positives, on="query_id", how="semi").join(positives, on=pair, how="full", coalesce=True)
    found = found.with_columns(pl.col("is_positive").fill_null(False)).sort(pair)
    found = rule_out(found, graded.groups, graded.classes)
    drawn = found.filter(pl.col("ruled_out").is_null())
    drawn = drawn.with_columns(order=pl.Series(np.random.default_rng(seed).random(len(drawn))))
    drawn = drawn.filter(pl.col("order").rank("ordinal").over("query_id") <= num_negatives)
    for rows, what in ((positives, "labelled positive"), (drawn, "candidate beside the positives")):
        if not len(rows):
            raise InputError(f"{data}: split {split!r} has no {what}; a teacher cannot learn from it")
    rows = pl.concat([found.filter("is_positive").select(*pair, label=1.0), drawn.select(*pair, label=0.0)]).sort(pair)
    texts = texts_of(graded.queries, rows["query_id"]), texts_of(graded.documents, rows["document_id"])
    query, document = (pl.Series(pl.from_arrow(column)) for column in texts)
    return pl.DataFrame({"query": query, "document": document, "label": rows["label"]})


def train(recipe: TeacherRecipe, pairs: pl.DataFrame, folder: Path) -> dict[str, Any]:
    """Train on `labelled_pairs`, positives weighing as much as the others, and save the model into `folder`."""
    import torch
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )

    torch.manual_seed(recipe.seed)  # of the new head's weights
    model = load_model(CrossEncoder, recipe.start, num_labels=1, max_length=recipe.max_seq_length)
    positives = int(pairs["label"].sum())
    loss = losses.BinaryCrossEntropyLoss(model, pos_weight=torch.tensor((len(pairs) - positives) / positives))
    shared = recipe.model_dump(
        include={"learning_rate", "num_train_epochs", "per_device_train_batch_size", "bf16", "seed"}
    )
    with tempfile.TemporaryDirectory() as scratch:  # nothing is kept there: a fold is trained again as a whole
        arguments = CrossEncoderTrainingArguments(
            scratch,
            **shared,
            warmup_steps=0.1,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
            dataloader_pin_memory=torch.cuda.is_available(),
            use_cpu=not torch.accelerator.is_available(),  # bf16 asks for it
        )
        trainer = CrossEncoderTrainer(model, arguments, Dataset.from_polars(pairs), loss=loss)
        trainer.train()
    model.save_pretrained(str(folder))
    losses_logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"pairs": len(pairs), "positives": positives, "loss": losses_logged}


if __name__ == "__main__":
    run(main)
