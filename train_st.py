"""Train an embedder by a recipe: stages in order, each from the weights of the one before.

    python train_st.py --config recipes/demo/train.yaml [--stages sts,retrieval] [--max_steps N]
                       [--resume_from_checkpoint true] [--KEY VALUE ...]
    accelerate launch --num_processes 8 train_st.py --config ...        # the same on many devices

modeling/recipe.py says what a recipe holds; every key of it is a flag, too, and --student.hidden_size 256 a key of its
`student:`. `--stages` selects stages and orders them. `--max_steps` holds for each stage; `--total_steps` is shared
out among those that run, so that any selection of stages costs the same.

Result in output_dir: recipe.yaml (what was run), STAGE/ for each stage (a plain SentenceTransformer folder), model/
(the last one, or what `merge:` makes of them), adapter/ (peft format, when the last stage trained LoRA and nothing is
merged), logs/STAGE.json (the trainer's log history) and ledger.json (what it cost, the data included).

An adapter names the Hub id and revision it was trained from when all LoRA stages up to the last have equal settings:
they then train one adapter. On top of a stage that trained all weights, or other LoRA settings, there is no Hub model
it could belong to: it names that stage's folder, relative to its own (../sts), and model/ is what can be published.

Finished stages are skipped. A killed stage, or one that ran out of memory or disk or into a loss that is no number,
starts again, or, with --resume_from_checkpoint true, goes on from its last checkpoint to the same result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.cli import InputError, run
from common.models import hub_commit, resolve_model
from common.steps import MANIFEST, Step, files_of, fingerprint
from modeling.ledger import closing_line, stage_cost, write_ledger, write_log
from modeling.processes import joint_step, launched_with, processes, refuse_shards
from modeling.prompts import baked_prompts, instruction_prompt
from modeling.recipe import DatasetArguments, MergeArguments, Recipe, Stage, parse_keys, read_recipe, write_recipe

if TYPE_CHECKING:
    from datasets import Dataset
    from peft import PeftConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase
    from trl import ModelConfig

    from modeling.demonstrations import Demonstrations
    from modeling.shared_prefix import TokenCounts
    from modeling.trainer import EmbedderTrainer
    from modeling.training_data import SearchSample

# Keys that decide where a result lies and how it is shown, not what it is: a stage is not trained again for them.
NO_INPUTS = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "save_total_limit")
NO_INPUTS += ("dataset_name", "model_name_or_path", "model_revision")  # fingerprinted by content instead
ADAPTER = "adapter"


class TrainingStopped(Exception):
    """Training cannot go on. Unlike InputError, which leaves nothing behind, it keeps a step's checkpoints."""


def main(argv: Sequence[str]) -> None:
    recipe = read_recipe(argv, description=__doc__)
    stages, output_dir = recipe.stages, recipe.output_dir
    refuse_shards(stages)
    if launched_with("DEEPSPEED"):
        from modeling.trainer import forget_deepspeed

        forget_deepspeed()
    with processes().main_process_first():  # who comes later finds the rows in the cache of `datasets`
        data = {stage.name: load_data(stage) for stage in stages}
    start = first_start(recipe)
    check_room(stages, start, data)
    check_model(stages, start)
    if processes().is_main_process:
        write_recipe(recipe)
    results = {}
    for stage in stages:
        start = results[stage.name] = train_stage(stage, start, data[stage.name], output_dir)
        if processes().is_main_process:
            write_ledger(stages, output_dir)
    if recipe.merge:
        publish_merge(recipe.merge, results, output_dir)
    else:
        publish(start, output_dir)


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageData:
    train: dict[str, Dataset]  # by data set
    validation: dict[str, SearchSample]  # by the name that scores are logged under; empty when the stage has none
    keys: dict[str, str]  # change when the data do
    positives: dict[str, dict[str, list[str]]]  # by data set, all positives of queries that have several


def load_data(stage: Stage) -> StageData:
    """A stage's rows and, if it evaluates while it trains, its validation samples; all checked before training."""
    from modeling.training_data import data_key, known_positives, load_config, training_rows

    train, keys, positives = {}, {}, {}
    for name, own in stage.datasets.items():
        where = location(stage, name)
        keys[name] = data_key(own.dataset_name, own.dataset_revision, where)
        prompted = own.prompted_columns if own.instruction else []
        rows = load_config(own.dataset_name, own.dataset_config, own.dataset_revision, keys[name], where)
        config = f"{where}: config {own.dataset_config!r}"
        train[name] = training_rows(rows, own.loss, prompted, config, own.num_negatives)
        positives[name] = known_positives(train[name], own.dataset_name, own.dataset_revision, keys[name], where)
    evaluated = stage.training.eval_strategy.value != "no"
    return StageData(train, load_validation(stage, keys) if evaluated else {}, keys, positives)


def load_validation(stage: Stage, keys: Mapping[str, str]) -> dict[str, SearchSample]:
    """A sample of searches of each data set that publishes any, once where several entries read one data set."""
    from datasets import get_dataset_config_names

    from modeling.training_data import load_config, search_sample

    own = stage.own
    size = {"max_queries": own.eval_queries, "max_documents": own.eval_documents, "seed": stage.training.seed}
    samples = {}
    for name in {key: name for name, key in keys.items()}.values():
        dataset, where = stage.datasets[name], location(stage, name)
        source = (dataset.dataset_name, dataset.dataset_revision)
        if len(stage.datasets) > 1 and "qrels" not in get_dataset_config_names(source[0], revision=source[1]):
            continue  # graded pairs have nothing to search
        configs = ("queries", "documents", "qrels")
        tables = [load_config(source[0], config, source[1], keys[name], where) for config in configs]
        title = "validation" if len(stage.datasets) == 1 else f"validation_{name}"
        samples[title] = search_sample(*tables, **size, where=where)
    if not samples:
        raise InputError(f"stage {stage.name!r}: no data set to evaluate on has qrels; set eval_strategy: 'no'")
    return samples


def location(stage: Stage, dataset: str) -> str:
    """How messages call a data set of a stage."""
    return f"stage {stage.name!r}" if dataset == stage.name else f"stage {stage.name!r}: data set {dataset!r}"


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


def first_start(recipe: Recipe) -> Start:
    """Where the first stage starts: the recipe's model, or the student, which is built here."""
    if "student" not in recipe.values:
        return published_start(recipe.stages[0].model)
    from modeling.student import StudentConfig, build_student

    instruction = recipe.values.get("instruction")
    prompt = {"prompt": instruction_prompt(instruction)} if instruction else {}
    (config,) = parse_keys([StudentConfig], {**prompt, **recipe.values["student"]}, "student")
    folder = recipe.output_dir / "student"
    inputs = {
        **dataclasses.asdict(config),
        "teacher": resolve_model(config.teacher).fingerprint(),
        "corpus": fingerprint(files_of(Path(config.corpus))),
    }
    with joint_step(folder, inputs) as step:
        if not step.done and processes().is_main_process:
            build_student(config, step.path)
            step.finish()
    return Start(str(folder), None, step.key, "student")


def published_start(model: ModelConfig) -> Start:
    """The recipe's model: of a Hub id the commit that it names now, for all stages and for the adapter to name."""
    reference = resolve_model(model.model_name_or_path)
    revision = None if model.model_revision == "main" else model.model_revision
    if revision and (reference.is_local or reference.revision not in (None, revision)):
        other = "is a folder, which has none" if reference.is_local else "names another"
        raise InputError(
            f"model_revision is {revision!r}, but {reference.reference!r} {other}; --model_revision main drops it"
        )
    if not reference.is_local:
        revision = hub_commit(reference.name_or_path, reference.revision or revision)
        reference = dataclasses.replace(reference, revision=revision)
    return Start(reference.name_or_path, reference.revision, reference.fingerprint(), reference.reference)


def check_room(stages: Sequence[Stage], start: Start, data: Mapping[str, StageData]) -> None:
    """Refuse prompts that are too long for any stage now, not after the stages before it."""
    from huggingface_hub.errors import HTTPError
    from transformers import AutoTokenizer

    from modeling.encoder import check_prompts, guarantee_eos

    try:
        tokenizer = AutoTokenizer.from_pretrained(start.name_or_path, revision=start.revision)
    except (HTTPError, OSError, ValueError) as error:
        raise InputError(f"model {start.reference!r} has no tokenizer that can be loaded: {error}") from None
    guarantee_eos(tokenizer)
    for stage in stages:
        prompts = stage_prompts(stage, data[stage.name].train, tokenizer)
        check_prompts(tokenizer, prompts, stage.own.max_seq_length, stage.own.min_text_tokens)
        instructions = {name: own.instruction for name, own in stage.datasets.items() if own.instruction}
        trained = {name: instruction_prompt(text) for name, text in instructions.items()}
        check_prompts(tokenizer, trained, stage.own.train_max_seq_length, stage.own.min_text_tokens)


def stage_prompts(stage: Stage, train: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The prompts of the stage's saved model; with `prompt_shots`, one shows rows of the first data set that trains
    with shots and the stage's own instruction. Raises InputError when there are no rows that fit.
    """
    own = stage.own
    if not own.prompt_shots:
        return baked_prompts(own.instruction)
    name = next(name for name, data in stage.datasets.items() if data.shots and data.instruction == own.instruction)
    budget = stage.datasets[name].shots_budget or own.max_seq_length // 2
    try:
        shots = demonstrations(stage, train)[name].freeze(
            own.prompt_shots,
            lambda texts: [len(ids) for ids in tokenizer(list(texts), verbose=False)["input_ids"]],
            min(budget, own.max_seq_length - own.min_text_tokens),
        )
    except InputError as error:
        raise InputError(f"{location(stage, name)}: {error}") from None
    return baked_prompts(own.instruction, shots)


def demonstrations(stage: Stage, train: Mapping[str, Dataset]) -> dict[str, Demonstrations]:
    """Where batches get their shots from, by data set; those without shots are left out."""
    from modeling.demonstrations import Demonstrations

    seed = stage.training.seed
    return {
        name: Demonstrations(
            train[name], own.instruction, own.shots, own.shots_budget, own.zero_shot_probability, seed
        )
        for name, own in stage.datasets.items()
        if own.shots
    }


def check_model(stages: Sequence[Stage], start: Start) -> None:
    """Refuse now what no stage could be built of, on a model without weights."""
    import torch
    from huggingface_hub.errors import HTTPError
    from transformers import AutoConfig, AutoModel

    where = f"model {start.reference!r}"
    for stage in stages:
        try:
            config = AutoConfig.from_pretrained(start.name_or_path, revision=start.revision)
            with torch.device("meta"):
                model = AutoModel.from_config(config, attn_implementation=stage.model.attn_implementation)
            modules = [name for name, _ in model.named_modules()]
            parameters = [name for name, _ in model.named_parameters()]
            if stage.peft_config:
                model.add_adapter(stage.peft_config)
        except (HTTPError, OSError, ValueError, TypeError, ImportError) as error:
            raise InputError(f"stage {stage.name!r}: {where} cannot be built: {error}") from None
        if not stage.peft_config:
            continue
        # peft passes over names that it does not find; of modules to save, any ending is one
        kinds = {
            "modules_to_save": ("", modules),
            "target_modules": (".", modules),
            "target_parameters": (".", parameters),
        }
        for key, (before, names) in kinds.items():
            wanted = getattr(stage.peft_config, key) or ()
            if isinstance(wanted, str):  # a pattern, which peft itself looks for
                continue
            for name in sorted(wanted):
                if not any(f".{there}".endswith(before + name) for there in names):
                    raise InputError(f"stage {stage.name!r}: lora_{key}: {where} has no {name!r}")


def build_model(stage: Stage, start: Start) -> tuple[SentenceTransformer, Start]:
    """The encoder to train (all weights, a new adapter, or that of the stage before), and what it was loaded from."""
    from transformers import set_seed

    from modeling.encoder import continue_adapter, quantization

    adapter = start.adapter if start.adapter and start.adapter.settings == stage.lora_settings else None
    base = adapter.base if adapter else start
    set_seed(stage.training.seed)  # a new adapter starts at random
    encoder = load_encoder(stage, base, quantization(stage.model), None if adapter else stage.peft_config)
    if adapter:
        continue_adapter(encoder, adapter.folder)
    return encoder, base


def load_encoder(
    stage: Stage,
    base: Start,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
) -> SentenceTransformer:
    from modeling.encoder import build_encoder

    return build_encoder(
        base.name_or_path,
        revision=base.revision,
        max_seq_length=stage.own.max_seq_length,
        prompts=baked_prompts(stage.own.instruction),
        pooling=stage.own.pooling,
        dtype=stage.model.dtype,
        attn_implementation=stage.model.attn_implementation,
        quantization_config=quantization_config,
        peft_config=peft_config,
        min_text_tokens=stage.own.min_text_tokens,
    )


def build_loss(own: DatasetArguments, encoder: SentenceTransformer) -> nn.Module:
    from modeling.losses import CachedCoSENTLoss, GradedLoss

    everywhere = {"mini_batch_size": own.mini_batch_size, "gather_across_devices": processes().num_processes > 1}
    if own.loss == "cosent":
        return CachedCoSENTLoss(encoder, scale=1 / own.temperature, **everywhere)
    return GradedLoss(
        encoder,
        own.loss,
        temperature=own.temperature,
        target_temperature=own.target_temperature,
        alpha=own.alpha,
        in_batch_negatives=own.in_batch_negatives,
        false_negative_margin=own.false_negative_margin,
        **everywhere,
    )


def build_evaluator(
    name: str, sample: SearchSample, encoder: SentenceTransformer, batch_size: int
) -> InformationRetrievalEvaluator:
    """nDCG@10 (and MRR@10, recall@10, MAP) of the model as it stands, by sentence-transformers."""
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
    from sentence_transformers.util import cos_sim

    return InformationRetrievalEvaluator(
        sample.queries,
        sample.documents,
        sample.relevant,
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        batch_size=batch_size,
        name=name,
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
    arguments.prompts = {
        name: dict.fromkeys(own.prompted_columns, instruction_prompt(own.instruction)) if own.instruction else {}
        for name, own in stage.datasets.items()
    }
    batch_size = arguments.per_device_eval_batch_size
    return EmbedderTrainer(
        model=encoder,
        args=arguments,
        train_dataset=data.train,
        loss={name: build_loss(own, encoder) for name, own in stage.datasets.items()},
        evaluator=[build_evaluator(name, sample, encoder, batch_size) for name, sample in data.validation.items()]
        or None,
        weights={name: own.weight for name, own in stage.datasets.items()},
        demonstrations=demonstrations(stage, data.train),
        positives=data.positives,
    )


# --- training -------------------------------------------------------------------------------------------------------


def train_stage(stage: Stage, start: Start, data: StageData, output_dir: Path) -> Start:
    """Train one stage, unless it is done already, and return its result as the start of the next one."""
    folder = output_dir / stage.name
    keys = {key: value for key, value in stage.values.items() if key not in NO_INPUTS}
    if stage.values.get("datasets"):
        entries = stage.values["datasets"]
        keys["datasets"] = [{key: value for key, value in entry.items() if key not in NO_INPUTS} for entry in entries]
    try:
        with joint_step(folder, {"keys": keys, "data": data.keys, "start": start.key}) as step:
            if step.done and processes().is_main_process:
                print(f"stage {stage.name}: done before, kept in {folder}", flush=True)
            elif not step.done:
                run_stage(stage, start, data, step, output_dir)
    except TrainingStopped as reason:
        raise InputError(f"stage {stage.name!r}: {reason}") from reason
    adapter = None
    if stage.peft_config:
        base = start.adapter.base if start.adapter and start.adapter.settings == stage.lora_settings else start
        adapter = TrainedAdapter(folder / ADAPTER, stage.lora_settings, base)
    return Start(str(folder), None, step.key, stage.name, adapter)


def run_stage(stage: Stage, start: Start, data: StageData, step: Step, output_dir: Path) -> None:
    """Load, train, save. Raises TrainingStopped when it cannot go on; what it has is resumed from then."""
    from modeling.encoder import continue_adapter, quantization, save_adapter, save_merged
    from modeling.trainer import drop_checkpoints, last_checkpoint
    from modeling.verify import write_reference

    checkpoints = step.path / "checkpoints"
    resuming = (stage.training.resume_from_checkpoint or "false").lower() != "false"
    if processes().is_main_process and not resuming:
        drop_checkpoints(checkpoints)
    processes().wait_for_everyone()
    encoder, base = build_model(stage, start)
    trainer = build_trainer(stage, encoder, data, checkpoints)
    encoder.max_seq_length = stage.own.train_max_seq_length
    with sharing(stage, encoder) as counts, stopping(stage, checkpoints):
        trainer.train(resume_from_checkpoint=last_checkpoint(checkpoints))
    encoder.max_seq_length = stage.own.max_seq_length
    cost = stage_cost(trainer, counts)
    weights = trainer.whole_weights()
    if not processes().is_main_process:
        return
    if weights is not None:  # those of `encoder` are shards
        encoder, base = build_model(stage, start)
        encoder.load_state_dict({**encoder.state_dict(), **weights})
    encoder.prompts = prompts = stage_prompts(stage, data.train, encoder.tokenizer)
    if stage.peft_config:
        save_adapter(encoder, step.path / ADAPTER, base.name_from(step.path / ADAPTER), base.revision)
    if quantization(stage.model):  # 4 bits were for training: the adapter belongs into the weights as they were
        encoder = load_encoder(stage, base)
        encoder.prompts = prompts
        continue_adapter(encoder, step.path / ADAPTER)
    save_merged(encoder, step.path)
    write_reference(encoder, step.path)
    write_log(trainer.state.log_history, output_dir / "logs" / f"{stage.name}.json")
    drop_checkpoints(checkpoints)
    step.finish(**cost)
    print(closing_line(stage.name, cost, trainer.state.log_history, step.folder), flush=True)


def sharing(stage: Stage, encoder: SentenceTransformer) -> contextlib.AbstractContextManager[TokenCounts | None]:
    """Prompts shared within a batch are computed once, if the stage asks for it."""
    if not stage.own.share_prefix:
        return contextlib.nullcontext()
    from modeling.shared_prefix import share_prefix

    return share_prefix(encoder)


@contextlib.contextmanager
def stopping(stage: Stage, checkpoints: Path) -> Iterator[None]:
    """What ends training as one line: what happened and what to lower. Raises TrainingStopped where there is a
    checkpoint to go on from, else InputError.
    """
    from accelerate.utils.memory import should_reduce_batch_size

    from modeling.trainer import last_checkpoint

    try:
        yield
        return
    except InputError as error:  # a loss that is no number, too few rows for a batch
        reason, cause = str(error), error
    except RuntimeError as error:
        if not should_reduce_batch_size(error):
            raise
        reason, cause = f"out of memory; lower {sizes(stage)}", error
    checkpoint = last_checkpoint(checkpoints)
    if checkpoint is None:
        raise InputError(f"stage {stage.name!r}: {reason}") from cause
    raise TrainingStopped(f"{reason}; --resume_from_checkpoint true goes on from {checkpoint}") from cause


def sizes(stage: Stage) -> str:
    """What a stage's memory depends on, with its values, first what changes no result."""
    rows = f"per_device_train_batch_size ({stage.training.per_device_train_batch_size})"
    cached = dict.fromkeys(own.mini_batch_size for own in stage.datasets.values())
    now = ", ".join("null, which is all" if size is None else str(size) for size in cached)
    return f"mini_batch_size ({now}), which changes no result, or {rows}"


def publish(result: Start, output_dir: Path) -> None:
    """model/ and, if the last stage trained LoRA, adapter/: the last stage's two results under fixed names."""
    from modeling.encoder import name_base

    with joint_step(output_dir / "model", {"stage": result.key}) as step:
        if not step.done and processes().is_main_process:
            copy_files(Path(result.name_or_path), step.path, without=(ADAPTER, MANIFEST))
            step.finish()
    if result.adapter is None:
        drop_adapter(output_dir)
        return
    with joint_step(output_dir / ADAPTER, {"stage": result.key}) as step:
        if not step.done and processes().is_main_process:
            copy_files(result.adapter.folder, step.path)
            base = result.adapter.base
            name_base(step.path, base.name_from(step.path), base.revision)
            step.finish()


def publish_merge(merge: MergeArguments, results: Mapping[str, Start], output_dir: Path) -> None:
    """model/: the average of stages. There is no adapter/, which would be that of one stage."""
    from modeling.merging import merge_models

    chosen = [results[name] for name in merge.stages]
    inputs = {"stages": [result.key for result in chosen], "method": merge.method, "weights": merge.weights}
    with joint_step(output_dir / "model", inputs) as step:
        if not step.done and processes().is_main_process:
            merge_models([Path(result.name_or_path) for result in chosen], merge.weights, merge.method, step.path)
            step.finish()
    drop_adapter(output_dir)


def drop_adapter(output_dir: Path) -> None:
    """Of an earlier run into the same folder, whose model/ it belonged to."""
    if processes().is_main_process:
        shutil.rmtree(output_dir / ADAPTER, ignore_errors=True)


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
