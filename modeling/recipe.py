"""Training recipes: shared keys, an ordered list of stages, and what the command line overrides.

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both, and --STAGE.KEY one stage. A stage trains on one data set or, with a list
`datasets:` of mappings with a `name`, on several: each may override the keys of `DatasetArguments`, and a batch comes
from one of them. Optimizer and schedule begin anew in every stage.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from common.cli import ArgumentParser, InputError, at
from common.models import unlike_hub
from common.recipes import Section, flag_texts, flag_value, parse_section, read_yaml, text_keys
from common.steps import MANIFEST, read_json, read_manifest, write_json, written_whole
from modeling.keys import (
    DEFAULTS,
    OF_THE_RECIPE,
    DatasetArguments,
    MergeArguments,
    RecipeArguments,
    StageArguments,
    StudentConfig,
    stage_keys,
)

if TYPE_CHECKING:
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

# Folders that a run has besides its stages', by training, evaluation, ablation and publishing.
RESERVED = ("model", "adapter", "student", "merge", "logs", "data", "results", "report")
RESERVED += ("embeddings", "mteb", "exports")
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
    values, overrides = read_yaml(arguments.config), read_flags(flags)
    with at(str(arguments.config)):
        return parse_recipe(values, arguments.stages, overrides)


def read_flags(flags: Sequence[str]) -> dict[str, Any]:
    """Flags as a mapping; of --STAGE.KEY and --student.KEY there is a mapping STAGE or student in it."""
    texts = text_keys(StageArguments) | text_keys(StudentConfig)
    return nested((name, flag_value(given, name.rpartition(".")[2] in texts)) for name, given in flag_texts(flags))


def nested(overrides: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Overrides by KEY or PART.KEY, as `parse_recipe` takes them.

    >>> nested([("loss", "kl"), ("sts.loss", "cosent"), ("sts.shots", 2)])
    {'loss': 'kl', 'sts': {'loss': 'cosent', 'shots': 2}}
    """
    values: dict[str, Any] = {}
    for name, value in overrides:
        part, _, key = name.rpartition(".")
        target = values.setdefault(part, {}) if part else values
        if not isinstance(target, dict):
            raise InputError(f"--{name}: --{part} has a value already")
        target[key] = value
    return values


def parse_recipe(
    values: Mapping[str, Any], selected: str | None = None, overrides: Mapping[str, Any] | None = None
) -> Recipe:
    """`values`, as YAML has them, with `overrides` (see `nested`), and only the `selected` stages (NAME,NAME).

    Raises InputError on whatever is wrong.
    """
    values, overrides = dict(values), dict(overrides or {})
    stages = _named(values.pop("stages", None), "stage", "stages", taken=RESERVED)
    if selected is not None:
        stages = _select(stages, selected)
    by_stage = {name: overrides.pop(name) for name in stages if isinstance(overrides.get(name), dict)}
    if isinstance(overrides.get("student"), dict):
        overrides["student"] = {**(values.get("student") or {}), **overrides["student"]}
    values |= overrides
    stages = {name: {**_without(keys, overrides), **by_stage.get(name, {})} for name, keys in stages.items()}
    whole = parse_section(RecipeArguments, _part(values, RecipeArguments))
    shared = {key: value for key, value in values.items() if key not in RecipeArguments.model_fields}
    _check_recipe(whole, shared, stages)
    budgets = _budgets(whole.total_steps, shared, stages)
    keys_of = {name: {**shared, **keys, **budgets.get(name, {})} for name, keys in stages.items()}
    own, parsed = {}, []
    for name, keys in keys_of.items():
        with at(f"stage {name!r}"):
            own[name] = _read_own(name, keys)
    for name, keys in keys_of.items():  # only now what takes seconds: importing the libraries
        with at(f"stage {name!r}"):
            parsed.append(Stage(name, keys, *own[name], *parse_library_keys(keys)))
    values["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return Recipe(values, Path(shared["output_dir"]), parsed, whole.student, whole.merge)


def _part(values: Mapping[str, Any], kind: type[Section]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key in kind.model_fields}


def _without(keys: Mapping[str, Any], dropped: Collection[str]) -> dict[str, Any]:
    """A stage's keys, and those of its data sets, but for `dropped` ones."""
    kept = {key: value for key, value in keys.items() if key not in dropped}
    if isinstance(kept.get("datasets"), list):
        kept["datasets"] = [
            _without(entry, dropped) if isinstance(entry, dict) else entry for entry in kept["datasets"]
        ]
    return kept


def _check_recipe(whole: RecipeArguments, shared: Mapping[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> None:
    """Names and ranges of all keys where they are written, and that the recipe has what stages do not."""
    parse_section(stage_keys(), _without(shared, ["datasets"]))
    output_dir = str(shared.get("output_dir") or "")
    if not output_dir or "\0" in output_dir:
        raise InputError("name one output_dir for all stages, in the recipe or by --output_dir")
    if bool(whole.student) == bool(shared.get("model_name_or_path")):
        number = "one of the two alone" if whole.student else "model_name_or_path, or student:"
        raise InputError(f"name the model to start from: {number}")
    # a run that read what it writes would come to something else each time
    written = {os.path.abspath(Path(output_dir, name)) for name in ("model", *stages)}
    start = shared.get("model_name_or_path")
    if start and os.path.abspath(start) in written:
        raise InputError(f"model_name_or_path {start!r} is written by this run; choose another output_dir")
    if whole.merge:
        with at("merge"):
            _check_merged([name for name in whole.merge.stages if name not in stages], stages, written)
    for name, keys in stages.items():
        with at(f"stage {name!r}"):
            parse_section(stage_keys(), _without(keys, ["datasets"]))
            if above := [key for key in OF_THE_RECIPE if key in keys]:
                raise InputError(f"{above[0]}: stages go on from one another; name it above them")


def _check_merged(folders: Sequence[str], stages: Collection[str], written: Collection[str]) -> None:
    """That each is a model's folder, named once, and none of those that this run writes."""
    there = set()
    for name in folders:
        folder = os.path.abspath(name)
        if not Path(name, "modules.json").is_file():
            raise InputError(
                f"{name!r} is no stage that is run and no folder of a model; stages are {', '.join(stages)}"
            )
        if folder in written:
            raise InputError(f"{name!r} is written by this run; name a stage, or copy the model elsewhere")
        if folder in there:
            raise InputError(f"{name!r} is there twice; name two or more, each once")
        there.add(folder)


def _read_own(name: str, values: Mapping[str, Any]) -> tuple[StageArguments, dict[str, DatasetArguments]]:
    """A stage's keys that are ours, and those of its data sets."""
    own, of_data = StageArguments(**_part(values, StageArguments)), _part(values, DatasetArguments)
    listed, datasets = values.get("datasets") is not None, {}
    for entry, keys in (_named(values["datasets"], "data set", "datasets") if listed else {name: {}}).items():
        with at(f"data set {entry!r}" if listed else ""):
            data = datasets[entry] = parse_section(DatasetArguments, {**of_data, **keys}) if listed else own
            if data.dataset_name is None:
                raise InputError("name the data to train on: dataset_name")
            if data.shots and not (data.instruction and data.prompted_columns):
                raise InputError("shots stand before an instruction; name it and prompted_columns")
    if own.prompt_shots and not any(data.shots and data.instruction == own.instruction for data in datasets.values()):
        raise InputError(
            "prompt_shots shows training rows before the stage's `instruction`; no data set of it trains with shots "
            "and that instruction"
        )
    return own, datasets


def parse_library_keys(values: Mapping[str, Any]) -> tuple[ModelConfig, SentenceTransformerTrainingArguments]:
    """The keys of a stage that are not ours, as the libraries' dataclasses. Raises InputError for what they do not
    take, or would not when the stage starts, hours from now.
    """
    import torch
    from sentence_transformers import SentenceTransformerTrainingArguments
    from transformers import Trainer, get_scheduler
    from transformers.integrations import get_available_reporting_integrations
    from trl import ModelConfig, TrlParser

    from modeling.adapters import quantization

    if values.get("early_stopping_patience"):
        values = {"load_best_model_at_end": True, **values}
    if values.get("load_best_model_at_end") or values.get("save_strategy") == "best":
        values = {"metric_for_best_model": VALIDATION_NDCG, **values}

    class Parser(TrlParser):
        def error(self, message: str) -> None:
            raise InputError(message)

    parser = Parser([ModelConfig, SentenceTransformerTrainingArguments], allow_abbrev=False)
    # what no flag says: an empty list, and several of a key that is text or a list
    ours = (*StageArguments.model_fields, "datasets")
    values = {key: value for key, value in values.items() if key not in ours and value is not None}
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
    quantization(model)
    installed = get_available_reporting_integrations()
    if missing := [name for name in training.report_to if name not in installed]:
        raise InputError(f"report_to: {missing[0]!r} is not installed; there is {', '.join(installed) or 'none'}")
    try:
        if not training.optim_target_modules:  # which would need the model
            kind, settings = Trainer.get_optimizer_cls_and_kwargs(training)
            optimizer = kind([torch.nn.Parameter(torch.zeros(1))], **settings)
            schedule = training.lr_scheduler_kwargs or {}
            get_scheduler(training.lr_scheduler_type, optimizer, 0, 2, scheduler_specific_kwargs=schedule)
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        raise InputError(f"training cannot start so: {error}") from None
    return model, training


def _as_flags(key: str, value: Any) -> list[str]:
    if value is False and key.endswith("_strategy"):
        value = "no"  # which YAML reads as false
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict) else value}"]


def _named(entries: Any, kind: str, key: str, taken: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The list of mappings under `key`, by their names."""
    if not isinstance(entries, list) or not entries:
        raise InputError(f"`{key}` must be a list of mappings, each with a name")
    named: dict[str, dict[str, Any]] = {}
    for entry in entries:
        name = entry.get("name") if isinstance(entry, dict) else None
        if not isinstance(name, str) or not name.isidentifier() or len(name.encode()) > LONGEST_NAME:
            rule = f"a {kind} is a mapping with a name of letters, digits and _, {LONGEST_NAME} at most"
            raise InputError(f"{kind} {entry!r}: {rule}")
        if name in named or name in taken:
            raise InputError(f"{kind} name {name!r} is taken; choose another")
        named[name] = {key: value for key, value in entry.items() if key != "name"}
    return named


def _select(stages: dict[str, dict[str, Any]], names: str) -> dict[str, dict[str, Any]]:
    selected = names.split(",")
    unknown = [name for name in selected if name not in stages]
    if unknown or len(set(selected)) < len(selected):
        wrong = f"no stage {unknown[0]!r}" if unknown else "a stage twice"
        raise InputError(f"--stages {names}: {wrong}; the recipe has {', '.join(stages)}")
    return {name: stages[name] for name in selected}


def _budgets(total: int | None, shared: Mapping[str, Any], stages: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    """Each stage's max_steps out of `total_steps`; the first ones take what cannot be divided."""
    if total is None:
        return {}
    if total < len(stages):
        raise InputError(f"total_steps is {total}; it must be at least 1 for each stage")
    if any("max_steps" in keys for keys in (shared, *stages.values())):
        raise InputError("max_steps and total_steps both say how long stages are; drop one")
    share, left = divmod(total, len(stages))
    return {name: {"max_steps": share + (position < left)} for position, name in enumerate(stages)}


# --- what is written of a run ---------------------------------------------------------------------------------------


def write_recipe(recipe: Recipe) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    recipe.output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(_with_paths(recipe.values), sort_keys=False, allow_unicode=True, width=119)
    with written_whole(recipe.output_dir / "recipe.yaml") as path:  # a run may be started from this very file
        path.write_text(text, encoding="utf-8")


def write_stages(
    stages: Sequence[Stage], start: Mapping[str, Any], output_dir: Path, model: Mapping[str, Any] | None = None
) -> None:
    """Write stages.json: every stage with all its keys as they hold, defaults and the start's own values filled in.

    {"start": facts of the model that the first stage starts from,
     "stages": [{"name": ..., "datasets": {name: {key: value}}, "keys": {key: value}}],
     "model": inputs of model/ as its manifest will have them}
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
    write_json(output_dir / STAGES, {"start": start, "stages": stages, "model": model})


def _with_paths(values: Any) -> Any:
    """A recipe's keys, folders and files of this machine written so that nobody takes them for Hub ids."""
    if isinstance(values, Mapping):
        return {
            key: unlike_hub(value) if key in _REFERENCES and isinstance(value, str) else _with_paths(value)
            for key, value in values.items()
        }
    return [_with_paths(value) for value in values] if isinstance(values, list) else values


def read_stages(run_folder: Path) -> dict[str, Any]:
    """What `write_stages` wrote. Raises InputError where `run_folder` is no training run, or model/ is of an earlier
    one: nothing here would hold for it.
    """
    path, model = run_folder / STAGES, run_folder / "model"
    if not path.is_file():
        raise InputError(f"{run_folder}: not a training run ({STAGES} is missing); make one with train_st.py")
    found = read_json(path, "train_st.py again")
    if found.get("model") and (model / MANIFEST).is_file() and read_manifest(model)["inputs"] != found["model"]:
        raise InputError(
            f"{model}: of other keys, data or stages than {path}, whose run has not ended; finish it: python "
            f"train_st.py --config {run_folder / 'recipe.yaml'} --resume_from_checkpoint true"
        )
    return found
