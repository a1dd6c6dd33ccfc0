"""Keys that trl, transformers and sentence-transformers read: which there are, how a recipe's values reach them."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from common.cli import InputError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

# Defaults that are ours and not the libraries'.
DEFAULTS = {
    "lora_task_type": "FEATURE_EXTRACTION",  # trl's CAUSAL_LM adapter would not load on a model without LM head
    "save_total_limit": 1,  # resuming needs the last checkpoint alone, and a 7B one is 14 GB
    "logging_steps": 10,
}
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
    **dict.fromkeys(("push_to_hub", *_HUB), _PUBLISH),
}
# What the libraries do not check of their numbers. All are finite, too, and whole ones below LARGEST.
LARGEST = 2**32
RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "above 0": (lambda n: n > 0, "num_train_epochs adam_epsilon logging_steps eval_steps save_steps lora_alpha"),
    "0 or more": (
        lambda n: n >= 0,
        "learning_rate learning_rate_mapping weight_decay max_grad_norm seed data_seed warmup_steps eval_delay "
        "dataloader_num_workers",
    ),
    "1 or more": (
        lambda n: n >= 1,
        "lora_r per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps save_total_limit "
        "eval_accumulation_steps ddp_timeout ddp_bucket_cap_mb",
    ),
    "in [0, 1]": (lambda n: 0 <= n <= 1, "warmup_ratio"),
    "in [0, 1)": (lambda n: 0 <= n < 1, "adam_beta1 adam_beta2 lora_dropout"),
    "1 or more, or -1 where epochs say how long": (lambda n: n >= 1 or n == -1, "max_steps"),
}
# package -> {file: class that defines keys}
_LIBRARIES = {
    "trl": {"trainer/model_config.py": "ModelConfig"},
    "transformers": {"training_args.py": "TrainingArguments"},
    "sentence_transformers": {
        "base/training_args.py": "BaseTrainingArguments",
        "sentence_transformer/training_args.py": "SentenceTransformerTrainingArguments",
    },
}


class LibraryKey(NamedTuple):
    default: Any
    meaning: str  # the first sentence of the library's own help


@functools.cache
def library_keys() -> dict[str, LibraryKey]:
    """The libraries' keys by name, read from their source: importing them takes longer than a typo should."""
    keys = {}
    for package, files in _LIBRARIES.items():
        folder = Path(importlib.util.find_spec(package).origin).parent
        for name, kind in files.items():
            tree = ast.parse((folder / name).read_text(encoding="utf-8"))
            [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
            for node in body:
                if isinstance(node, ast.AnnAssign):
                    keys[node.target.id] = _library_key(node)
    return {name: key._replace(default=DEFAULTS.get(name, key.default)) for name, key in keys.items()}


def _library_key(node: ast.AnnAssign) -> LibraryKey:
    """A key out of `name: type = field(default=..., metadata={"help": ...})`."""
    words = {word.arg: word.value for word in node.value.keywords}
    default = words.get("default", words.get("default_factory"))
    try:
        value = ast.literal_eval(default)
    except ValueError:  # a name: of a constant, or of the type whose empty value it is
        value = {"list": [], "dict": {}}.get(ast.unparse(default), "see the library")
    found = words["metadata"]
    texts = [text for key, text in zip(found.keys, found.values, strict=True) if ast.literal_eval(key) == "help"]
    return LibraryKey(value, " ".join(ast.literal_eval(texts[0]).split()).partition(". ")[0].removesuffix("."))


def parse_library_keys(values: Mapping[str, Any]) -> tuple[ModelConfig, SentenceTransformerTrainingArguments]:
    """`values` as the libraries' dataclasses. Raises InputError on a key or a value that they do not take."""
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig, TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise InputError(message)

    parser = Parser([ModelConfig, SentenceTransformerTrainingArguments], allow_abbrev=False)
    # what no flag says: an empty list, and several of a key that is text or a list
    values = {key: value for key, value in values.items() if value is not None}
    unsaid = {key: value for key, value in values.items() if value == [] or key == "report_to"}
    on_cpu = {"use_cpu": True} if values.get("bf16") and not torch.accelerator.is_available() else {}
    parser.set_defaults_with_config(**DEFAULTS, **on_cpu, **unsaid)  # transformers asks for use_cpu there
    # the rest as flags, so that a recipe's values are checked and converted as those of the command line are
    flags = [part for key, value in values.items() if key not in unsaid for part in _as_flags(key, value)]
    try:
        model, training = parser.parse_args_and_config(args=flags)
        rates = training.learning_rate_mapping  # YAML reads 1e-5 as a text
        training.learning_rate_mapping = {pattern: float(rate) for pattern, rate in rates.items()}
    except (ValueError, TypeError, OSError, ImportError) as error:  # a wrong value, or what it names is not there
        raise InputError(str(error)) from None
    for key, found in (*vars(model).items(), *vars(training).items()):
        for value in _numbers(found):
            wrong = [words for words, (holds, keys) in RANGES.items() if key in keys.split() and not holds(value)]
            if not math.isfinite(value):
                wrong = ["a finite number"]
            elif isinstance(value, int) and abs(value) >= LARGEST:
                wrong = [f"below {LARGEST:,}"]
            if wrong:
                raise InputError(f"key {key!r} is {value}: it must be {wrong[0]}")
    return model, training


def _numbers(value: Any) -> Iterator[float]:
    """The numbers in a value, and in a list or a mapping."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _numbers(inner)


def _as_flags(key: str, value: Any) -> list[str]:
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML reads as false
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def check_training(training: SentenceTransformerTrainingArguments) -> None:
    """Raises InputError for what would fail when a stage starts, hours from now."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    if (training.resume_from_checkpoint or "false").lower() not in ("true", "false"):
        given = training.resume_from_checkpoint
        raise InputError(f"resume_from_checkpoint is {given!r}; true goes on from a stage's last checkpoint")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in installed:
            raise InputError(f"report_to: {name!r} is not installed; there is {', '.join(installed) or 'none'}")
    try:
        if not training.optim_target_modules:  # which would need the model
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
            schedule = training.lr_scheduler_kwargs or {}
            get_scheduler(training.lr_scheduler_type, optimizer, 0, 2, scheduler_specific_kwargs=schedule)
        for pattern in training.learning_rate_mapping:
            re.compile(pattern)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, re.error) as error:
        raise InputError(f"training cannot start so: {error}") from None
