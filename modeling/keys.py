"""Keys of training recipes: which there are, what their numbers may be, and how the command line overrides them."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import InputError
from common.recipes import load_yaml

# Defaults that are ours and not the libraries'.
DEFAULTS = {
    "lora_task_type": "FEATURE_EXTRACTION",  # trl's CAUSAL_LM adapter would not load on a model without LM head
    "save_total_limit": 1,  # resuming needs the last checkpoint alone, and a 7B one is 14 GB
    "logging_steps": 10,
}
_BATCHES = "has no effect: batches are made by modeling/batches.py; leave it out"
_PUBLISH = "is not for training: leave it out, and run push_to_hub.py afterwards"
_HUB = ("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
# Keys of the libraries' arguments that have no place in a recipe, and why.
REFUSED = {
    "prompts": "are made of `instruction` and `prompted_columns`; use these",
    **dict.fromkeys(("batch_sampler", "multi_dataset_batch_sampler", "train_sampling_strategy"), _BATCHES),
    "router_mapping": "has no effect on a model of one tower; leave it out",
    "neftune_noise_alpha": "needs embeddings where a SentenceTransformer has none; leave it out",
    "use_liger_kernel": "has no effect on a SentenceTransformer; leave it out",
    "label_smoothing_factor": "has no effect: soft labels take its place; leave it out",
    "auto_find_batch_size": "has no effect on the batches made here; lower mini_batch_size, which changes no result",
    "save_only_model": "leaves nothing for a killed stage to go on from; leave it out",
    **dict.fromkeys(("push_to_hub", *_HUB), _PUBLISH),
}
# What the numbers under these keys must be. All numbers, these or others, are finite, and whole ones below LARGEST.
LARGEST = 2**32
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "above 0": (
        lambda value: value > 0,
        "temperature target_temperature weight num_train_epochs adam_epsilon logging_steps eval_steps save_steps "
        "lora_alpha",
    ),
    "0 or more": (
        lambda value: value >= 0,
        "false_negative_margin learning_rate learning_rate_mapping weight_decay max_grad_norm seed data_seed "
        "warmup_steps num_negatives shots prompt_shots min_text_tokens eval_delay dataloader_num_workers weights",
    ),
    "1 or more": (
        lambda value: value >= 1,
        "max_seq_length train_max_seq_length eval_queries eval_documents mini_batch_size shots_budget lora_r "
        "per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "eval_accumulation_steps ddp_timeout ddp_bucket_cap_mb num_hidden_layers",
    ),
    "in [0, 1]": (lambda value: 0 <= value <= 1, "alpha zero_shot_probability warmup_ratio"),
    "in [0, 1)": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 lora_dropout"),
    "1 or more, or -1 where epochs say how long": (lambda value: value >= 1 or value == -1, "max_steps"),
}
# Where the libraries define the rest of a stage's keys: package -> {file: class}
_LIBRARIES = {
    "transformers": {"training_args.py": "TrainingArguments"},
    "sentence_transformers": {
        "base/training_args.py": "BaseTrainingArguments",
        "sentence_transformer/training_args.py": "SentenceTransformerTrainingArguments",
    },
    "trl": {"trainer/model_config.py": "ModelConfig"},
}


@functools.cache
def library_keys() -> frozenset[str]:
    """Keys of the libraries' arguments, read from their source: importing them takes longer than a typo should."""
    keys = set()
    for package, files in _LIBRARIES.items():
        folder = Path(importlib.util.find_spec(package).origin).parent
        for name, kind in files.items():
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
            [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
            keys |= {node.target.id for node in body if isinstance(node, ast.AnnAssign)}
    return frozenset(keys)


def check_names(values: Mapping[str, Any], known: Collection[str], where: str) -> None:
    """Raises InputError on a key that is not among `known`, or that has no place in a recipe."""
    for key, value in values.items():
        if value and key in REFUSED:
            raise InputError(f"{where}: {key} {REFUSED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "python train_st.py --help says where keys are listed"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")


def parse_keys(types: Sequence[type], values: Mapping[str, Any], where: str) -> list[Any]:
    """`values` as instances of the dataclasses `types`. Raises InputError on an unknown or ill-typed key."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise InputError(f"{where}: {message}")

    fields = [field.name for kind in types for field in dataclasses.fields(kind)]
    check_names(values, fields, where)
    parser = Parser(list(types), allow_abbrev=False)
    parser.set_defaults_with_config(**{key: value for key, value in DEFAULTS.items() if key in fields})
    parser.set_defaults_with_config(**{key: [] for key, value in values.items() if value == []})  # no flag says that
    # as flags, so that a recipe's values are checked and converted as those of the command line are
    flags = [part for key, value in values.items() if value is not None for part in _as_flags(key, value)]
    try:
        parsed = list(parser.parse_args_and_config(args=flags))
    except (ValueError, TypeError, OSError, ImportError) as error:  # a wrong value, or what it names is not there
        raise InputError(f"{where}: {error}") from None
    for arguments in parsed:
        check_numbers(arguments, where)
    return parsed


def check_numbers(arguments: Any, where: str) -> None:
    """Raises InputError on a number in a dataclass that is not finite, or outside of RANGES."""
    for key, found in vars(arguments).items():
        for value in _numbers(found):
            wrong = [words for words, (holds, keys) in RANGES.items() if key in keys.split() and not holds(value)]
            if not math.isfinite(value):
                wrong = ["a finite number"]
            elif isinstance(value, int) and abs(value) >= LARGEST:
                wrong = [f"below {LARGEST:,}"]
            if wrong:
                raise InputError(f"{where}: {key} is {value}; it must be {wrong[0]}")


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, and in a list or a mapping."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)


def _as_flags(key: str, value: Any) -> list[str]:
    if value == []:
        return []
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML reads as false
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """--key value, --key=value and --key value value (a list) as a mapping; --PART.key goes into a mapping PART."""
    groups: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--"):
            groups.append(flag.split("=", 1))
        elif not groups:
            raise InputError(f"unexpected argument {flag!r}; overrides are written --key value")
        else:
            groups[-1].append(flag)
    values: dict[str, Any] = {}
    for flag, *texts in groups:
        if not texts:
            raise InputError(f"{flag} needs a value")
        parsed = [_read_value(text) for text in texts]
        part, _, key = flag.removeprefix("--").rpartition(".")
        target = values.setdefault(part, {}) if part else values
        if not isinstance(target, dict):
            raise InputError(f"{flag}: --{part} has a value already")
        target[key] = parsed[0] if len(parsed) == 1 else parsed
    return values


def _read_value(text: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError:  # a sentence with a colon in it, say
        return text
