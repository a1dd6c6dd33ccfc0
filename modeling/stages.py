"""What a stage is made of: rows, model, losses, evaluators and the trainer that brings them together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from huggingface_hub.errors import HTTPError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedTokenizerBase, set_seed

from common.cli import InputError, at
from modeling.adapters import continue_adapter, quantization
from modeling.batches import EpochBatchSampler, steps_by_weight
from modeling.demonstrations import Demonstrations, counter
from modeling.encoder import build_encoder
from modeling.keys import StageArguments, memory_bytes
from modeling.losses import CachedCoSENTLoss, GradedLoss
from modeling.processes import launched_with, processes
from modeling.recipe import Stage
from modeling.start import Start, column_prompts, saved_prompts
from modeling.tokens import check_prompts
from modeling.trainer import EmbedderTrainer
from modeling.training_data import CutTexts, Source, count_cut, cut_line, known_positives, training_rows
from modeling.validation import SearchEvaluator, load_validation


@dataclass(frozen=True)
class StageData:
    train: dict[str, Dataset]  # by data set
    validation: list[SearchEvaluator]  # named as their scores are logged; empty without evaluations
    keys: dict[str, str]  # by data set, change when the data do
    positives: dict[str, dict[str, list[str]]]  # by data set, all positives of queries that have several


def load_data(stage: Stage) -> StageData:
    """A stage's rows and, if it evaluates while it trains, its validation searches; all checked before training."""
    sources = {name: Source(own.dataset_name, own.dataset_revision) for name, own in stage.datasets.items()}
    train, keys, positives = {}, {}, {}
    for name, own in stage.datasets.items():
        with at(stage.place(name)):
            source, keys[name] = sources[name], sources[name].key
            rows = source.read(own.dataset_config)
            with at(f"config {own.dataset_config!r}"):
                prompted = own.prompted_columns if own.instruction else []
                train[name] = training_rows(rows, own.loss, prompted, own.num_negatives)
            positives[name] = known_positives(train[name], source, own.dataset_config)
    evaluated = stage.training.eval_strategy.value != "no"
    if stage.own.nanobeir and not evaluated:
        raise InputError(f"stage {stage.name!r}: nanobeir is measured at evaluations; set eval_strategy")
    if stage.training.eval_on_start and not evaluated:
        raise InputError(f"stage {stage.name!r}: eval_strategy is 'no'; set eval_on_start to false, too")
    return StageData(train, load_validation(stage, sources) if evaluated else [], keys, positives)


def with_prompts(stage: Stage, train: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> Stage:
    """The settled stage with the prompts of its saved model; with `prompt_shots`, one shows rows of the first data set
    that trains with shots and the stage's own instruction. Raises InputError for rows or prompts that do not fit.
    """
    own, shots, shown = stage.own, [], demonstrations(stage, train)
    if own.prompt_shots:
        name = next(
            name for name, data in stage.datasets.items() if data.shots and data.instruction == own.instruction
        )
        budget = stage.datasets[name].shots_budget or own.max_seq_length // 2
        budget = min(budget, own.max_seq_length - own.min_text_tokens)
        with at(stage.place(name)):
            shots = shown[name].freeze(own.prompt_shots, counter(tokenizer), budget)
    prompts = saved_prompts(stage, shots)
    columns = {name: column_prompts(stage, name, rows.column_names) for name, rows in train.items()}
    trained = {
        f"{name}.{column}": prompt for name, by_column in columns.items() for column, prompt in by_column.items()
    }
    for name in shown:
        room = shots_room(stage, name)
        if not shown[name].share_that_fits(counter(tokenizer), room):
            with at(stage.place(name)):
                raise InputError(
                    f"shots: no row fits into a prompt of {room} tokens as a demonstration; raise shots_budget or "
                    "train_max_seq_length, or drop shots"
                )
    check_prompts(tokenizer, prompts, own.max_seq_length, own.min_text_tokens)
    check_prompts(tokenizer, trained, own.train_max_seq_length, own.min_text_tokens, train_length_key(own))
    return dataclasses.replace(stage, prompts=prompts, column_prompts=columns)


def train_length_key(own: StageArguments) -> str:
    """The key that sets the length of training texts: where both are equal, the one that the other follows."""
    return "train_max_seq_length" if own.train_max_seq_length < own.max_seq_length else "max_seq_length"


def demonstrations(stage: Stage, train: Mapping[str, Dataset]) -> dict[str, Demonstrations]:
    """Where batches get their shots from, by data set; those without shots are left out. Raises InputError for rows
    that make none.
    """
    found = {}
    for name, own in stage.datasets.items():
        settings = own.instruction, own.shots, own.shots_budget, own.zero_shot_probability
        with at(stage.place(name)):
            if own.shots:
                found[name] = Demonstrations(train[name], *settings, stage.training.seed, own.query_template)
    return found


def shots_room(stage: Stage, name: str) -> int:
    """The most tokens of a batch's prompt with shots, where its texts are short."""
    room = stage.own.train_max_seq_length - stage.own.min_text_tokens
    return min(stage.datasets[name].shots_budget or room, room)


def load_encoder(stage: Stage, base: Start, **loading: Any) -> SentenceTransformer:
    """`base` with the stage's settings and prompts; `loading` is build_encoder's own."""
    own = stage.own
    encoder = build_encoder(
        base.name_or_path,
        revision=base.revision,
        max_seq_length=own.max_seq_length,
        prompts=stage.prompts,
        pooling=own.pooling,
        dtype=stage.model.dtype,
        attn_implementation=stage.model.attn_implementation,
        min_text_tokens=own.min_text_tokens,
        num_hidden_layers=own.num_hidden_layers,
        **loading,
    )
    encoder.prompts = dict(stage.prompts)  # and none of the stage before
    return encoder


def build_model(stage: Stage, start: Start) -> tuple[SentenceTransformer, Start]:
    """The encoder to train (all weights, a new adapter, or that of the stage before), and what it was loaded from."""
    adapter = start.adapter_for(stage)
    base = adapter.base if adapter else start
    set_seed(stage.training.seed)  # a new adapter starts at random
    peft_config = None if adapter else stage.peft_config
    encoder = load_encoder(stage, base, quantization_config=quantization(stage.model), peft_config=peft_config)
    if adapter:
        continue_adapter(encoder, adapter.folder)
    return encoder, base


def build_loss(stage: Stage, dataset: str, encoder: SentenceTransformer) -> nn.Module:
    own, dims, parallel = stage.datasets[dataset], stage.own.matryoshka_dims, processes().num_processes > 1
    size = own.mini_batch_size
    if dims and parallel and size is None:
        # without GradCache MatryoshkaLoss asks the model, then DDP's wrapper, for its dimensions as soon as labels are
        # lists, as ours are: AttributeError (sentence-transformers 6.2)
        size = stage.training.per_device_train_batch_size
    sharded = launched_with("FSDP") or launched_with("DEEPSPEED")  # kept graphs would hold gathered weights
    memory = 0 if sharded else memory_bytes(stage.own.activation_memory)
    everywhere = {"mini_batch_size": size, "activation_memory": memory, "gather_across_devices": parallel}
    if own.loss == "cosent":
        loss = CachedCoSENTLoss(encoder, scale=1 / own.temperature, **everywhere)
    else:
        settings = ("temperature", "target_temperature", "alpha", "in_batch_negatives", "false_negative_margin")
        loss = GradedLoss(encoder, own.loss, **{name: getattr(own, name) for name in settings}, **everywhere)
    return MatryoshkaLoss(encoder, loss, dims) if dims else loss


def build_trainer(stage: Stage, encoder: SentenceTransformer, data: StageData, checkpoints: Path) -> EmbedderTrainer:
    arguments = stage.training
    arguments.output_dir = str(checkpoints)
    arguments.run_name = arguments.run_name or stage.name
    arguments.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it only warns, at every epoch
    arguments.prompts = stage.column_prompts
    try:
        return EmbedderTrainer(
            model=encoder,
            args=arguments,
            train_dataset=data.train,
            loss={name: build_loss(stage, name, encoder) for name in stage.datasets},
            evaluator=data.validation or None,
            weights={name: own.weight for name, own in stage.datasets.items()},
            demonstrations=demonstrations(stage, data.train),
            positives=data.positives,
            patience=stage.own.early_stopping_patience,
        )
    except (ValueError, ImportError) as error:  # settings that contradict each other, packages that are not there
        raise InputError(f"stage {stage.name!r}: training cannot start so: {error}") from None


def cut_texts(stage: Stage, data: StageData, tokenizer: PreTrainedTokenizerBase) -> dict[str, dict[str, CutTexts]]:
    """By data set and column, how many texts are longer than what is read of them in training."""
    length = stage.own.train_max_seq_length
    prompts = stage.column_prompts
    return {name: count_cut(rows, tokenizer, length, prompts[name]) for name, rows in data.train.items()}


def header(stage: Stage, data: StageData, trainer: EmbedderTrainer, cut: Mapping[str, Mapping[str, CutTexts]]) -> str:
    """What a stage is about to train on, a line for each data set: rows, loss, steps, batch, tokens, cut texts."""
    arguments = trainer.args
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = f"{steps} steps" if steps else f"{arguments.num_train_epochs:g} epochs"
    batches, lines = count_batches(stage, data.train), []
    of_an_epoch = sum(count for _, count in batches.values()) / arguments.gradient_accumulation_steps
    epochs = steps / of_an_epoch if steps else arguments.num_train_epochs
    for name, own in stage.datasets.items():
        counts = cut[name].values()
        tokens = batch * sum(count.tokens for count in counts) / max(count.texts for count in counts)
        parts = [f"{len(data.train[name]):,} rows of {own.dataset_name} ({own.dataset_config})", own.loss]
        parts += [f"{length} of {batch} rows, about {tokens:,.0f} tokens each"]
        if len(batches) > 1:  # weights make an epoch more or less than a pass
            of_a_pass, count = batches[name]
            parts += [f"{epochs * count / of_a_pass:.2g} passes over its rows"]
        parts += [cut_line(cut[name], stage.own.train_max_seq_length, train_length_key(stage.own))]
        if shown := trainer.data_collator.demonstrations.get(name):
            room = shots_room(stage, name)
            share = shown.share_that_fits(counter(trainer.data_collator.model.tokenizer), room)
            parts += [f"{share:.0%} of the rows fit into a prompt of {room} tokens as a demonstration"]
        title = stage.name if name == stage.name else f"{stage.name}, {name}"
        lines.append(f"training {title}: " + ", ".join(part for part in parts if part))
    return "\n".join(lines)


def count_batches(stage: Stage, train: Mapping[str, Dataset]) -> dict[str, tuple[int, int]]:
    """By data set, the batches of a pass over its rows, and those that it has in an epoch of the stage (see
    `WeightedBatchSampler`). Refuses rows too few for a step, and weights too small for one.
    """
    training, passes = stage.training, {}
    for name, rows in train.items():
        with at(stage.place(name)):
            size, last = training.train_batch_size, training.dataloader_drop_last
            passes[name] = EpochBatchSampler(rows, size, last, world_size=processes().num_processes).steps
    with at(f"stage {stage.name!r}"):
        weights = {name: own.weight for name, own in stage.datasets.items()}
        epochs = steps_by_weight(weights, sum(passes[name] for name in weights))
    return {name: (passes[name], steps) for name, steps in zip(weights, epochs, strict=True)}


def check_layers(stages: Sequence[Stage], start: Start) -> None:
    """Refuse now what no stage could be built of, on a model without weights."""
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
        reentrant = (stage.training.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if reentrant and stage.training.gradient_checkpointing and getattr(config, "num_kv_shared_layers", 0):
            # silently: findings/reentrant_checkpointing_loses_gradients_of_shared_keys.sh
            lost = f"{where} shares keys between layers, whose gradients reentrant checkpointing loses"
            raise InputError(f"stage {stage.name!r}: use_reentrant: {lost}; leave it out")
        if not stage.peft_config:
            continue
        # peft passes over names that it does not find; of modules to save, any ending is one
        there_are = {"modules_to_save": modules, "target_modules": modules, "target_parameters": parameters}
        for key, names in there_are.items():
            before = "" if key == "modules_to_save" else "."
            wanted = getattr(stage.peft_config, key) or ()
            if isinstance(wanted, str):  # a pattern, which peft itself looks for
                continue
            for name in sorted(wanted):
                if not any(f".{there}".endswith(before + name) for there in names):
                    raise InputError(f"stage {stage.name!r}: lora_{key}: {where} has no {name!r}")
