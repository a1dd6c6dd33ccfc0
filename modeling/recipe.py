"""Training recipes: shared keys, an ordered list of stages, and what the command line overrides.

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both, and --STAGE.KEY one stage. A stage trains on one data set or, with a list
`datasets:` of mappings with a `name`, on several: each may override the keys of `DatasetArguments`, and a batch comes
from one of them. Optimizer and schedule begin anew in every stage.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.cli import ArgumentParser, InputError
from common.recipes import Section, read_yaml, text_keys
from common.recipes import parse_recipe as parse_section
from common.steps import write_json, written_whole
from modeling.arguments import (
    DEFAULT_LENGTH,
    OF_THE_RECIPE,
    DatasetArguments,
    MergeArguments,
    RecipeArguments,
    StageArguments,
    StudentConfig,
)
from modeling.keys import DEFAULTS, REFUSED, library_keys, parse_library_keys, read_flags
from modeling.prompts import QUERY_TEMPLATE

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    from modeling.encoder import Published

# Folders that a run has besides its stages'.
RESERVED = ("model", "adapter", "student", "merge", "logs", "data", "results", "report")
LONGEST_NAME = 100
STAGES = "stages.json"
BEST = "eval_validation_cosine_ndcg@10"  # what the best checkpoint is chosen by, unless a recipe says otherwise


@dataclass(frozen=True)
class Stage:
    """One entry of the curriculum, read and checked."""

    name: str
    values: dict[str, Any]  # the recipe's keys, overrides applied
    own: StageArguments
    datasets: dict[str, DatasetArguments]  # by name; `own` alone under the stage's name where there is no list
    model: ModelConfig
    training: SentenceTransformerTrainingArguments
    published: Published | None = None  # what the run's start is as a finished embedder, see modeling.start.settle

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
    student: StudentConfig | None
    merge: MergeArguments | None


def read_recipe(argv: Sequence[str], description: str) -> Recipe:
    """The recipe that a command line names. Raises InputError on whatever is wrong in it."""
    parser = ArgumentParser(prog="python train_st.py", description=description)
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE")
    parser.add_argument("--stages", metavar="NAME,NAME", help="stages to run, in this order; all by default")
    parser.add_argument("--list_keys", action="store_true", help="print every key with default and meaning, and stop")
    arguments, flags = parser.parse_known_args(argv)
    flags = read_flags(flags, text_keys(StageArguments) | text_keys(StudentConfig))
    return parse_recipe(read_yaml(arguments.config), str(arguments.config), arguments.stages, flags)


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
    if isinstance(overrides.get("student"), dict):
        overrides["student"] = {**(values.get("student") or {}), **overrides["student"]}
    by_stage = {name: overrides.pop(name) for name in stages if isinstance(overrides.get(name), dict)}
    values |= overrides
    stages = {name: {**_without(keys, overrides), **by_stage.get(name, {})} for name, keys in stages.items()}
    whole = {key: values[key] for key in RecipeArguments.model_fields if key in values}
    whole = parse_section(RecipeArguments, whole, where)
    shared = {key: value for key, value in values.items() if key not in RecipeArguments.model_fields}
    _check_names(shared, StageArguments, where)
    for name, keys in stages.items():
        _check_names(keys, StageArguments, f"{where}: stage {name!r}")
        for key in OF_THE_RECIPE[:-1]:
            if key in keys:
                raise InputError(f"{where}: stage {name!r}: {key}: stages go on from one another; name it above them")
    output_dirs = {str(keys.get("output_dir", shared.get("output_dir")) or "") for keys in stages.values()}
    if len(output_dirs) > 1 or not (output_dir := output_dirs.pop()) or "\0" in output_dir:
        raise InputError(f"{where}: name one output_dir for all stages, in the recipe or by --output_dir")
    if bool(whole.student) == bool(values.get("model_name_or_path")):
        number = "one of the two alone" if whole.student else "model_name_or_path, or student:"
        raise InputError(f"{where}: name the model to start from: {number}")
    for name in whole.merge.stages if whole.merge else ():
        if name not in stages:
            raise InputError(f"{where}: merge: no stage {name!r} is run; there are {', '.join(stages)}")
    budgets = _budgets(whole.total_steps, shared, stages, where)
    keys_of = {name: {**shared, **keys, **budgets.get(name, {})} for name, keys in stages.items()}
    owns = {name: _read_own(keys, name, f"{where}: stage {name!r}") for name, keys in keys_of.items()}
    # only now what takes seconds: importing the libraries that check their own keys
    parsed = [_read_stage(name, keys_of[name], *owns[name], f"{where}: stage {name!r}") for name in stages]
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(output_dir), parsed, whole.student, whole.merge)


def _check_names(values: Mapping[str, Any], kind: type[Section], where: str) -> None:
    """Raises InputError on a key that nothing reads, or that has no place in a recipe."""
    known = {*kind.model_fields, *library_keys(), "datasets"}
    for key, value in values.items():
        if value and key in REFUSED:
            raise InputError(f"{where}: {key} {REFUSED[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "python train_st.py --list_keys prints all"
            raise InputError(f"{where}: unknown key {key!r}; {hint}")


def _without(keys: Mapping[str, Any], overrides: Collection[str]) -> dict[str, Any]:
    """A stage's keys, and those of its data sets, that no flag overrides."""
    kept = {key: value for key, value in keys.items() if key not in overrides}
    if isinstance(kept.get("datasets"), list):
        kept["datasets"] = [
            _without(entry, overrides) if isinstance(entry, dict) else entry for entry in kept["datasets"]
        ]
    return kept


def _read_own(values: Mapping[str, Any], name: str, where: str) -> tuple[StageArguments, dict[str, DatasetArguments]]:
    """A stage's keys that are ours, and those of its data sets."""
    own = parse_section(StageArguments, {k: v for k, v in values.items() if k in StageArguments.model_fields}, where)
    datasets: dict[str, DatasetArguments] = {name: own}
    if values.get("datasets") is not None:
        shared = {key: value for key, value in values.items() if key in DatasetArguments.model_fields}
        datasets = {}
        for entry, keys in _named(values["datasets"], "data set", "datasets", where).items():
            datasets[entry] = parse_section(DatasetArguments, {**shared, **keys}, f"{where}: data set {entry!r}")
    for entry, dataset in datasets.items():
        place = where if dataset is own else f"{where}: data set {entry!r}"
        if dataset.dataset_name is None:
            raise InputError(f"{place}: name the data to train on: dataset_name")
        if dataset.shots and not (dataset.instruction and dataset.prompted_columns):
            raise InputError(f"{place}: shots stand before an instruction; name it and prompted_columns")
    if own.prompt_shots and not any(data.shots and data.instruction == own.instruction for data in datasets.values()):
        raise InputError(
            f"{where}: prompt_shots shows training rows before the stage's `instruction`; no data set of it trains "
            "with shots and that instruction"
        )
    return own, datasets


def _read_stage(
    name: str, values: dict[str, Any], own: StageArguments, datasets: dict[str, DatasetArguments], where: str
) -> Stage:
    from modeling.adapters import quantization
    from modeling.objectives import OBJECTIVES

    for entry, dataset in datasets.items():
        place = where if dataset is own else f"{where}: data set {entry!r}"
        if dataset.loss not in (*OBJECTIVES, "cosent"):
            raise InputError(f"{place}: key 'loss' is {dataset.loss!r}: choose {', '.join(OBJECTIVES)} or cosent")
        needed = OBJECTIVES[dataset.loss].documents - 1 if dataset.loss in OBJECTIVES else 0
        if dataset.num_negatives is not None and dataset.num_negatives < needed:
            raise InputError(f"{place}: num_negatives is {dataset.num_negatives}; {dataset.loss} needs more")
    keys = {key: value for key, value in values.items() if key in library_keys()}
    if own.early_stopping_patience:
        keys.setdefault("load_best_model_at_end", True)
    if keys.get("load_best_model_at_end"):
        keys.setdefault("metric_for_best_model", BEST)
    model, training = parse_library_keys(keys, where)
    try:
        quantization(model)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if model.lora_task_type != DEFAULTS["lora_task_type"]:
        raise InputError(f"{where}: lora_task_type: an embedder has no head; it is {DEFAULTS['lora_task_type']}")
    _check_training(training, where)
    return Stage(name, values, own, datasets, model, training)


def _check_training(training: SentenceTransformerTrainingArguments, where: str) -> None:
    """Refuse now what would fail when a stage starts, hours from now."""
    import torch
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations

    if (training.resume_from_checkpoint or "false").lower() not in ("true", "false"):
        given = training.resume_from_checkpoint
        raise InputError(f"{where}: resume_from_checkpoint is {given!r}; true goes on from a stage's last checkpoint")
    installed = get_available_reporting_integrations()
    for name in training.report_to:
        if name not in installed:
            there = ", ".join(installed) or "none"
            raise InputError(f"{where}: report_to: {name!r} is not installed; there is {there}")
    try:
        if not training.optim_target_modules:  # which would need the model
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
            schedule = training.lr_scheduler_kwargs or {}
            get_scheduler(training.lr_scheduler_type, optimizer, 0, 2, scheduler_specific_kwargs=schedule)
        for pattern in training.learning_rate_mapping:
            re.compile(pattern)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, re.error) as error:
        raise InputError(f"{where}: training cannot start so: {error}") from None


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe.values, sort_keys=False, allow_unicode=True, width=119)
    with written_whole(recipe.output_dir / "recipe.yaml") as path:  # a run may be started from this very file
        path.write_text(text, encoding="utf-8")


def write_stages(stages: Sequence[Stage], start: Mapping[str, Any], output_dir: Path) -> None:
    """Write stages.json: every stage with all its keys as they hold, defaults and the start's own values filled in.

    {"start": facts of the model that the first stage starts from,
     "stages": [{"name": ..., "datasets": {name: {key: value}}, "keys": {key: value}}]}
    """
    written = []
    for stage in stages:
        keys = {
            **json.loads(stage.training.to_json_string()),
            **vars(stage.model),
            **stage.own.model_dump(mode="json"),
        }
        for key in ("output_dir", "logging_dir", "run_name", "model_name_or_path"):
            keys.pop(key, None)
        datasets = {name: own.model_dump(mode="json") for name, own in stage.datasets.items()}
        written.append({"name": stage.name, "datasets": datasets, "keys": keys})
    write_json(output_dir / STAGES, {"start": start, "stages": json.loads(json.dumps(written, default=str))})


def read_stages(run_folder: Path) -> dict[str, Any]:
    """What `write_stages` wrote; of a run that has none its recipe.yaml, with the defaults of our own keys filled in.

    Raises InputError where `run_folder` is no training run.
    """
    path = run_folder / STAGES
    if not path.is_file() and (run_folder / "recipe.yaml").is_file():
        return _plain_stages(read_yaml(run_folder / "recipe.yaml"))
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{run_folder}: not a training run ({STAGES} is missing); make one with train_st.py"
        ) from None
    except ValueError as error:
        raise InputError(f"{path}: not readable as JSON: {error}; run train_st.py again") from None


def _plain_stages(recipe: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        **StageArguments(
            query_template=QUERY_TEMPLATE, document_prompt="", max_seq_length=DEFAULT_LENGTH
        ).model_dump(),
        "dtype": None,
    }
    shared = {key: value for key, value in recipe.items() if key not in ("stages", "datasets")}
    stages = []
    for stage in recipe["stages"]:
        keys = {**defaults, **shared, **stage}
        entries = keys.pop("datasets", None) or [{"name": keys["name"]}]
        stages.append(
            {"name": keys["name"], "keys": keys, "datasets": {own["name"]: {**keys, **own} for own in entries}}
        )
    model = "student" if recipe.get("student") else recipe.get("model_name_or_path")
    start = {"model": model, "revision": recipe.get("model_revision"), "published": None, "quantisation": None}
    return {"start": start, "stages": stages}


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


def _select(stages: dict[str, dict[str, Any]], names: str) -> dict[str, dict[str, Any]]:
    selected = names.split(",")
    unknown = [name for name in selected if name not in stages]
    if unknown or len(set(selected)) < len(selected):
        wrong = f"no stage {unknown[0]!r}" if unknown else "a stage twice"
        raise InputError(f"--stages {names}: {wrong}; the recipe has {', '.join(stages)}")
    return {name: stages[name] for name in selected}


def _budgets(
    total: int | None, shared: Mapping[str, Any], stages: Mapping[str, Any], where: str
) -> dict[str, dict[str, int]]:
    """Each stage's max_steps out of `total_steps`; the first ones take what cannot be divided."""
    if total is None:
        return {}
    if total < len(stages):
        raise InputError(f"{where}: total_steps is {total}; it must be at least 1 for each stage")
    if any("max_steps" in keys for keys in (shared, *stages.values())):
        raise InputError(f"{where}: max_steps and total_steps both say how long stages are; drop one")
    share, left = divmod(total, len(stages))
    return {name: {"max_steps": share + (position < left)} for position, name in enumerate(stages)}
