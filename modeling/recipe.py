"""Training recipes: shared keys, an ordered list of stages, and what the command line overrides.

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both. Keys are the fields of `StageArguments`, of trl's ModelConfig (lora_r, ...) and of
sentence-transformers' training arguments (learning_rate, optim, lr_scheduler_type, ...): optimizer and schedule begin
anew in every stage.

A stage trains on one data set or, with a list `datasets:` of mappings with a `name`, on several: each may override
the keys of `DatasetArguments`, and a batch comes from one of them.

Three keys belong to the whole recipe: `student:` (modeling.student.StudentConfig) starts from a small model built on
the spot; `merge:` (MergeArguments) publishes an average of stages instead of the last one; `total_steps:` is shared
out equally among the stages that run, so that curricula of one, two or three stages cost equally many optimizer
steps. `max_steps`, by contrast, holds for each stage.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from common.cli import ArgumentParser, InputError
from common.recipes import load_yaml, read_yaml
from common.steps import written_whole

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

# Defaults that are ours and not the libraries'.
DEFAULTS = {
    "lora_task_type": "FEATURE_EXTRACTION",  # trl's CAUSAL_LM adapter would not load on a model without LM head
    "save_total_limit": 1,  # resuming needs the last checkpoint alone, and a 7B one is 14 GB
    "logging_steps": 10,
}
# Folders that a run has besides its stages'.
RESERVED = ("model", "adapter", "student", "logs", "data", "results", "report")
LONGEST_NAME = 100
# Keys of the libraries' arguments that have no place in a recipe, and why.
ELSEWHERE = {
    "prompts": "are made of `instruction` and `prompted_columns`; use these",
    "batch_sampler": "has no effect: batches are made by modeling/batches.py; leave it out",
    "router_mapping": "has no effect on a model of one tower; leave it out",
    "neftune_noise_alpha": "needs embeddings where a SentenceTransformer has none; leave it out",
    "use_liger_kernel": "has no effect on a SentenceTransformer; leave it out",
    "label_smoothing_factor": "has no effect: soft labels take its place; leave it out",
    "auto_find_batch_size": "has no effect on the batches made here; lower mini_batch_size, which changes no result",
    "save_only_model": "leaves nothing for a killed stage to go on from; leave it out",
    "push_to_hub": "is not for training: leave it out, and run push_to_hub.py afterwards",
}
ELSEWHERE["multi_dataset_batch_sampler"] = ELSEWHERE["train_sampling_strategy"] = ELSEWHERE["batch_sampler"]
_HUB = ("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
ELSEWHERE |= dict.fromkeys(_HUB, ELSEWHERE["push_to_hub"])
# What the numbers under these keys must be. All numbers, these or others, are finite, and whole ones below MOST.
MOST = 2**32
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
        "eval_accumulation_steps ddp_timeout ddp_bucket_cap_mb",
    ),
    "in [0, 1]": (lambda value: 0 <= value <= 1, "alpha zero_shot_probability warmup_ratio"),
    "in [0, 1)": (lambda value: 0 <= value < 1, "adam_beta1 adam_beta2 lora_dropout"),
    "1 or more, or -1 where epochs say how long": (lambda value: value >= 1 or value == -1, "max_steps"),
}


@dataclass
class DatasetArguments:
    """A data set, the prompts of its texts, and the objective it is trained by."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "Hub id, or folder with a README.md that has `configs:` (DIR/hub)"}
    )
    dataset_config: str = field(default="train", metadata={"help": "`train`: query, positive, negative_1 ..., label"})
    dataset_revision: str | None = field(default=None, metadata={"help": "of the Hub id"})
    weight: float = field(default=1.0, metadata={"help": "share of its stage's batches, relative to the others'"})
    loss: str = field(default="soft_info_nce", metadata={"help": "cosent, or an objective of modeling.losses"})
    temperature: float = field(default=0.02, metadata={"help": "divides cosines"})
    target_temperature: float = field(default=1.0, metadata={"help": "divides the logits of soft labels"})
    alpha: float = field(default=1.0, metadata={"help": "of the objective against 1 - alpha of InfoNCE"})
    in_batch_negatives: bool = field(default=True, metadata={"help": "false where rows share labels: classification"})
    false_negative_margin: float | None = field(default=None, metadata={"help": "see modeling.losses; null = none"})
    mini_batch_size: int | None = field(default=None, metadata={"help": "texts at a time, by GradCache; null = all"})
    num_negatives: int | None = field(default=None, metadata={"help": "the first of each row's; null = all"})
    instruction: str | None = field(default=None, metadata={"help": "one sentence; null = queries without prompt"})
    prompted_columns: list[str] = field(default_factory=lambda: ["query"], metadata={"help": "get the instruction"})
    shots: int = field(default=0, metadata={"help": "the most demonstrations that a batch's prompt shows"})
    shots_budget: int | None = field(default=None, metadata={"help": "the most tokens of such a prompt; null = any"})
    zero_shot_probability: float = field(default=0.0, metadata={"help": "of a batch without demonstrations"})


@dataclass
class StageArguments(DatasetArguments):
    """What a stage trains on (or what the entries of its `datasets:` have in common), and what it makes."""

    max_seq_length: int = field(default=512, metadata={"help": "tokens the model reads, prompt and EOS included"})
    train_max_seq_length: int | None = field(default=None, metadata={"help": "in training; null = max_seq_length"})
    min_text_tokens: int = field(default=16, metadata={"help": "least room that a prompt must leave"})
    pooling: Literal["eos", "mean", "mean_without_prompt", "weighted_mean"] = "eos"
    prompt_shots: int = field(default=0, metadata={"help": "demonstrations in a prompt that the saved model carries"})
    share_prefix: bool = field(default=False, metadata={"help": "compute a prompt that a batch shares once"})
    eval_queries: int = field(default=200, metadata={"help": "sample of the validation queries, at each evaluation"})
    eval_documents: int = field(default=2000, metadata={"help": "sample they search, with all their relevant ones"})


@dataclass
class MergeArguments:
    """Which stages' weights are averaged into model/, and how (see modeling.merging)."""

    stages: list[str]
    method: Literal["linear", "slerp"] = "linear"
    weights: list[float] = field(default_factory=list, metadata={"help": "one a stage; none = equal ones"})


@dataclass(frozen=True)
class Stage:
    """One entry of the curriculum, read and checked."""

    name: str
    values: dict[str, Any]  # the recipe's keys, overrides applied
    own: StageArguments
    datasets: dict[str, DatasetArguments]  # by name; `own` alone under the stage's name where there is no list
    model: ModelConfig
    training: SentenceTransformerTrainingArguments

    @property
    def peft_config(self) -> PeftConfig | None:
        from trl import get_peft_config

        return get_peft_config(self.model)

    @property
    def lora_settings(self) -> dict[str, Any] | None:
        config = self.peft_config
        return config and config.to_dict()


@dataclass(frozen=True)
class Recipe:
    """A training recipe with all overrides applied."""

    values: dict[str, Any]  # as it is written beside the result: a recipe that runs it again
    output_dir: Path
    stages: list[Stage]
    merge: MergeArguments | None


def read_recipe(argv: Sequence[str], description: str) -> Recipe:
    """The recipe that a command line names. Raises InputError on whatever is wrong in it."""
    parser = ArgumentParser(prog="python train_st.py", description=description)
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE")
    parser.add_argument("--stages", metavar="NAME,NAME", help="stages to run, in this order; all by default")
    arguments, flags = parser.parse_known_args(argv)
    return parse_recipe(read_yaml(arguments.config), str(arguments.config), arguments.stages, _read_flags(flags))


def parse_recipe(
    values: Mapping[str, Any], where: str, selected: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """`values`, as YAML has them, with `overrides`, and only the `selected` stages (NAME,NAME), read and checked.

    Raises InputError on whatever is wrong; `where` is how the message calls the recipe.
    """
    values, overrides = dict(values), dict(overrides or {})
    stages = _named(values.pop("stages", None), "stage", "stages", where, taken=RESERVED)
    if selected is not None:
        stages = _select(stages, selected)
    for name, keys in stages.items():
        for key in ("model_name_or_path", "model_revision"):
            if key in keys:
                raise InputError(f"{where}: stage {name!r}: {key}: stages go on from one another; name it above them")
    student = {**_mapping(values.pop("student", None), where), **_mapping(overrides.pop("student", None), "--student")}
    values |= overrides
    stages = {name: {k: v for k, v in keys.items() if k not in overrides} for name, keys in stages.items()}

    shared = {key: value for key, value in values.items() if key not in ("merge", "total_steps")}
    budgets = _budgets(values, stages, where)
    parsed = [
        _read_stage(name, {**shared, **keys, **budgets.get(name, {})}, overrides, f"{where}: stage {name!r}")
        for name, keys in stages.items()
    ]
    output_dirs = {str(stage.values.get("output_dir") or "") for stage in parsed}
    if len(output_dirs) > 1 or not (output_dir := output_dirs.pop()) or "\0" in output_dir:
        raise InputError(f"{where}: name one output_dir for all stages, in the recipe or by --output_dir")
    if bool(student) == bool(values.get("model_name_or_path")):
        number = "one of the two alone" if student else "model_name_or_path, or student:"
        raise InputError(f"{where}: name the model to start from: {number}")
    merge = _read_merge(values["merge"], stages, f"{where}: merge") if values.get("merge") else None
    if student:
        values["student"] = student
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(output_dir), parsed, merge)


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, width=119)
    with written_whole(recipe.output_dir / "recipe.yaml") as path:  # a run may be started from this very file
        path.write_text(text, encoding="utf-8")


def parse_keys(types: Sequence[type], values: Mapping[str, Any], where: str) -> list[Any]:
    """`values` as instances of the dataclasses `types`. Raises InputError on an unknown or ill-typed key."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise InputError(f"{where}: {message}")

    fields = [field.name for kind in types for field in dataclasses.fields(kind)]
    for key, value in values.items():
        if value and key in ELSEWHERE:
            raise InputError(f"{where}: {key} {ELSEWHERE[key]}")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "python train_st.py --help says where keys are listed"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")
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
        _check_numbers(arguments, where)
    return parsed


def _check_numbers(arguments: Any, where: str) -> None:
    """Raises InputError on a number in a dataclass that is not finite, or outside of RANGES."""
    for key, found in vars(arguments).items():
        for value in _numbers(found):
            wrong = [words for words, (holds, keys) in RANGES.items() if key in keys.split() and not holds(value)]
            if not math.isfinite(value):
                wrong = ["a finite number"]
            elif isinstance(value, int) and abs(value) >= MOST:
                wrong = [f"below {MOST:,}"]
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


def _named(entries: Any, kind: str, key: str, where: str, taken: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The list of mappings under `key`, by their names."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: `{key}` must be a list of mappings, each with a name")
    named: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.isidentifier() or len(name.encode()) > LONGEST_NAME:
            rule = f"a {kind} is a mapping with a name of letters, digits and _, {LONGEST_NAME} at most"
            raise InputError(f"{where}: {kind} {entry!r}: {rule}")
        if name in named or name in taken:
            raise InputError(f"{where}: {kind} name {name!r} is taken; choose another")
        named[name] = {key: value for key, value in entry.items() if key != "name"}
    return named


def _mapping(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict | None):
        raise InputError(f"{where}: student is {value!r}; it must be a mapping of teacher, corpus, ...")
    return value or {}


def _select(stages: dict[str, dict[str, Any]], names: str) -> dict[str, dict[str, Any]]:
    selected = names.split(",")
    unknown = [name for name in selected if name not in stages]
    if unknown or len(set(selected)) < len(selected):
        wrong = f"no stage {unknown[0]!r}" if unknown else "a stage twice"
        raise InputError(f"--stages {names}: {wrong}; the recipe has {', '.join(stages)}")
    return {name: stages[name] for name in selected}


def _read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """--key value, --key=value and --key value value (a list) as a mapping; --student.key goes into `student`."""
    groups: list[list[str]] = []
    for flag in flags:
        if flag.startswith("--"):
            groups.append(flag.split("=", 1))
        elif not groups:
            raise InputError(f"unexpected argument {flag!r}; overrides are written --key value")
        else:
            groups[-1].append(flag)
    values: dict[str, Any] = {}
    student: dict[str, Any] = {}
    for flag, *texts in groups:
        if not texts:
            raise InputError(f"{flag} needs a value")
        parsed = [_read_value(text) for text in texts]
        name = flag.removeprefix("--")
        target = student if name.startswith("student.") else values
        target[name.removeprefix("student.")] = parsed[0] if len(parsed) == 1 else parsed
    return {**values, "student": {**_mapping(values.get("student"), "--student"), **student}} if student else values


def _read_value(text: str) -> Any:
    try:
        return load_yaml(text)
    except ValueError:  # a sentence with a colon in it, say
        return text


def _budgets(values: Mapping[str, Any], stages: Mapping[str, Any], where: str) -> dict[str, dict[str, int]]:
    """Each stage's max_steps out of `total_steps`; the first ones take what cannot be divided."""
    total = values.get("total_steps")
    if total is None:
        return {}
    if not isinstance(total, int) or isinstance(total, bool) or total < len(stages):
        raise InputError(f"{where}: total_steps is {total!r}; it must be a number, at least 1 for each stage")
    if any("max_steps" in keys for keys in (values, *stages.values())):
        raise InputError(f"{where}: max_steps and total_steps both say how long stages are; drop one")
    share, left = divmod(total, len(stages))
    return {name: {"max_steps": share + (position < left)} for position, name in enumerate(stages)}


def _read_stage(name: str, values: dict[str, Any], overrides: Mapping[str, Any], where: str) -> Stage:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    from modeling.encoder import quantization

    types = (StageArguments, ModelConfig, SentenceTransformerTrainingArguments)
    own, model, training = parse_keys(types, {k: v for k, v in values.items() if k != "datasets"}, where)
    try:
        quantization(model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if model.lora_task_type != DEFAULTS["lora_task_type"]:
        raise InputError(f"{where}: lora_task_type: an embedder has no head; it is {DEFAULTS['lora_task_type']}")
    if own.train_max_seq_length is None:
        own.train_max_seq_length = own.max_seq_length
    if own.train_max_seq_length > own.max_seq_length:
        raise InputError(f"{where}: train_max_seq_length is above max_seq_length ({own.max_seq_length}); lower it")
    _check_training(training, where)
    datasets: dict[str, DatasetArguments] = {name: own}
    if values.get("datasets") is not None:
        fields = {field.name for field in dataclasses.fields(DatasetArguments)}
        shared = {key: value for key, value in values.items() if key in fields}
        entries = _named(values["datasets"], "data set", "datasets", where)
        for entry, keys in entries.items():
            keys = {**shared, **{key: value for key, value in keys.items() if key not in overrides}}
            (datasets[entry],) = parse_keys([DatasetArguments], keys, f"{where}: data set {entry!r}")
        datasets = {entry: datasets[entry] for entry in entries}
    for entry, dataset in datasets.items():
        _check_dataset(dataset, where if dataset is own else f"{where}: data set {entry!r}")
    if own.prompt_shots and not any(data.shots and data.instruction == own.instruction for data in datasets.values()):
        raise InputError(
            f"{where}: prompt_shots shows training rows before the stage's `instruction`; no data set of it trains "
            "with shots and that instruction"
        )
    return Stage(name, values, own, datasets, model, training)


def _check_training(training: SentenceTransformerTrainingArguments, where: str) -> None:
    """Refuse now what would fail when training starts: what can be tried is tried, on one weight."""
    import torch
    from torch.utils.checkpoint import checkpoint
    from torch.utils.data import DataLoader
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    if (training.resume_from_checkpoint or "false").lower() not in ("true", "false"):
        given = training.resume_from_checkpoint
        raise InputError(f"{where}: resume_from_checkpoint is {given!r}; true goes on from a stage's last checkpoint")
    metric = training.metric_for_best_model
    if metric is not None and not re.fullmatch(r"(eval_)?validation(_\w+)?_cosine_\w+@10", metric):
        measured = "eval_validation_cosine_ndcg@10, or mrr, map, recall, precision and accuracy instead of ndcg"
        raise InputError(f"{where}: metric_for_best_model is {metric!r}; evaluations measure {measured}")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in installed:
            raise InputError(
                f"{where}: report_to: {name!r} is not installed; there is {', '.join(installed) or 'none'}"
            )
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        if not training.optim_target_modules:  # which would need the model
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
            more = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs or {}}
            get_scheduler(training.lr_scheduler_type, kind([weight], **settings), 0, 2, **more)
            unread = unread_optim_args(training)
            if unread:
                raise ValueError(f"optim_args: {training.optim.value} does not read {unread[0]!r}; drop it")
        DataLoader(
            [0],
            num_workers=training.dataloader_num_workers,
            persistent_workers=training.dataloader_persistent_workers,
        )
        if training.gradient_checkpointing:
            checkpoint(
                torch.nn.Identity(),
                weight,
                **{"use_reentrant": False, **(training.gradient_checkpointing_kwargs or {})},
            )
        if training.torch_compile:
            torch.compile(
                torch.nn.Identity(), backend=training.torch_compile_backend, mode=training.torch_compile_mode
            )
        for pattern, rate in training.learning_rate_mapping.items():
            re.compile(pattern)
            training.learning_rate_mapping[pattern] = float(rate)  # YAML reads 1e-5 as a text
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, re.error) as error:
        raise InputError(f"{where}: training cannot start so: {error}") from None
    _check_numbers(training, where)


def unread_optim_args(training: SentenceTransformerTrainingArguments) -> list[str]:
    """Keys of `optim_args` that transformers passes over in silence, as it does all of AdamW's.

    It has no list of those that it reads. But where it reads one, a value that none can have makes a difference: other
    settings, or an error.
    """
    from transformers import Trainer

    def settings(pairs: Mapping[str, str]) -> Any:
        tried = copy.copy(training)
        tried.optim_args = ",".join(f"{key}={value}" for key, value in pairs.items())
        return Trainer.get_optimizer_cls_and_kwargs(tried)

    def is_read(key: str) -> bool:
        others = {other: value for other, value in given.items() if other != key}
        try:
            return settings({**others, key: "?"}) != settings(others)
        except (ValueError, TypeError, KeyError, AttributeError):
            return True

    given = dict(pair.split("=") for pair in (training.optim_args or "").replace(" ", "").split(",") if pair)
    return [key for key in given if not is_read(key)]


def _check_dataset(own: DatasetArguments, where: str) -> None:
    from modeling.objectives import OBJECTIVES

    losses = (*OBJECTIVES, "cosent")
    if own.dataset_name is None:
        raise InputError(f"{where}: name the data to train on: dataset_name")
    if own.loss not in losses:
        raise InputError(f"{where}: loss: invalid choice: {own.loss!r}; choose one of {', '.join(losses)}")
    documents = OBJECTIVES[own.loss].documents if own.loss in OBJECTIVES else 1
    if own.num_negatives is not None and own.num_negatives < documents - 1:
        raise InputError(f"{where}: num_negatives is {own.num_negatives}; {own.loss} needs more")
    if own.shots and not (own.instruction and own.prompted_columns):
        raise InputError(f"{where}: shots stand before an instruction; name it and prompted_columns")


def _read_merge(values: Any, stages: Mapping[str, Any], where: str) -> MergeArguments:
    if not isinstance(values, dict):
        raise InputError(f"{where}: a mapping of stages, method and weights is needed, not {values!r}")
    (merge,) = parse_keys([MergeArguments], values, where)
    unknown = [name for name in merge.stages if name not in stages]
    if unknown or len(set(merge.stages)) < max(2, len(merge.stages)):
        wrong = f"no stage {unknown[0]!r} is run" if unknown else "name two stages or more, each once"
        raise InputError(f"{where}: {wrong}; there are {', '.join(stages)}")
    merge.weights = merge.weights or [1.0] * len(merge.stages)
    if len(merge.weights) != len(merge.stages) or not any(merge.weights):
        raise InputError(f"{where}: weights {merge.weights}: one a stage is needed, not all 0")
    if merge.method == "slerp" and len(merge.stages) != 2:
        raise InputError(f"{where}: slerp lies on the arc between two models; name two stages, or method: linear")
    return merge
