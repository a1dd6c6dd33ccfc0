"""All keys of training recipes: ours, and those that trl, transformers and sentence-transformers read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from pydantic import BeforeValidator, Field, create_model

from common.cli import InputError
from common.recipes import flag_value, key_line, key_lines, list_keys, split_flags
from modeling.arguments import LARGEST, OF_THE_RECIPE, DatasetArguments, RecipeArguments, StageArguments, one_or_more

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

_BATCHES = "has no effect: batches are made by modeling/batches.py; leave it out"
_PUBLISH = "is not for training: leave it out, and run push_to_hub.py afterwards"
_HUB = ("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
# Keys that have no place in a recipe, and why.
REFUSED = {
    "prompts": "are made of `instruction` and `prompted_columns`; use these",
    **dict.fromkeys(("batch_sampler", "multi_dataset_batch_sampler", "train_sampling_strategy"), _BATCHES),
    "router_mapping": "has no effect on a model of one tower; leave it out",
    "neftune_noise_alpha": "needs embeddings where a SentenceTransformer has none; leave it out",
    "use_liger_kernel": "has no effect on a SentenceTransformer; leave it out",
    "label_smoothing_factor": "has no effect: soft labels take its place; leave it out",
    "auto_find_batch_size": "has no effect on the batches made here; lower mini_batch_size, which changes no result",
    "save_only_model": "leaves nothing for a killed stage to go on from; leave it out",
    "fsdp": "is the launcher's: leave it out, and use recipes/accelerate/fsdp.yaml",
    "deepspeed": "is the launcher's: leave it out, and use recipes/accelerate/zero3.yaml",
    "parallelism_config": "is the launcher's: leave it out, and use recipes/accelerate",
    **dict.fromkeys(("push_to_hub", *_HUB), _PUBLISH),
}
# What the libraries do not check of their numbers.
RANGES = {
    "num_train_epochs adam_epsilon eval_steps save_steps lora_alpha": {"gt": 0},
    "learning_rate weight_decay max_grad_norm warmup_steps eval_delay": {"ge": 0},
    "seed data_seed dataloader_num_workers": {"ge": 0},
    "lora_r max_steps per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps": {"ge": 1},
    "eval_accumulation_steps ddp_timeout ddp_bucket_cap_mb": {"ge": 1},
    "warmup_ratio": {"ge": 0, "le": 1},
    "adam_beta1 adam_beta2 lora_dropout": {"ge": 0, "lt": 1},
}
_no_strategy = BeforeValidator(lambda value: "no" if value is False else value)  # which YAML reads as false


def _library_classes() -> tuple[type[ModelConfig], type[SentenceTransformerTrainingArguments]]:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    return ModelConfig, SentenceTransformerTrainingArguments


@functools.cache
def stage_keys() -> type[StageArguments]:
    """`StageArguments` and the fields of the libraries' dataclasses, described by the first sentence of their help."""
    ranges = {name: limits for names, limits in RANGES.items() for name in names.split()}
    keys: dict[str, Any] = {}
    for kind in _library_classes():
        types = get_type_hints(kind)
        for field in dataclasses.fields(kind):
            name, annotation = field.name, types[field.name]
            if name in REFUSED or name in StageArguments.model_fields:
                continue
            if annotation == list[str] | None:
                annotation = Annotated[annotation, one_or_more]
            elif name.endswith("_strategy"):
                annotation = Annotated[annotation, _no_strategy]
            limits = ranges.get(name, {})
            if annotation in (int, int | None):
                limits = {"lt": LARGEST, **limits}
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            meaning = " ".join(field.metadata["help"].split()).partition(". ")[0].removesuffix(".")
            keys[name] = annotation, Field(default, description=meaning, **limits)
    return create_model("StageKeys", __base__=StageArguments, **keys)


def library_arguments(keys: StageArguments, where: str) -> tuple[ModelConfig, SentenceTransformerTrainingArguments]:
    """A stage's `stage_keys` as the libraries' dataclasses. Raises InputError on values that they refuse."""
    given = {name: getattr(keys, name) for name in (*StageArguments.model_fields, *keys.model_fields_set)}
    try:
        model, training = (
            kind(**{field.name: given[field.name] for field in dataclasses.fields(kind) if field.name in given})
            for kind in _library_classes()
        )
    except (ValueError, TypeError, OSError, ImportError) as error:  # a wrong value, or what it names is not there
        raise InputError(f"{where}: {error}") from None
    return model, training


def read_flags(flags: Sequence[str], texts: set[str]) -> dict[str, Any]:
    """Flags as a mapping, those of the keys in `texts` as they are; --PART.key goes into a mapping PART."""
    values: dict[str, Any] = {}
    for flag, parts in split_flags(flags):
        part, _, key = flag.rpartition(".")
        target = values.setdefault(part, {}) if part else values
        if not isinstance(target, dict):
            raise InputError(f"--{flag}: --{part} has a value already")
        target[key] = flag_value(parts, key in texts)
    return values


def recipe_keys() -> Iterator[str]:
    """Lines of Markdown: every key with its default and meaning, by where it may stand."""
    libraries = {name: key for name, key in stage_keys().model_fields.items() if key.description}
    own, of_data = key_lines(StageArguments), DatasetArguments.model_fields
    lines = own | {name: key_line(name, key.default, key.description) for name, key in libraries.items()}
    places: Mapping[str, Sequence[str]] = {
        "Above the stages": OF_THE_RECIPE,
        "Recipe, stage or entry of `datasets`": [*of_data],
        "Recipe or stage": [name for name in own if name not in (*of_data, *OF_THE_RECIPE)],
        "Recipe or stage: trl's, transformers' and sentence-transformers' own": [
            name for name in libraries if name not in OF_THE_RECIPE
        ],
    }
    yield from list_keys(RecipeArguments, "Above the stages, beside `stages`, a list of mappings with a `name`")
    for title, names in places.items():
        yield from (f"### {title}", "", *(lines[name] for name in names), "")
