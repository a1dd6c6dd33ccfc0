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

import dataclasses
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dataset_builders.cli import ArgumentParser, InputError
from dataset_builders.recipes import read_yaml

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
    where = str(arguments.config)
    values = read_yaml(arguments.config)
    stages = _named(values.pop("stages", None), "stage", "stages", where, taken=RESERVED)
    if arguments.stages:
        stages = _select(stages, arguments.stages)
    overrides = _read_flags(flags)
    student = {**(values.pop("student", None) or {}), **overrides.pop("student", {})}
    values |= overrides
    stages = {name: {k: v for k, v in keys.items() if k not in overrides} for name, keys in stages.items()}

    shared = {key: value for key, value in values.items() if key not in ("merge", "total_steps")}
    budgets = _budgets(values, stages, where)
    parsed = [
        _read_stage(name, {**shared, **keys, **budgets.get(name, {})}, overrides, f"{where}: stage {name!r}")
        for name, keys in stages.items()
    ]
    output_dirs = {stage.training.output_dir for stage in parsed}
    if None in output_dirs or len(output_dirs) > 1:
        raise InputError(f"{where}: name one output_dir for all stages, in the recipe or by --output_dir")
    if not student and not values.get("model_name_or_path"):
        raise InputError(f"{where}: name the model to start from: model_name_or_path, or student:")
    merge = _read_merge(values["merge"], stages, f"{where}: merge") if values.get("merge") else None
    if student:
        values["student"] = student
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(output_dirs.pop()), parsed, merge)


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, width=119)
    (recipe.output_dir / "recipe.yaml").write_text(text, encoding="utf-8")


def parse_keys(types: Sequence[type], values: Mapping[str, Any], where: str) -> list[Any]:
    """`values` as instances of the dataclasses `types`. Raises InputError on an unknown or ill-typed key."""
    from trl import TrlParser

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise InputError(f"{where}: {message}")

    fields = [field.name for kind in types for field in dataclasses.fields(kind)]
    for key in values:
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
        return list(parser.parse_args_and_config(args=flags))
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None


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
        if not isinstance(entry, dict) or not str(entry.get("name", "")).isidentifier():
            raise InputError(f"{where}: {kind} {entry!r}: a {kind} is a mapping with a name of letters, digits and _")
        name = entry["name"]
        if name in named or name in taken:
            raise InputError(f"{where}: {kind} name {name!r} is taken; choose another")
        named[name] = {key: value for key, value in entry.items() if key != "name"}
    return named


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
    for flag, *texts in groups:
        if not texts:
            raise InputError(f"{flag} needs a value")
        parsed = [yaml.safe_load(text) for text in texts]
        target, name = values, flag.removeprefix("--")
        if name.startswith("student."):
            target, name = values.setdefault("student", {}), name.removeprefix("student.")
        target[name] = parsed[0] if len(parsed) == 1 else parsed
    return values


def _budgets(values: Mapping[str, Any], stages: Mapping[str, Any], where: str) -> dict[str, dict[str, int]]:
    """Each stage's max_steps out of `total_steps`; the first ones take what cannot be divided."""
    total = values.get("total_steps")
    if total is None:
        return {}
    if not isinstance(total, int) or total < len(stages):
        raise InputError(f"{where}: total_steps is {total!r}; it must be a number, at least 1 for each stage")
    if any("max_steps" in keys for keys in (values, *stages.values())):
        raise InputError(f"{where}: max_steps and total_steps both say how long stages are; drop one")
    share, left = divmod(total, len(stages))
    return {name: {"max_steps": share + (position < left)} for position, name in enumerate(stages)}


def _read_stage(name: str, values: dict[str, Any], overrides: Mapping[str, Any], where: str) -> Stage:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    from modeling.encoder import quantization

    if "prompts" in values:
        raise InputError(f"{where}: prompts are made of `instruction` and `prompted_columns`; use these")
    for key in ("batch_sampler", "multi_dataset_batch_sampler"):
        if key in values:
            raise InputError(f"{where}: {key} has no effect: batches are made by modeling/batches.py; leave it out")
    types = (StageArguments, ModelConfig, SentenceTransformerTrainingArguments)
    own, model, training = parse_keys(types, {k: v for k, v in values.items() if k != "datasets"}, where)
    try:
        quantization(model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if own.train_max_seq_length is None:
        own.train_max_seq_length = own.max_seq_length
    if own.train_max_seq_length > own.max_seq_length:
        raise InputError(f"{where}: train_max_seq_length is above max_seq_length ({own.max_seq_length}); lower it")
    for key in ("train_max_seq_length", "eval_queries", "eval_documents"):
        if getattr(own, key) <= 0:
            raise InputError(f"{where}: {key} is {getattr(own, key)}; it must be above 0")
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
    if own.prompt_shots < 0:
        raise InputError(f"{where}: prompt_shots is {own.prompt_shots}; it must be 0 or more")
    if own.prompt_shots and not any(data.shots and data.instruction == own.instruction for data in datasets.values()):
        raise InputError(
            f"{where}: prompt_shots shows training rows before the stage's `instruction`; no data set of it trains "
            "with shots and that instruction"
        )
    return Stage(name, values, own, datasets, model, training)


def _check_dataset(own: DatasetArguments, where: str) -> None:
    from modeling.objectives import OBJECTIVES

    losses = (*OBJECTIVES, "cosent")
    if own.dataset_name is None:
        raise InputError(f"{where}: name the data to train on: dataset_name")
    if own.loss not in losses:
        raise InputError(f"{where}: loss: invalid choice: {own.loss!r}; choose one of {', '.join(losses)}")
    for key in ("temperature", "target_temperature", "weight"):
        if getattr(own, key) <= 0:
            raise InputError(f"{where}: {key} is {getattr(own, key)}; it must be above 0")
    documents = OBJECTIVES[own.loss].documents if own.loss in OBJECTIVES else 1
    if own.num_negatives is not None and own.num_negatives < documents - 1:
        raise InputError(f"{where}: num_negatives is {own.num_negatives}; {own.loss} needs more")
    if own.false_negative_margin is not None and own.false_negative_margin < 0:
        raise InputError(
            f"{where}: false_negative_margin is {own.false_negative_margin}; it must be 0 or more, or null"
        )
    for key in ("alpha", "zero_shot_probability"):
        if not 0 <= getattr(own, key) <= 1:
            raise InputError(f"{where}: {key} is {getattr(own, key)}; it must lie in [0, 1]")
    if own.shots < 0:
        raise InputError(f"{where}: shots is {own.shots}; it must be 0 or more")
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
    if len(merge.weights) != len(merge.stages) or min(merge.weights) < 0 or sum(merge.weights) <= 0:
        raise InputError(f"{where}: weights {merge.weights}: one a stage is needed, none below 0, not all 0")
    if merge.method == "slerp" and len(merge.stages) != 2:
        raise InputError(f"{where}: slerp lies on the arc between two models; name two stages, or method: linear")
    return merge
