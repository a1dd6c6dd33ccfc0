"""Where a run starts: a model as it was published, or a student built on the spot; what the stages keep of it."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError
from common.models import fetch_settings, hub_commit, resolve_model
from common.steps import files_of, fingerprint
from modeling.encoder import DEFAULT_LENGTH, Published, read_published
from modeling.keys import parse_keys
from modeling.processes import joint_step, processes
from modeling.prompts import QUERY_TEMPLATE, baked_prompts, instruction_prompt, template_of
from modeling.recipe import DatasetArguments, Recipe, Stage
from modeling.tokens import finish_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from trl import ModelConfig


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

    def name_from(self, folder: Path) -> str:
        """How an adapter in `folder` names this base: a Hub id, a package or GGUF file as the recipe wrote it, or a
        path relative to the folder.
        """
        if self.reference.startswith("package:") or self.reference.endswith(".gguf"):
            return self.reference
        if Path(self.name_or_path).is_dir():
            return os.path.relpath(self.name_or_path, folder)
        return self.reference.partition("@")[0]


def first_start(recipe: Recipe) -> tuple[Start, Published | None]:
    """Where the first stage starts, and what it is as a finished embedder (None: a bare model, or the student)."""
    if "student" not in recipe.values:
        return published_start(recipe.stages[0].model)
    from modeling.student import StudentConfig, build_student

    instruction = recipe.values.get("instruction")
    prompt = {"prompt": instruction_prompt(instruction)} if instruction else {}
    (config,) = parse_keys([StudentConfig], {**prompt, **recipe.values["student"]}, "student")
    folder = recipe.output_dir / "student"
    inputs = {
        **dataclasses.asdict(config),
        "teacher": resolve_model(config.teacher).fingerprint(),
        "corpus": fingerprint(files_of(Path(config.corpus))),
    }
    with joint_step(folder, inputs) as step:
        if not step.done and processes().is_main_process:
            build_student(config, step.path)
            step.finish()
    return Start(str(folder), None, step.key, "student"), None


def published_start(model: ModelConfig) -> tuple[Start, Published | None]:
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
    start = Start(reference.name_or_path, reference.revision, reference.fingerprint(), reference.reference)
    return start, read_published(reference)


def load_tokenizer(start: Start, published: Published | None, pooling: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer as the first stage's encoder will have it. Raises InputError when there is none."""
    from huggingface_hub.errors import HTTPError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(start.name_or_path, revision=start.revision)
    except (HTTPError, OSError, ValueError, KeyError) as error:
        raise InputError(f"model {start.reference!r} has no tokenizer that can be loaded: {error}") from None
    finish_texts(tokenizer, published and published.pooling_name, pooling)
    return tokenizer


def start_facts(start: Start, published: Published | None) -> dict[str, Any]:
    """What stages.json and cards say of the model that a run started from."""
    if start.reference == "student":
        return {"model": "student", "revision": None, "published": None, "quantisation": None}
    reference = resolve_model(start.reference)
    facts = published and {**dataclasses.asdict(published), "pooling": published.pooling_name}
    quantisation = reference.quantisation()
    return {"model": start.reference, "revision": start.revision, "published": facts, "quantisation": quantisation}


def settle(stages: Sequence[Stage], published: Published | None) -> None:
    """Fill in what a recipe leaves to its start: length, query template and document prompt, in every stage."""
    prompts = published.prompts if published else {}
    for stage in stages:
        own = stage.own
        if own.max_seq_length is None:
            own.max_seq_length = (published and published.max_seq_length) or DEFAULT_LENGTH
        own.train_max_seq_length = own.train_max_seq_length or own.max_seq_length
        if own.train_max_seq_length > own.max_seq_length:
            raise InputError(
                f"stage {stage.name!r}: train_max_seq_length {own.train_max_seq_length} is above max_seq_length "
                f"({own.max_seq_length}); lower it"
            )
        for arguments in (own, *stage.datasets.values()):
            if arguments.query_template is None:
                arguments.query_template = template_of(prompts.get("query", "")) or QUERY_TEMPLATE
            if arguments.document_prompt is None:
                arguments.document_prompt = prompts.get("document", prompts.get("passage", ""))


def query_prompt(arguments: DatasetArguments, published: Published | None) -> str:
    """What stands before the prompted columns in training: the instruction, or the start's own query prompt."""
    if arguments.instruction is not None:
        return instruction_prompt(arguments.instruction, arguments.query_template)
    return published.prompts.get("query", "") if published else ""


def column_prompts(arguments: DatasetArguments, columns: Sequence[str], published: Published | None) -> dict[str, str]:
    """Column -> prompt in training: `prompted_columns` get the query's, the others the document's; bare ones none."""
    query = query_prompt(arguments, published)
    prompted = {name: query if name in arguments.prompted_columns else arguments.document_prompt for name in columns}
    return {name: prompt for name, prompt in prompted.items() if prompt}


def saved_prompts(stage: Stage, published: Published | None, shots: Sequence[tuple[str, str]] = ()) -> dict[str, str]:
    """The prompts of a stage's saved model: those of the start, and without an instruction no others where it is a
    finished embedder; else one for each evaluation task.
    """
    own = stage.own
    if published and own.instruction is None:
        return dict(published.prompts)
    baked = baked_prompts(own.instruction, shots, own.query_template, own.document_prompt)
    return {**(published.prompts if published else {}), **baked}


def start_line(start: Start, published: Published | None, stage: Stage, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a run starts from, in one line: what is kept of the model as published, and what the stage replaces."""
    own = stage.own
    ids = tokenizer("a")["input_ids"]
    special = [tokenizer.convert_ids_to_tokens(number) for number in (ids[0], ids[-1])]
    ends = f"texts begin with {special[0]!r} and end in {special[1]!r}"
    if published is None:
        template = "no instruction" if own.instruction is None else f"queries as {own.query_template!r}"
        return f"start {start.reference}: bare model; pooling {own.pooling or 'eos'}, {ends}, {template}"
    kept: Mapping[str, Any] = {
        "pooling": published.pooling_name,
        "max_seq_length": published.max_seq_length or own.max_seq_length,
        **{f"prompt {name!r}": prompt for name, prompt in published.prompts.items()},
    }
    now = {
        "pooling": own.pooling or published.pooling_name,
        "max_seq_length": own.max_seq_length,
        **{f"prompt {name!r}": prompt for name, prompt in saved_prompts(stage, published).items()},
    }
    replaced = [f"{key} {value!r} by {now[key]!r}" for key, value in kept.items() if now[key] != value]
    same = [f"{key} {value!r}" for key, value in kept.items() if now[key] == value]
    later = published.modules[2:]
    keeps = ", ".join([*(["modules " + ", ".join(later)] if later else []), *same, ends])
    return f"start {start.reference}: finished embedder; keeps {keeps}; replaces {', '.join(replaced) or 'nothing'}"
