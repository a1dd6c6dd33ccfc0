"""Where a run starts: a model as it was published, or a student built on the spot; what the stages keep of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import HTTPError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import ModelConfig

from common.cli import InputError
from common.models import fetch_settings, hub_commit, resolve_model, unlike_hub
from common.plain_text import check_words
from common.steps import files_of, fingerprint
from modeling.batches import LABEL
from modeling.encoder import Published, read_published
from modeling.keys import DEFAULT_LENGTH, DatasetArguments
from modeling.processes import make_once
from modeling.prompts import QUERY_TEMPLATE, baked_prompts, instruction_prompt, template_of
from modeling.recipe import Recipe, Stage
from modeling.student import build_student
from modeling.tokens import finish_texts


@dataclass(frozen=True)
class TrainedAdapter:
    """The same weights in two parts, from which a next stage with equal settings goes on."""

    folder: Path
    settings: dict[str, Any]
    base: Start


@dataclass(frozen=True)
class Start:
    """The weights a stage starts from: a Hub id or a folder."""

    name_or_path: str
    revision: str | None
    key: str  # changes when the weights do
    reference: str  # as the recipe wrote it
    adapter: TrainedAdapter | None = None
    published: Published | None = None  # what a run's start is as a finished embedder; None: a bare model, the student

    def adapter_for(self, stage: Stage) -> TrainedAdapter | None:
        """The adapter that `stage` goes on with: one of its own settings."""
        return self.adapter if self.adapter and self.adapter.settings == stage.lora_settings else None

    def name_from(self, folder: Path) -> str:
        """How an adapter in `folder` names this base: a Hub id, a package or GGUF file as the recipe wrote it, or a
        path relative to the folder.
        """
        if self.reference.startswith("package:") or self.reference.endswith(".gguf"):
            return self.reference
        if Path(self.name_or_path).is_dir():
            return os.path.relpath(self.name_or_path, folder)
        return self.reference.partition("@")[0]

    def facts(self) -> dict[str, Any]:
        """What stages.json and cards say of the model that a run started from."""
        if self.reference == "student":
            return {"model": "student", "revision": None, "published": None, "quantisation": None}
        published = self.published and {
            **dataclasses.asdict(self.published),
            "pooling": self.published.pooling_name,
        }
        quantisation = resolve_model(self.reference).quantisation()
        facts = {"model": unlike_hub(self.reference), "revision": self.revision}
        return {**facts, "published": published, "quantisation": quantisation}


def first_start(recipe: Recipe) -> Start:
    """Where the first stage starts: the recipe's model, or the student that it describes, built now."""
    config = recipe.student
    if config is None:
        return published_start(recipe.stages[0].model)
    instruction = recipe.values.get("instruction")
    if instruction and "prompt" not in config.model_fields_set:
        config = config.model_copy(update={"prompt": instruction_prompt(instruction)})
    folder = recipe.output_dir / "student"
    inputs = {
        **config.model_dump(),
        "teacher": resolve_model(config.teacher).fingerprint(),
        "corpus": fingerprint(files_of(Path(config.corpus))),
    }
    return Start(str(folder), None, make_once(folder, inputs, lambda path: build_student(config, path)), "student")


def published_start(model: ModelConfig) -> Start:
    """The recipe's model: of a Hub id the commit that it names now, for all stages and for the adapter to name."""
    reference = resolve_model(model.model_name_or_path)
    revision = None if model.model_revision == "main" else model.model_revision
    if revision and (reference.is_local or reference.revision not in (None, revision)):
        other = "is a folder, which has none" if reference.is_local else "names another"
        raise InputError(
            f"model_revision is {revision!r}, but {reference.reference!r} {other}; --model_revision main drops it"
        )
    if not reference.is_local:
        revision = hub_commit(reference.name_or_path, reference.revision or revision)
        reference = dataclasses.replace(reference, revision=revision)
    fetch_settings(reference)
    names = (reference.name_or_path, reference.revision, reference.fingerprint(), reference.reference)
    return Start(*names, published=read_published(reference))


def load_tokenizer(start: Start, pooling: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as encoders of this `pooling` will have it. Raises InputError when there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(start.name_or_path, revision=start.revision)
    except (HTTPError, OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"model {start.reference!r} has no tokenizer that can be loaded: {error}") from None
    check_words(tokenizer, start.reference)
    finish_texts(tokenizer, start.published and start.published.pooling_name, pooling)
    return tokenizer


def settle(stage: Stage, published: Published | None) -> Stage:
    """The stage with what its recipe leaves to the start: lengths, query template, document prompt, kept prompts."""
    own, prompts = stage.own, published.prompts if published else {}
    length = own.max_seq_length or (published and published.max_seq_length) or DEFAULT_LENGTH
    if own.train_max_seq_length and own.train_max_seq_length > length:
        raise InputError(
            f"stage {stage.name!r}: train_max_seq_length {own.train_max_seq_length} is above max_seq_length "
            f"({length}); lower it"
        )
    defaults = {
        "max_seq_length": length,
        "train_max_seq_length": length,
        "query_template": template_of(prompts.get("query", "")) or QUERY_TEMPLATE,
        "document_prompt": prompts.get("document", prompts.get("passage", "")),
    }

    def filled(arguments: DatasetArguments) -> DatasetArguments:
        return arguments.model_copy(
            update={key: value for key, value in defaults.items() if getattr(arguments, key, value) is None}
        )

    datasets = {name: filled(dataset) for name, dataset in stage.datasets.items()}
    kept = dict(prompts) if published else None
    return dataclasses.replace(stage, own=filled(own), datasets=datasets, kept_prompts=kept)


def column_prompts(stage: Stage, dataset: str, columns: Sequence[str]) -> dict[str, str]:
    """Column -> prompt in training: `prompted_columns` get the query's (the instruction, or the start's own query
    prompt), the others the document's; bare ones none.
    """
    own = stage.datasets[dataset]
    query = (stage.kept_prompts or {}).get("query", "")
    if own.instruction is not None:
        query = instruction_prompt(own.instruction, own.query_template)
    prompts = {name: query if name in own.prompted_columns else own.document_prompt for name in columns}
    return {name: prompt for name, prompt in prompts.items() if prompt and name != LABEL}


def saved_prompts(stage: Stage, shots: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """The prompts of a stage's saved model: those of the start, documents' as they were trained, and without an
    instruction no others where it is a finished embedder; else one for each evaluation task.
    """
    own, kept = stage.own, stage.kept_prompts
    if kept is not None and own.instruction is None:
        return {**kept, "document": own.document_prompt}
    return {**(kept or {}), **baked_prompts(own.instruction, shots, own.query_template, own.document_prompt)}


def untrained_prompt(stage: Stage) -> str | None:
    """A line about a query prompt that is saved and was before no text in training; None where it was."""
    if stage.own.instruction is None or any(data.prompted_columns for data in stage.datasets.values()):
        return None
    query = stage.prompts["query"]
    return (
        f"stage {stage.name}: the saved model puts {query!r} before queries, but trains without it: name "
        "prompted_columns, or take instruction out"
    )


def start_line(start: Start, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a run starts from, in one line: what is kept of the model as published, and what the stage replaces."""
    own, published = stage.own, start.published
    ids, words = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    first = ids.index(words[0])
    sides = (tokenizer.convert_ids_to_tokens(side) for side in (ids[:first], ids[first + len(words) :]))
    ends = "{} before a text and {} after it".format(*(" ".join(map(repr, side)) or "no token" for side in sides))
    if published is None:
        template = "no instruction" if own.instruction is None else f"queries as {own.query_template!r}"
        return f"start {start.reference}: bare model; pooling {own.pooling or 'eos'}, {ends}, {template}"
    pairs = {  # as published, and now
        "pooling": (published.pooling_name, own.pooling or published.pooling_name),
        "max_seq_length": (published.max_seq_length or own.max_seq_length, own.max_seq_length),
        **{f"prompt {name!r}": (prompt, stage.prompts[name]) for name, prompt in published.prompts.items()},
    }
    replaced = [f"{key} {was!r} by {now!r}" for key, (was, now) in pairs.items() if was != now]
    kept = [f"{key} {was!r}" for key, (was, now) in pairs.items() if was == now]
    later = ["modules " + ", ".join(published.modules[2:])] if published.modules[2:] else []
    keeps = ", ".join([*later, *kept, ends])
    return f"start {start.reference}: finished embedder; keeps {keeps}; replaces {', '.join(replaced) or 'nothing'}"
