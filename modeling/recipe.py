"""Training recipes: shared keys, an ordered list of stages, and what the command line overrides.

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both, and --STAGE.KEY one stage. A stage trains on one data set or, with a list
`datasets:` of mappings with a `name`, on several: each may override the keys of `DatasetArguments`, and a batch comes
from one of them. Optimizer and schedule begin anew in every stage.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.cli import ArgumentParser, InputError
from common.models import unlike_hub
from common.recipes import Section, flag_texts, flag_value, read_yaml, text_keys
from common.recipes import parse_recipe as parse_section
from common.steps import write_json, written_whole
from modeling.arguments import (
    OF_THE_RECIPE,
    DatasetArguments,
    MergeArguments,
    RecipeArguments,
    StageArguments,
    StudentConfig,
)
from modeling.keys import DEFAULTS, REFUSED, check_training, library_keys, parse_library_keys

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

# Folders that a run has besides its stages'.
RESERVED = ("model", "adapter", "student", "merge", "logs", "data", "results", "report")
LONGEST_NAME = 100
STAGES = "stages.json"
_REFERENCES = ("model_name_or_path", "dataset_name", "teacher", "corpus")  # keys that name a model or data
VALIDATION_NDCG = "eval_validation_cosine_ndcg@10"  # in the trainer's log; chooses the best checkpoint by default


@dataclass(frozen=True)
class Stage:
    """One entry of the curriculum, read and checked; `settle` (modeling.start) fills in what it leaves to the start,
    `with_prompts` (modeling.stages) the prompts, once the data are known.
    """

    name: str
    values: dict[str, Any]  # the recipe's keys, overrides applied
    own: StageArguments
    datasets: dict[str, DatasetArguments]  # by name; `own` alone under the stage's name where there is no list
    model: ModelConfig
    training: SentenceTransformerTrainingArguments
    kept_prompts: Mapping[str, str] | None = None  # of the finished embedder that a run starts from; None: bare model
    prompts: Mapping[str, str] = field(default_factory=dict)  # of the stage's saved model, by name
    column_prompts: Mapping[str, dict[str, str]] = field(default_factory=dict)  # in training, by data set and column

    def place(self, dataset: str) -> str:
        """How messages call a data set of the stage."""
        return f"stage {self.name!r}" if dataset == self.name else f"stage {self.name!r}: data set {dataset!r}"

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
    return parse_recipe(read_yaml(arguments.config), str(arguments.config), arguments.stages, read_flags(flags))


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Flags as a mapping; of --STAGE.KEY and --student.KEY there is a mapping STAGE or student in it."""
    texts = text_keys(StageArguments) | text_keys(StudentConfig)
    values: dict[str, Any] = {}
    for name, given in flag_texts(flags):
        part, _, key = name.rpartition(".")
        target = values.setdefault(part, {}) if part else values
        if not isinstance(target, dict):
            raise InputError(f"--{name}: --{part} has a value already")
        target[key] = flag_value(given, key in texts)
    return values


def parse_recipe(
    values: Mapping[str, Any], where: str, selected: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """`values`, as YAML has them, with `overrides` (see `read_flags`), and only the `selected` stages (NAME,NAME).

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
    places = {name: f"{where}: stage {name!r}" for name in stages}

    whole = {key: value for key, value in values.items() if key in RecipeArguments.model_fields}
    shared = {key: value for key, value in values.items() if key not in whole}
    whole = parse_section(RecipeArguments, whole, where)
    _check_names(shared, where)
    for name, keys in stages.items():
        _check_names(keys, places[name])
        for key in OF_THE_RECIPE:
            if key in keys:
                raise InputError(f"{places[name]}: {key}: stages go on from one another; name it above them")
    output_dir = str(shared.get("output_dir") or "")
    if not output_dir or "\0" in output_dir:
        raise InputError(f"{where}: name one output_dir for all stages, in the recipe or by --output_dir")
    if bool(whole.student) == bool(shared.get("model_name_or_path")):
        number = "one of the two alone" if whole.student else "model_name_or_path, or student:"
        raise InputError(f"{where}: name the model to start from: {number}")
    for name in whole.merge.stages if whole.merge else ():
        if name not in stages:
            raise InputError(f"{where}: merge: no stage {name!r} is run; there are {', '.join(stages)}")
    budgets = _budgets(whole.total_steps, shared, stages, where)
    keys_of = {name: {**shared, **keys, **budgets.get(name, {})} for name, keys in stages.items()}
    datasets = {name: _read_own(keys, name, places[name]) for name, keys in keys_of.items()}
    # only now what takes seconds: importing the libraries that check their own keys
    parsed = [_read_stage(name, keys, *datasets[name], places[name]) for name, keys in keys_of.items()]
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(output_dir), parsed, whole.student, whole.merge)


def _check_names(values: Mapping[str, Any], where: str) -> None:
    """Raises InputError on a key that nothing reads, or that has no place in a recipe."""
    known = {*StageArguments.model_fields, *library_keys(), "datasets"}
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

    def own_keys(kind: type[Section]) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key in kind.model_fields}

    own = parse_section(StageArguments, own_keys(StageArguments), where)
    datasets: dict[str, DatasetArguments] = {name: own}
    if values.get("datasets") is not None:
        datasets = {
            entry: parse_section(
                DatasetArguments, {**own_keys(DatasetArguments), **keys}, f"{where}: data set {entry!r}"
            )
            for entry, keys in _named(values["datasets"], "data set", "datasets", where).items()
        }
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
    if keys.get("load_best_model_at_end") or keys.get("save_strategy") == "best":
        keys.setdefault("metric_for_best_model", VALIDATION_NDCG)
    try:
        model, training = parse_library_keys(keys)
        quantization(model)
        if model.lora_task_type != DEFAULTS["lora_task_type"]:
            raise InputError(f"lora_task_type: an embedder has no head; it is {DEFAULTS['lora_task_type']}")
        check_training(training)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return Stage(name, values, own, datasets, model, training)


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_with_paths(recipe.values), sort_keys=False, allow_unicode=True, width=119)
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
    stages = _with_paths(json.loads(json.dumps(written, default=str)))
    write_json(output_dir / STAGES, {"start": start, "stages": stages})


def _with_paths(values: Any) -> Any:
    """A recipe's keys, folders and files of this machine written so that nobody takes them for Hub ids."""
    if isinstance(values, Mapping):
        return {
            key: unlike_hub(value) if key in _REFERENCES and isinstance(value, str) else _with_paths(value)
            for key, value in values.items()
        }
    return [_with_paths(value) for value in values] if isinstance(values, list) else values


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
