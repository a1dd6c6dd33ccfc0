"""Train an embedder by a recipe: stages in order, each from the weights of the one before.

    python train_st.py --config recipes/demo/train.yaml [--stages sts,retrieval] [--max_steps N]
                       [--resume_from_checkpoint true] [--KEY VALUE ...]

A recipe is a YAML file of shared keys and a list `stages:` of mappings with a `name`, each of which may override any
shared key; a flag overrides both. Keys are the fields of `StageArguments` below, of trl's ModelConfig (lora_r, ...)
and of sentence-transformers' training arguments (learning_rate, ...). `--stages` selects stages and orders them. With
a `student:` mapping (modeling.student.StudentConfig) training starts from a small model built on the spot; its keys
are flags too: --student.hidden_size 256.

Result in output_dir: recipe.yaml (what was run), STAGE/ for each stage (a plain SentenceTransformer folder), model/
(the last one), adapter/ (peft format, when the last stage trained LoRA), logs/STAGE.json (the trainer's log history)
and ledger.json (what it cost). Finished stages are skipped. A killed stage starts again, or, with
--resume_from_checkpoint true, goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from dataset_builders.cli import ArgumentParser, InputError, run
from dataset_builders.folders import MANIFEST, files_of, fingerprint, folder_step, read_manifest, write_json
from dataset_builders.recipes import read_yaml
from dataset_builders.references import resolve_model
from modeling.prompts import baked_prompts, instruction_prompt

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from torch import nn
    from trl import ModelConfig

    from modeling.trainer import EmbedderTrainer
    from modeling.training_data import SearchSample

# Defaults that are ours and not the libraries'.
DEFAULTS = {
    "lora_task_type": "FEATURE_EXTRACTION",  # trl's CAUSAL_LM adapter would not load on a model without LM head
    "save_total_limit": 1,  # resuming needs the last checkpoint alone, and a 7B one is 14 GB
    "logging_steps": 10,
}
# Keys that decide where a result lies and how it is shown, not what it is: a stage is not trained again for them.
NO_INPUTS = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "save_total_limit")
NO_INPUTS += ("dataset_name", "model_name_or_path", "model_revision")  # fingerprinted by content instead
ADAPTER = "adapter"


@dataclass
class StageArguments:
    """What a stage trains on, and by which objective."""

    dataset_name: str = field(metadata={"help": "Hub id, or folder with a README.md that has `configs:` (DIR/hub)"})
    dataset_config: str = field(default="train", metadata={"help": "`train`: query, positive, negative_1 ..., label"})
    dataset_revision: str | None = field(default=None, metadata={"help": "of the Hub id"})
    loss: Literal["soft_info_nce", "info_nce", "cosent"] = "soft_info_nce"
    temperature: float = field(default=0.02, metadata={"help": "divides cosines"})
    target_temperature: float = field(default=1.0, metadata={"help": "divides the logits of soft labels"})
    alpha: float = field(default=1.0, metadata={"help": "of soft InfoNCE against 1 - alpha of InfoNCE"})
    mini_batch_size: int | None = field(default=None, metadata={"help": "texts at a time, by GradCache; null = all"})
    num_negatives: int | None = field(default=None, metadata={"help": "the first of each row's; null = all"})
    instruction: str | None = field(default=None, metadata={"help": "one sentence; null = queries without prompt"})
    prompted_columns: list[str] = field(default_factory=lambda: ["query"], metadata={"help": "get the instruction"})
    max_seq_length: int = field(default=512, metadata={"help": "tokens the model reads, prompt and EOS included"})
    train_max_seq_length: int | None = field(default=None, metadata={"help": "in training; null = max_seq_length"})
    min_text_tokens: int = field(default=16, metadata={"help": "least room that a prompt must leave"})
    pooling: Literal["eos", "mean"] = "eos"
    eval_queries: int = field(default=200, metadata={"help": "sample of the validation queries, at each evaluation"})
    eval_documents: int = field(default=2000, metadata={"help": "sample they search, with all their relevant ones"})


@dataclass(frozen=True)
class Stage:
    """One entry of the curriculum, read and checked."""

    name: str
    values: dict[str, Any]  # the recipe's keys, overrides applied
    own: StageArguments
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


def main(argv: Sequence[str]) -> None:
    recipe, output_dir, stages = read_recipe(argv)
    data = {stage.name: load_data(stage) for stage in stages}
    start = first_start(recipe, stages[0], output_dir)
    check_room(stages, start)
    write_recipe(recipe, output_dir)
    for stage in stages:
        start = train_stage(stage, start, data[stage.name], output_dir)
        write_ledger(stages, output_dir)
    publish(start, output_dir)


# --- recipe ---------------------------------------------------------------------------------------------------------


def read_recipe(argv: Sequence[str]) -> tuple[dict[str, Any], Path, list[Stage]]:
    """The recipe with all overrides applied, its output_dir, and its selected stages."""
    parser = ArgumentParser(prog="python train_st.py", description=__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="RECIPE")
    parser.add_argument("--stages", metavar="NAME,NAME", help="stages to run, in this order; all by default")
    arguments, flags = parser.parse_known_args(argv)
    recipe = read_yaml(arguments.config)
    stages = _stage_entries(recipe.pop("stages", None), arguments.config)
    if arguments.stages:
        stages = _select(stages, arguments.stages)
    overrides = _read_flags(flags)
    student = {**(recipe.pop("student", None) or {}), **overrides.pop("student", {})}
    recipe |= overrides
    stages = {name: {k: v for k, v in keys.items() if k not in overrides} for name, keys in stages.items()}
    parsed = [_read_stage(name, {**recipe, **keys}, str(arguments.config)) for name, keys in stages.items()]
    output_dirs = {stage.training.output_dir for stage in parsed}
    if None in output_dirs or len(output_dirs) > 1:
        raise InputError(f"{arguments.config}: name one output_dir for all stages, in the recipe or by --output_dir")
    if not student and not recipe.get("model_name_or_path"):
        raise InputError(f"{arguments.config}: name the model to start from: model_name_or_path, or student:")
    if student:
        recipe["student"] = student
    recipe["stages"] = [{"name": name, **keys} for name, keys in stages.items()]
    return recipe, Path(output_dirs.pop()), parsed


def _stage_entries(entries: Any, where: Path) -> dict[str, dict[str, Any]]:
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{where}: `stages` must be a list of mappings, each with a name")
    stages = {}
    for entry in entries:
        if not isinstance(entry, dict) or not str(entry.get("name", "")).isidentifier():
            raise InputError(f"{where}: stage {entry!r}: a stage is a mapping with a name of letters, digits and _")
        name = entry["name"]
        if name in stages or name in ("model", "adapter", "student", "logs", "data", "results", "report"):
            raise InputError(f"{where}: stage name {name!r} is taken; choose another")
        stages[name] = {key: value for key, value in entry.items() if key != "name"}
    return stages


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


def _read_stage(name: str, values: dict[str, Any], where: str) -> Stage:
    from sentence_transformers import SentenceTransformerTrainingArguments
    from trl import ModelConfig

    where = f"{where}: stage {name!r}"
    if "prompts" in values:
        raise InputError(f"{where}: prompts are made of `instruction` and `prompted_columns`; use these")
    types = (StageArguments, ModelConfig, SentenceTransformerTrainingArguments)
    own, model, training = parse_keys(types, values, where)
    if model.load_in_4bit or model.load_in_8bit:
        raise InputError(f"{where}: quantised training is not supported; drop load_in_4bit and load_in_8bit")
    if own.loss == "cosent" and own.mini_batch_size is not None:
        raise InputError(f"{where}: cosent has no GradCache; drop mini_batch_size or lower the batch size")
    if own.train_max_seq_length is None:
        own.train_max_seq_length = own.max_seq_length
    if own.train_max_seq_length > own.max_seq_length:
        raise InputError(f"{where}: train_max_seq_length is above max_seq_length ({own.max_seq_length}); lower it")
    for key in ("temperature", "target_temperature", "train_max_seq_length", "eval_queries", "eval_documents"):
        if getattr(own, key) <= 0:
            raise InputError(f"{where}: {key} is {getattr(own, key)}; it must be above 0")
    if own.num_negatives is not None and own.num_negatives < (own.loss == "soft_info_nce"):
        raise InputError(f"{where}: num_negatives is {own.num_negatives}; {own.loss} needs more")
    if not 0 <= own.alpha <= 1:
        raise InputError(f"{where}: alpha is {own.alpha}; it must lie in [0, 1]")
    return Stage(name, values, own, model, training)


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


def write_recipe(recipe: dict[str, Any], output_dir: Path) -> None:
    """Write what is run, as a recipe that runs it again: before anything else, for whoever reads a half-done run."""
    output_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=119)
    (output_dir / "recipe.yaml").write_text(text, encoding="utf-8")


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageData:
    train: Dataset
    validation: SearchSample | None  # None when the stage does not evaluate
    key: str  # changes when the data do


def load_data(stage: Stage) -> StageData:
    """A stage's rows and, if it evaluates while it trains, its validation sample; all checked before training."""
    from modeling.training_data import data_key, load_config, search_sample, training_rows

    own = stage.own
    where = f"stage {stage.name!r}"
    key = data_key(own.dataset_name, own.dataset_revision, where)

    def load(config: str) -> Dataset:
        return load_config(own.dataset_name, config, own.dataset_revision, key, where)

    prompted = own.prompted_columns if own.instruction else []
    rows = load(own.dataset_config)
    rows = training_rows(rows, own.loss, prompted, f"{where}: config {own.dataset_config!r}", own.num_negatives)
    sample = None
    if stage.training.eval_strategy.value != "no":
        size = {"max_queries": own.eval_queries, "max_documents": own.eval_documents, "seed": stage.training.seed}
        sample = search_sample(load("queries"), load("documents"), load("qrels"), **size, where=where)
    return StageData(rows, sample, key)


# --- model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """The weights a stage starts from: a Hub id or a folder."""

    name_or_path: str
    revision: str | None
    key: str  # changes when the weights do
    reference: str  # as the recipe wrote it
    adapter: TrainedAdapter | None = None

    def name_from(self, folder: Path) -> str:
        """How an adapter in `folder` names this base: a Hub id, a package, or a path relative to the folder."""
        if Path(self.name_or_path).is_dir() and not self.reference.startswith("package:"):
            return os.path.relpath(self.name_or_path, folder)
        return self.reference.partition("@")[0]


@dataclass(frozen=True)
class TrainedAdapter:
    """The same weights in two parts, from which a next stage with equal settings goes on."""

    folder: Path
    settings: dict[str, Any]
    base: Start


def first_start(recipe: dict[str, Any], stage: Stage, output_dir: Path) -> Start:
    """Where the first stage starts: the recipe's model, or the student, which is built here."""
    if "student" not in recipe:
        reference = resolve_model(stage.model.model_name_or_path)
        revision = None if stage.model.model_revision == "main" else stage.model.model_revision
        reference = dataclasses.replace(reference, revision=reference.revision or revision)
        return Start(reference.name_or_path, reference.revision, reference.fingerprint(), reference.reference)
    from modeling.student import StudentConfig, build_student

    instruction = recipe.get("instruction")
    prompt = {"prompt": instruction_prompt(instruction)} if instruction else {}
    (config,) = parse_keys([StudentConfig], {**prompt, **recipe["student"]}, "student")
    folder = output_dir / "student"
    inputs = {
        **dataclasses.asdict(config),
        "teacher": resolve_model(config.teacher).fingerprint(),
        "corpus": fingerprint(files_of(Path(config.corpus))),
    }
    with folder_step(folder, inputs) as step:
        if not step.done:
            build_student(config, step.path)
            step.finish()
    return Start(str(folder), None, read_manifest(folder)["key"], "student")


def check_room(stages: Sequence[Stage], start: Start) -> None:
    """Refuse prompts that are too long for any stage now, not after the stages before it."""
    from transformers import AutoTokenizer

    from modeling.encoder import check_prompts, guarantee_eos

    try:
        tokenizer = AutoTokenizer.from_pretrained(start.name_or_path, revision=start.revision)
    except (OSError, ValueError) as error:
        raise InputError(f"model {start.reference!r} has no tokenizer that can be loaded: {error}") from None
    guarantee_eos(tokenizer)
    for stage in stages:
        prompts = baked_prompts(stage.own.instruction)
        check_prompts(tokenizer, prompts, stage.own.max_seq_length, stage.own.min_text_tokens)
        trained = {"query": prompts["query"]} if stage.own.instruction else {}
        check_prompts(tokenizer, trained, stage.own.train_max_seq_length, stage.own.min_text_tokens)


def build_model(stage: Stage, start: Start) -> tuple[SentenceTransformer, Start]:
    """The encoder to train (all weights, a new adapter, or that of the stage before), and what it was loaded from."""
    from transformers import set_seed

    from modeling.encoder import build_encoder, continue_adapter

    adapter = start.adapter if start.adapter and start.adapter.settings == stage.lora_settings else None
    base = adapter.base if adapter else start
    set_seed(stage.training.seed)  # a new adapter starts at random
    encoder = build_encoder(
        base.name_or_path,
        revision=base.revision,
        max_seq_length=stage.own.max_seq_length,
        prompts=baked_prompts(stage.own.instruction),
        pooling=stage.own.pooling,
        dtype=stage.model.dtype,
        attn_implementation=stage.model.attn_implementation,
        peft_config=None if adapter else stage.peft_config,
        min_text_tokens=stage.own.min_text_tokens,
    )
    if adapter:
        continue_adapter(encoder, adapter.folder)
    return encoder, base


def build_loss(stage: Stage, encoder: SentenceTransformer) -> nn.Module:
    from sentence_transformers.sentence_transformer.losses import CoSENTLoss

    from modeling.losses import SoftInfoNCELoss

    own = stage.own
    if own.loss == "cosent":
        return CoSENTLoss(encoder, scale=1 / own.temperature)
    return SoftInfoNCELoss(
        encoder,
        temperature=own.temperature,
        mini_batch_size=own.mini_batch_size,
        target_temperature=own.target_temperature,
        # InfoNCE is the case without soft labels: the same masks and the same code, for a fair comparison
        alpha=own.alpha if own.loss == "soft_info_nce" else 0.0,
    )


def build_evaluator(
    sample: SearchSample | None, encoder: SentenceTransformer, batch_size: int
) -> InformationRetrievalEvaluator | None:
    """nDCG@10 (and MRR@10, recall@10, MAP) of the model as it stands, by sentence-transformers."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    if sample is None:
        return None
    return InformationRetrievalEvaluator(
        sample.queries,
        sample.documents,
        sample.relevant,
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        batch_size=batch_size,
        name="validation",
        write_csv=False,
        score_functions={"cosine": cos_sim},
        query_prompt=encoder.prompts["query"],
        corpus_prompt=encoder.prompts["document"],
    )


def build_trainer(stage: Stage, encoder: SentenceTransformer, data: StageData, checkpoints: Path) -> EmbedderTrainer:
    import torch

    from modeling.trainer import EmbedderTrainer

    arguments = stage.training
    arguments.output_dir = str(checkpoints)
    arguments.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it only warns, at every epoch
    if stage.own.instruction:
        arguments.prompts = dict.fromkeys(stage.own.prompted_columns, instruction_prompt(stage.own.instruction))
    return EmbedderTrainer(
        model=encoder,
        args=arguments,
        train_dataset=data.train,
        loss=build_loss(stage, encoder),
        evaluator=build_evaluator(data.validation, encoder, arguments.per_device_eval_batch_size),
    )


# --- training -------------------------------------------------------------------------------------------------------


def train_stage(stage: Stage, start: Start, data: StageData, output_dir: Path) -> Start:
    """Train one stage, unless it is done already, and return its result as the start of the next one."""
    from modeling.encoder import save_adapter, save_merged
    from modeling.trainer import last_checkpoint

    folder = output_dir / stage.name
    keys = {key: value for key, value in stage.values.items() if key not in NO_INPUTS}
    with folder_step(folder, {"keys": keys, "data": data.key, "start": start.key}) as step:
        if step.done:
            print(f"stage {stage.name}: done before, kept in {folder}", flush=True)
        else:
            checkpoints = step.path / "checkpoints"
            resuming = (stage.training.resume_from_checkpoint or "false").lower() != "false"
            if not resuming:
                shutil.rmtree(checkpoints, ignore_errors=True)
            encoder, base = build_model(stage, start)
            trainer = build_trainer(stage, encoder, data, checkpoints)
            encoder.max_seq_length = stage.own.train_max_seq_length
            trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
            encoder.max_seq_length = stage.own.max_seq_length
            if stage.peft_config:
                save_adapter(encoder, step.path / ADAPTER, base.name_from(step.path / ADAPTER), base.revision)
            save_merged(encoder, step.path)
            write_log(trainer.state.log_history, output_dir / "logs" / f"{stage.name}.json")
            shutil.rmtree(checkpoints, ignore_errors=True)
            cost = trainer.cost()
            step.finish(**cost)
            print(closing_line(stage.name, cost, trainer.state.log_history, folder), flush=True)
    adapter = None
    if stage.peft_config:
        base = start.adapter.base if start.adapter and start.adapter.settings == stage.lora_settings else start
        adapter = TrainedAdapter(folder / ADAPTER, stage.lora_settings, base)
    return Start(str(folder), None, read_manifest(folder)["key"], stage.name, adapter)


def write_log(history: list[dict[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, history)


def closing_line(name: str, cost: dict[str, Any], history: list[dict[str, Any]], folder: Path) -> str:
    """What a stage took and came to, in one line."""
    seconds, tokens = cost["training_seconds"], cost["tokens"]
    parts = [f"{cost['steps']} steps", f"{tokens:,} tokens in {seconds:.0f} s ({tokens / max(seconds, 1e-9):,.0f}/s)"]
    for key, title in (("loss", "loss"), ("eval_validation_cosine_ndcg@10", "validation nDCG@10")):
        found = [entry[key] for entry in history if key in entry]
        if found:
            parts.append(f"{title} {found[0]:.4f} -> {found[-1]:.4f}" if len(found) > 1 else f"{title} {found[0]:.4f}")
    parts.append(f"peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB")
    if cost["peak_device_memory_bytes"]:
        parts.append(f"on {cost['device']} {cost['peak_device_memory_bytes'] / 2**30:.2f} GiB")
    return f"stage {name}: {', '.join(parts)} -> {folder}"


def write_ledger(stages: Sequence[Stage], output_dir: Path) -> None:
    """ledger.json: what every finished stage cost, from their manifests, and the sum."""
    sums = ("seconds", "training_seconds", "device_seconds", "tokens")
    facts = ("steps", *sums, "device", "peak_memory_bytes", "peak_device_memory_bytes")
    rows = []
    for stage in stages:
        if (output_dir / stage.name / MANIFEST).is_file():
            manifest = read_manifest(output_dir / stage.name)
            rows.append({"stage": stage.name, **{name: manifest[name] for name in facts}})
    total = {name: round(sum(row[name] for row in rows), 2) for name in sums}
    write_json(output_dir / "ledger.json", {"stages": rows, "total": total})


def publish(result: Start, output_dir: Path) -> None:
    """model/ and, if the last stage trained LoRA, adapter/: the last stage's two results under fixed names."""
    from modeling.encoder import name_base

    with folder_step(output_dir / "model", {"stage": result.key}) as step:
        if not step.done:
            copy_files(Path(result.name_or_path), step.path, without=(ADAPTER, MANIFEST))
            step.finish()
    adapter = output_dir / ADAPTER
    if result.adapter is None:
        shutil.rmtree(adapter, ignore_errors=True)  # of an earlier run whose last stage trained LoRA
        return
    with folder_step(adapter, {"stage": result.key}) as step:
        if not step.done:
            copy_files(result.adapter.folder, step.path)
            base = result.adapter.base
            name_base(step.path, base.name_from(step.path), base.revision)
            step.finish()


def copy_files(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """Hard links where the file system has them: a 7B model is 14 GB."""

    def link(file: str, copy: str) -> None:
        Path(copy).unlink(missing_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)


if __name__ == "__main__":
    run(main)
