"""What a stage is made of: rows, model, losses, evaluators and the trainer that brings them together."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, get_dataset_config_names
from huggingface_hub.errors import HTTPError
from peft import PeftConfig
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator, NanoBEIREvaluator
from sentence_transformers.sentence_transformer.losses import MatryoshkaLoss
from sentence_transformers.util import cos_sim
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed

from common.cli import InputError
from modeling.adapters import continue_adapter, quantization
from modeling.arguments import memory_bytes
from modeling.demonstrations import Demonstrations
from modeling.encoder import build_encoder
from modeling.losses import CachedCoSENTLoss, GradedLoss
from modeling.processes import launched_with, processes
from modeling.prompts import instruction_prompt
from modeling.recipe import Stage
from modeling.start import Start, column_prompts, saved_prompts
from modeling.tokens import check_prompts
from modeling.trainer import EmbedderTrainer
from modeling.training_data import (
    CutTexts,
    SearchSample,
    count_cut,
    cut_line,
    data_key,
    known_positives,
    load_config,
    search_sample,
    training_rows,
)


@dataclass(frozen=True)
class StageData:
    train: dict[str, Dataset]  # by data set
    validation: dict[str, SearchSample]  # by the name that scores are logged under; empty when the stage has none
    keys: dict[str, str]  # change when the data do
    positives: dict[str, dict[str, list[str]]]  # by data set, all positives of queries that have several


def load_data(stage: Stage) -> StageData:
    """A stage's rows and, if it evaluates while it trains, its validation samples; all checked before training."""
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
    if stage.own.nanobeir and not evaluated:
        raise InputError(f"stage {stage.name!r}: nanobeir is measured at evaluations; set eval_strategy")
    return StageData(train, load_validation(stage, keys) if evaluated else {}, keys, positives)


def load_validation(stage: Stage, keys: Mapping[str, str]) -> dict[str, SearchSample]:
    """A sample of searches of each data set that publishes any, once where several entries read one data set."""
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
    samples |= load_nanobeir(stage)
    if not samples:
        raise InputError(f"stage {stage.name!r}: no data set to evaluate on has qrels; set eval_strategy: 'no'")
    metric = stage.training.metric_for_best_model
    if metric and not any(re.fullmatch(rf"(eval_)?{title}_cosine_\w+@10", metric) for title in samples):
        measured = " or ".join(f"eval_{title}_cosine_ndcg@10" for title in samples)
        raise InputError(
            f"stage {stage.name!r}: metric_for_best_model is {metric!r}; evaluations measure {measured}, or mrr, map, "
            "recall, precision and accuracy instead of ndcg"
        )
    return samples


def load_nanobeir(stage: Stage) -> dict[str, SearchSample]:
    """The sets of key `nanobeir`, whole, as sentence-transformers reads them: NanoMSMARCO, ... -> its searches."""
    if not stage.own.nanobeir:
        return {}
    try:
        sets = NanoBEIREvaluator([*stage.own.nanobeir]).evaluators
    except ValueError as error:  # no such set, or none that the Hub served
        reason = " ".join(str(error.__cause__ or error).split())
        raise InputError(
            f"stage {stage.name!r}: nanobeir {', '.join(stage.own.nanobeir)}: {reason}; it needs the Hub, or its sets "
            "in the cache: leave the key out without them"
        ) from None
    return {
        one.name: SearchSample(
            dict(zip(one.queries_ids, one.queries, strict=True)),
            dict(zip(one.corpus_ids, one.corpus, strict=True)),
            one.relevant_docs,
        )
        for one in sets
    }


def location(stage: Stage, dataset: str) -> str:
    """How messages call a data set of a stage."""
    return f"stage {stage.name!r}" if dataset == stage.name else f"stage {stage.name!r}: data set {dataset!r}"


def stage_prompts(stage: Stage, train: Mapping[str, Dataset], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The prompts of the stage's saved model; with `prompt_shots`, one shows rows of the first data set that trains
    with shots and the stage's own instruction. Raises InputError when there are no rows that fit.
    """
    own = stage.own
    if not own.prompt_shots:
        return saved_prompts(stage)
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
    return saved_prompts(stage, shots)


def demonstrations(stage: Stage, train: Mapping[str, Dataset]) -> dict[str, Demonstrations]:
    """Where batches get their shots from, by data set; those without shots are left out."""
    return {
        name: Demonstrations(
            train[name],
            own.instruction,
            own.shots,
            own.shots_budget,
            own.zero_shot_probability,
            stage.training.seed,
            own.query_template,
        )
        for name, own in stage.datasets.items()
        if own.shots
    }


def load_encoder(
    stage: Stage,
    base: Start,
    quantization_config: BitsAndBytesConfig | None = None,
    peft_config: PeftConfig | None = None,
) -> SentenceTransformer:
    own = stage.own
    return build_encoder(
        base.name_or_path,
        revision=base.revision,
        max_seq_length=own.max_seq_length,
        prompts=saved_prompts(stage),
        pooling=own.pooling,
        dtype=stage.model.dtype,
        attn_implementation=stage.model.attn_implementation,
        quantization_config=quantization_config,
        peft_config=peft_config,
        min_text_tokens=own.min_text_tokens,
        num_hidden_layers=own.num_hidden_layers,
    )


def build_model(stage: Stage, start: Start) -> tuple[SentenceTransformer, Start]:
    """The encoder to train (all weights, a new adapter, or that of the stage before), and what it was loaded from."""
    adapter = start.adapter_for(stage)
    base = adapter.base if adapter else start
    set_seed(stage.training.seed)  # a new adapter starts at random
    encoder = load_encoder(stage, base, quantization(stage.model), None if adapter else stage.peft_config)
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


class SearchEvaluator(InformationRetrievalEvaluator):
    """sentence-transformers', with a bar that says what is embedded where that takes a while."""

    shows_bar = False

    def embed_inputs(self, model: SentenceTransformer, sentences: Sequence[str], **keywords: Any) -> torch.Tensor:
        step, parts = 16 * self.batch_size, []
        bar = {"desc": f"evaluate {self.name}", "unit": " texts", "leave": False, "delay": 2}
        with tqdm(total=len(sentences), disable=not self.shows_bar, **bar) as progress:
            for start in range(0, len(sentences), step):
                parts.append(super().embed_inputs(model, sentences[start : start + step], **keywords))
                progress.update(len(parts[-1]))
        return torch.cat(parts)


def build_evaluator(name: str, sample: SearchSample, encoder: SentenceTransformer, batch_size: int) -> SearchEvaluator:
    """nDCG@10 (and MRR@10, recall@10, MAP) of the model as it stands, by sentence-transformers."""
    return SearchEvaluator(
        sample.queries,
        sample.documents,
        sample.relevant,
        accuracy_at_k=[10],
        precision_recall_at_k=[10],
        batch_size=batch_size,
        name=name,
        write_csv=False,
        score_functions={"cosine": cos_sim},
        query_prompt=encoder.prompts.get("query"),
        corpus_prompt=encoder.prompts.get("document"),
    )


def build_trainer(stage: Stage, encoder: SentenceTransformer, data: StageData, checkpoints: Path) -> EmbedderTrainer:
    arguments = stage.training
    arguments.output_dir = str(checkpoints)
    arguments.run_name = arguments.run_name or stage.name
    arguments.dataloader_pin_memory &= torch.cuda.is_available()  # without a GPU it only warns, at every epoch
    arguments.prompts = {name: column_prompts(stage, name, rows.column_names) for name, rows in data.train.items()}
    batch_size = arguments.per_device_eval_batch_size
    evaluators = [build_evaluator(name, sample, encoder, batch_size) for name, sample in data.validation.items()]
    for evaluator in evaluators:
        evaluator.shows_bar = processes().is_main_process and not arguments.disable_tqdm
    try:
        return EmbedderTrainer(
            model=encoder,
            args=arguments,
            train_dataset=data.train,
            loss={name: build_loss(stage, name, encoder) for name in stage.datasets},
            evaluator=evaluators or None,
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
    return {
        name: count_cut(rows, tokenizer, length, column_prompts(stage, name, rows.column_names))
        for name, rows in data.train.items()
    }


def header(stage: Stage, data: StageData, trainer: EmbedderTrainer, cut: Mapping[str, Mapping[str, CutTexts]]) -> str:
    """What a stage is about to train on, a line for each data set: rows, loss, steps, batch, tokens, cut texts."""
    arguments = trainer.args
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    length = f"{steps} steps" if steps else f"{arguments.num_train_epochs:g} epochs"
    lines = []
    for name, own in stage.datasets.items():
        counts = cut[name].values()
        tokens = batch * sum(count.tokens for count in counts) / max(count.texts for count in counts)
        parts = [f"{len(data.train[name]):,} rows of {own.dataset_name} ({own.dataset_config})", own.loss]
        parts += [f"{length} of {batch} rows, about {tokens:,.0f} tokens each"]
        parts += [cut_line(cut[name], stage.own.train_max_seq_length)]
        title = stage.name if name == stage.name else f"{stage.name}, {name}"
        lines.append(f"training {title}: " + ", ".join(part for part in parts if part))
    return "\n".join(lines)


def check_lengths(stages: Sequence[Stage], data: Mapping[str, StageData], tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse prompts that are too long for any stage now, not after the stages before it."""
    for stage in stages:
        own = stage.own
        prompts = stage_prompts(stage, data[stage.name].train, tokenizer)
        check_prompts(tokenizer, prompts, own.max_seq_length, own.min_text_tokens)
        trained = {
            name: instruction_prompt(arguments.instruction, arguments.query_template)
            for name, arguments in stage.datasets.items()
            if arguments.instruction
        }
        check_prompts(tokenizer, trained, own.train_max_seq_length, own.min_text_tokens)


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
