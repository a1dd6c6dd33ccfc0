"""Training recipes: shared keys, an ordered list of stages, and what the command line overrides.

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both, and --STAGE.KEY one stage. Keys are the fields of `StageArguments`, of trl's
ModelConfig (lora_r, ...) and of sentence-transformers' training arguments (learning_rate, optim, ...): optimizer and
schedule begin anew in every stage.

A stage trains on one data set or, with a list `datasets:` of mappings with a `name`, on several: each may override
the keys of `DatasetArguments`, and a batch comes from one of them.

Three keys belong to the whole recipe: `student:` (modeling.student.StudentConfig) starts from a small model built on
the spot; `merge:` (MergeArguments) publishes an average of stages instead of the last one; `total_steps:` is shared
out equally among the stages that run, so that curricula of one, two or three stages cost equally many optimizer
steps. `max_steps`, by contrast, holds for each stage.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from common.cli import ArgumentParser, InputError
from common.recipes import read_yaml
from common.steps import write_json, written_whole
from modeling.keys import DEFAULTS, check_names, check_numbers, library_keys, parse_keys, read_flags

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

# Folders that a run has besides its stages'.
RESERVED = ("model", "adapter", "student", "merge", "logs", "data", "results", "report")
LONGEST_NAME = 100
STAGES = "stages.json"


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
    instruction: str | None = field(default=None, metadata={"help": "one sentence; null = the start's query prompt"})
    query_template: str | None = field(
        default=None, metadata={"help": "holds {task}; null = the start's, else 'Instruct: {task}\\nQuery: '"}
    )
    document_prompt: str | None = field(
        default=None, metadata={"help": "before columns without instruction; null = the start's, else none"}
    )
    prompted_columns: list[str] = field(default_factory=lambda: ["query"], metadata={"help": "get the instruction"})
    shots: int = field(default=0, metadata={"help": "the most demonstrations that a batch's prompt shows"})
    shots_budget: int | None = field(default=None, metadata={"help": "the most tokens of such a prompt; null = any"})
    zero_shot_probability: float = field(default=0.0, metadata={"help": "of a batch without demonstrations"})


@dataclass
class StageArguments(DatasetArguments):
    """What a stage trains on (or what the entries of its `datasets:` have in common), and what it makes."""

    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "tokens the model reads, prompt and EOS included; null = the start's, else 512"},
    )
    train_max_seq_length: int | None = field(default=None, metadata={"help": "in training; null = max_seq_length"})
    min_text_tokens: int = field(default=16, metadata={"help": "least room that a prompt must leave"})
    pooling: Literal["eos", "mean", "cls", "mean_without_prompt", "weighted_mean"] | None = field(
        default=None, metadata={"help": "null = that of a finished embedder, eos of a bare decoder"}
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "keep the first so many; null = all"})
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
    return parse_recipe(read_yaml(arguments.config), str(arguments.config), arguments.stages, read_flags(flags))


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
    student = {**_mapping(values.pop("student", None), where), **_mapping(overrides.pop("student", None), "--student")}
    by_stage = {
        key: overrides.pop(key) for key in list(overrides) if isinstance(overrides[key], dict) and key in stages
    }
    values |= overrides
    stages = {
        name: {**{key: value for key, value in keys.items() if key not in overrides}, **by_stage.get(name, {})}
        for name, keys in stages.items()
    }
    shared = {key: value for key, value in values.items() if key not in ("merge", "total_steps")}
    _check_keys(shared, stages, where)
    output_dirs = {str(keys.get("output_dir", shared.get("output_dir")) or "") for keys in stages.values()}
    if len(output_dirs) > 1 or not (output_dir := output_dirs.pop()) or "\0" in output_dir:
        raise InputError(f"{where}: name one output_dir for all stages, in the recipe or by --output_dir")
    if bool(student) == bool(values.get("model_name_or_path")):
        number = "one of the two alone" if student else "model_name_or_path, or student:"
        raise InputError(f"{where}: name the model to start from: {number}")
    budgets = _budgets(values, stages, where)
    parsed = [
        _read_stage(name, {**shared, **keys, **budgets.get(name, {})}, overrides, f"{where}: stage {name!r}")
        for name, keys in stages.items()
    ]
    merge = _read_merge(values["merge"], stages, f"{where}: merge") if values.get("merge") else None
    if student:
        values["student"] = student
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(output_dir), parsed, merge)


def _check_keys(shared: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raises InputError on a key that nothing reads, before the libraries that define most keys are imported."""
    own = {field.name for field in dataclasses.fields(StageArguments)}
    known = {*own, *library_keys(), "datasets"}
    check_names(shared, known, where)
    for name, keys in stages.items():
        check_names(keys, known, f"{where}: stage {name!r}")
        for key in ("model_name_or_path", "model_revision", "num_hidden_layers"):
            if key in keys:
                raise InputError(f"{where}: stage {name!r}: {key}: stages go on from one another; name it above them")


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, width=119)
    with written_whole(recipe.output_dir / "recipe.yaml") as path:  # a run may be started from this very file
        path.write_text(text, encoding="utf-8")


def write_stages(recipe: Recipe, start: Mapping[str, Any]) -> None:
    """Write stages.json: every stage with all its keys as they hold, defaults and the start's own values filled in.

    {"start": facts of the model that the first stage starts from,
     "stages": [{"name": ..., "datasets": {name: {key: value}}, "keys": {key: value}}]}
    """
    stages = []
    for stage in recipe.stages:
        model = {key: value for key, value in vars(stage.model).items() if key != "model_name_or_path"}
        training = json.loads(stage.training.to_json_string())
        for key in ("output_dir", "logging_dir", "run_name"):
            training.pop(key, None)
        datasets = {name: dataclasses.asdict(own) for name, own in stage.datasets.items()}
        keys = {**training, **model, **dataclasses.asdict(stage.own)}
        stages.append({"name": stage.name, "datasets": datasets, "keys": keys})
    write_json(recipe.output_dir / STAGES, {"start": start, "stages": json.loads(json.dumps(stages, default=str))})


def read_stages(run_folder: Path) -> dict[str, Any]:
    """What `write_stages` wrote. Raises InputError where `run_folder` is no training run."""
    path = run_folder / STAGES
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run_folder}: not a training run ({STAGES} is missing); make one with train_st.py"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}; run train_st.py again") from None


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

    from modeling.adapters import quantization

    types = (StageArguments, ModelConfig, SentenceTransformerTrainingArguments)
    own, model, training = parse_keys(types, {k: v for k, v in values.items() if k != "datasets"}, where)
    try:
        quantization(model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if model.lora_task_type != DEFAULTS["lora_task_type"]:
        raise InputError(f"{where}: lora_task_type: an embedder has no head; it is {DEFAULTS['lora_task_type']}")
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
    """Refuse now what would fail when a stage starts, hours from now."""
    import torch
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
    try:
        if not training.optim_target_modules:  # which would need the model
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
            schedule = {"scheduler_specific_kwargs": training.lr_scheduler_kwargs or {}}
            get_scheduler(
                training.lr_scheduler_type, kind([torch.nn.Parameter(torch.zeros(1))], **settings), 0, 2, **schedule
            )
        for pattern, rate in training.learning_rate_mapping.items():
            re.compile(pattern)
            training.learning_rate_mapping[pattern] = float(rate)  # YAML reads 1e-5 as a text
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, re.error) as error:
        raise InputError(f"{where}: training cannot start so: {error}") from None
    check_numbers(training, where)


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
