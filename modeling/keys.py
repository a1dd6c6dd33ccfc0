"""The keys of a training recipe, declared once: name, type, range, default and meaning.

Ours are fields of the classes below; the comment beside a field is what --list_keys and docs/keys.md say. Those of
trl, transformers and sentence-transformers are read from their source, with what we ask of them besides.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, create_model, model_validator

from common.recipes import Section, key_line, key_lines, list_keys

DEFAULT_LENGTH = 512  # tokens, of a start that names none: E5-mistral's
LARGEST = 2**32  # numbers are below
OF_THE_RECIPE = ("model_name_or_path", "model_revision", "num_hidden_layers", "output_dir")  # not a stage's
# Of a stage, where a result lies and how it is shown, not what it is: it is not trained again for them.
NO_INPUTS = ("output_dir", "resume_from_checkpoint", "disable_tqdm", "report_to", "save_total_limit")
NO_INPUTS += ("activation_memory",)  # gradients are the same
NO_INPUTS += ("dataset_name", "model_name_or_path", "model_revision")  # fingerprinted by content instead

Amount = Annotated[int, Field(ge=0, lt=LARGEST)]
Count = Annotated[int, Field(ge=1, lt=LARGEST)]
_one_or_more = BeforeValidator(lambda value: [value] if isinstance(value, str | int) else value)  # a flag of one value
Texts = Annotated[tuple[str, ...], _one_or_more]
_UNITS = {"MiB": 2**20, "GiB": 2**30}


def memory_bytes(size: str) -> int | None:
    """
    >>> memory_bytes("1.5GiB"), memory_bytes("0"), memory_bytes("auto")
    (1610612736, 0, None)
    """
    return None if size == "auto" else int(float(size[:-3] or 0) * _UNITS.get(size[-3:], 0))


def _memory(size: Any) -> str:
    if not re.fullmatch(rf"auto|0|\d+(\.\d+)?({'|'.join(_UNITS)})", str(size)):
        raise ValueError("write auto, 0, or a number and its unit, such as 8GiB or 500MiB")
    return str(size)


Memory = Annotated[str, BeforeValidator(_memory)]


LOSSES = ("cosent", "soft_info_nce", "info_nce", "weighted_soft_info_nce", "bixse", "kl", "margin_mse", "ranknet")
LOSSES += ("pairdistill", "lambda_loss")


class DatasetArguments(Section):
    """A data set, the prompts of its texts, and the objective it is trained by."""

    dataset_name: str | None = None  # Hub id, or folder with a README.md that has `configs:` (DIR/hub)
    dataset_config: str = "train"  # `train`: query, positive, negative_1 ..., label
    dataset_revision: str | None = None  # of the Hub id
    weight: float = Field(1.0, gt=0)  # share of its stage's batches, relative to the others'
    loss: Literal[LOSSES] = "soft_info_nce"  # cosent for graded pairs, or an objective of modeling/objectives.py
    temperature: float = Field(0.02, gt=0)  # divides cosines
    target_temperature: float = Field(1.0, gt=0)  # divides the logits of soft labels
    alpha: float = Field(1.0, ge=0, le=1)  # weight of the objective against 1 - alpha of InfoNCE
    in_batch_negatives: bool = True  # false where rows share labels: classification, clustering
    # in-batch documents whose cosine exceeds that of the positive by more are left out; null = none
    false_negative_margin: float | None = Field(None, ge=0)
    mini_batch_size: Count | None = None  # texts embedded at a time, by GradCache; null = all, without it
    num_negatives: Amount | None = None  # the first of each row's; null = all
    instruction: str | None = None  # task in one sentence; null = the start's query prompt
    query_template: str | None = None  # holds {task}; null = the start's, else 'Instruct: {task}\nQuery: '
    document_prompt: str | None = None  # before columns without instruction; null = the start's, else none
    prompted_columns: Texts = ("query",)  # get the instruction
    shots: Amount = 0  # the most demonstrations that a batch's prompt shows
    shots_budget: Count | None = None  # the most tokens of such a prompt; null = any
    zero_shot_probability: float = Field(0.0, ge=0, le=1)  # of a batch without demonstrations


class StageArguments(DatasetArguments):
    """What a stage trains on (or what the entries of its `datasets:` have in common), and what it makes."""

    # tokens the model reads, prompt and EOS included; null = the start's, else 512
    max_seq_length: Count | None = None
    train_max_seq_length: Count | None = None  # in training; null = max_seq_length
    min_text_tokens: Amount = 16  # least room that a prompt must leave
    # of the tokens' states; null = that of a finished embedder, eos of a bare decoder
    pooling: Literal["eos", "mean", "cls", "mean_without_prompt", "weighted_mean"] | None = None
    num_hidden_layers: Count | None = None  # keep the first so many; null = all
    # train vectors cut to these lengths, too (arXiv 2205.13147); name the whole length among them
    matryoshka_dims: Annotated[tuple[Count, ...], _one_or_more] = ()
    prompt_shots: Amount = 0  # demonstrations in a prompt that the saved model carries
    share_prefix: bool = False  # compute a prompt that a batch shares once, and no padding
    # where mini_batch_size keeps graphs, so as not to embed their texts twice: 8GiB, 0, or auto, half of what is free
    # when a step begins; of weights in shards none
    activation_memory: Memory = "auto"
    eval_queries: Count = 200  # sample of the validation queries, at each evaluation
    eval_documents: Count = 2000  # sample they search, with all their relevant ones
    # sets of NanoBEIR (50 queries each, from the Hub) measured beside the validation queries: msmarco, nq, ...
    nanobeir: Annotated[tuple[str, ...], _one_or_more] = ()
    # evaluations without a better score, after which a stage ends with its best checkpoint; null = never
    early_stopping_patience: Count | None = None


class StudentConfig(Section):
    """A small model built on the spot, as modeling/student.py describes it."""

    teacher: str  # model reference: its tokenizer and word embeddings
    corpus: str  # a data folder's corpus/, whose texts give the word frequencies
    prompt: str = ""  # before queries when words are counted: what all carry weighs next to nothing
    hidden_size: int = Field(512, ge=128, lt=LARGEST, multiple_of=128)  # a multiple of 128, which is a head
    intermediate_size: Count = 768  # of the MLPs
    num_hidden_layers: int = Field(2, ge=2, lt=LARGEST)  # 2 or more: the first counts, the last averages
    max_position_embeddings: Count = 4096  # tokens
    # constant a of the weight a / (a + p(word)); larger ones tell common words apart less
    sif: float = Field(1e-3, gt=0)
    seed: Amount = 0  # of the weights


class MergeArguments(Section):
    """Which weights are averaged into model/, and how (see modeling.merging)."""

    stages: tuple[str, ...]  # two or more: stages that run, folders of models (another seed's, the untrained one)
    method: Literal["linear", "slerp"] = "linear"  # mean, or the arc between two
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()  # one each; none = equal ones

    @model_validator(mode="after")
    def _fit(self) -> MergeArguments:
        if len(set(self.stages)) < max(2, len(self.stages)):
            raise ValueError("name two or more, each once")
        if self.weights and (len(self.weights) != len(self.stages) or not any(self.weights)):
            raise ValueError(f"weights {list(self.weights)}: one each is needed, not all 0")
        if self.method == "slerp" and len(self.stages) != 2:
            raise ValueError("slerp lies on the arc between two models; name two, or method: linear")
        return self


class RecipeArguments(Section):
    """What belongs to the whole recipe."""

    student: StudentConfig | None = None  # start from a small model built on the spot, not from model_name_or_path
    merge: MergeArguments | None = None  # publish an average of weights as model/, not the last stage
    # optimizer steps, shared out equally among the stages that run; max_steps, by contrast, holds for each stage
    total_steps: Count | None = None


# --- keys of the libraries ------------------------------------------------------------------------------------------

# Defaults that are ours and not the libraries'.
DEFAULTS = {
    "lora_task_type": "FEATURE_EXTRACTION",  # trl's CAUSAL_LM adapter would not load on a model without LM head
    "save_total_limit": 1,  # resuming needs the last checkpoint alone, and a 7B one is 14 GB
    "logging_steps": 10,
}
_BATCHES = "has no effect: batches are made by modeling/batches.py; leave it out"
_PUBLISH = "is not for training: leave it out, and run push_to_hub.py afterwards"
_HUB = ("hub_model_id", "hub_token", "hub_strategy", "hub_private_repo", "hub_always_push", "hub_revision")
# Keys that have no place in a recipe, and why.
REFUSED = {
    "prompts": "are made of `instruction` and `prompted_columns`; use these",
    **dict.fromkeys(("batch_sampler", "multi_dataset_batch_sampler", "train_sampling_strategy"), _BATCHES),
    "router_mapping": "has no effect on a model of one tower; leave it out",
    "neftune_noise_alpha": "needs embeddings where a SentenceTransformer has none; leave it out",
    "use_liger_kernel": "has no effect on a SentenceTransformer; leave it out",
    "label_smoothing_factor": "has no effect: soft labels take its place; leave it out",
    "auto_find_batch_size": "has no effect on the batches made here; lower mini_batch_size, which changes no result",
    "save_only_model": "leaves nothing for a killed stage to go on from; leave it out",
    **dict.fromkeys(("push_to_hub", *_HUB), _PUBLISH),
}


def _refuse(values: dict[str, Any]) -> dict[str, Any]:
    for key, why in REFUSED.items():
        if values.get(key):
            raise ValueError(f"{key} {why}")  # and not its value, which may be a token
    return values


def _finite(value: Any) -> Any:
    json.dumps(value, allow_nan=False, default=str)  # raises ValueError for a NaN, however deep
    return value


def _steps(value: int) -> int:
    if value == 0:
        raise ValueError("it must be 1 or more, or -1 where epochs say how long")
    return value


def _resumed(value: Any) -> Any:
    if str(value).lower() not in ("true", "false"):
        raise ValueError("true goes on from a stage's last checkpoint")
    return value


Positive = Annotated[float, Field(gt=0, lt=LARGEST)]
NotNegative = Annotated[float, Field(ge=0, lt=LARGEST)]
# What we ask besides of what the libraries read.
RANGES = {
    "num_train_epochs adam_epsilon logging_steps eval_steps save_steps lora_alpha": Positive,
    "learning_rate weight_decay max_grad_norm warmup_steps eval_delay": NotNegative,
    "seed data_seed dataloader_num_workers": Amount,
    "lora_r per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps": Count,
    "save_total_limit eval_accumulation_steps ddp_timeout ddp_bucket_cap_mb": Count,
    "warmup_ratio": Annotated[float, Field(ge=0, le=1)],
    "adam_beta1 adam_beta2 lora_dropout": Annotated[float, Field(ge=0, lt=1)],
    "max_steps": Annotated[int, Field(ge=-1, lt=LARGEST), AfterValidator(_steps)],
    "learning_rate_mapping": dict[re.Pattern, NotNegative],
    "lora_task_type": Literal["FEATURE_EXTRACTION"],  # an embedder has no head
    "resume_from_checkpoint": Annotated[Any, AfterValidator(_resumed)],
}
# class that defines keys -> its file in an installed package
_LIBRARIES = {
    "ModelConfig": "trl/trainer/model_config.py",
    "TrainingArguments": "transformers/training_args.py",
    "BaseTrainingArguments": "sentence_transformers/base/training_args.py",
    "SentenceTransformerTrainingArguments": "sentence_transformers/sentence_transformer/training_args.py",
}


@functools.cache
def stage_keys() -> type[StageArguments]:
    """All keys of a stage, ours and the libraries'. Those are read from their source, each with the first sentence of
    its own help: importing them takes longer than a typo should.
    """
    kinds = {name: kind | None for names, kind in RANGES.items() for name in names.split()}
    keys = {}
    for kind, file in _LIBRARIES.items():
        package, _, path = file.partition("/")
        tree = ast.parse((Path(importlib.util.find_spec(package).origin).parent / path).read_text(encoding="utf-8"))
        [body] = [node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind]
        for node in body:
            if isinstance(node, ast.AnnAssign):
                name, (default, meaning) = node.target.id, _library_key(node)
                field = Field(DEFAULTS.get(name, default), description=meaning)
                keys[name] = kinds.get(name, Annotated[Any, AfterValidator(_finite)]), field
    refuse = {"refuse": model_validator(mode="before")(_refuse)}
    return create_model("StageKeys", __base__=StageArguments, __validators__=refuse, **keys)


def _library_key(node: ast.AnnAssign) -> tuple[Any, str]:
    """Default and meaning of a key out of `name: type = field(default=..., metadata={"help": ...})`."""
    words = {word.arg: word.value for word in node.value.keywords}
    default = words.get("default", words.get("default_factory"))
    try:
        value = ast.literal_eval(default)
    except ValueError:  # a name: of a constant, or of the type whose empty value it is
        value = {"list": [], "dict": {}}.get(ast.unparse(default), "see the library")
    found = words["metadata"]
    [text] = [text for key, text in zip(found.keys, found.values, strict=True) if ast.literal_eval(key) == "help"]
    return value, " ".join(ast.literal_eval(text).split()).partition(". ")[0].removesuffix(".")


# --- all of them, for people ----------------------------------------------------------------------------------------


def recipe_keys() -> Iterator[str]:
    """Lines of Markdown: every key with its default and meaning, by where it may stand."""
    own, of_data = key_lines(StageArguments), DatasetArguments.model_fields
    fields = {name: field for name, field in stage_keys().model_fields.items() if name not in REFUSED}
    libraries = {name: key_line(name, field.default, field.description) for name, field in fields.items()}
    lines = libraries | own
    places = {
        "Above the stages": OF_THE_RECIPE,
        "Recipe, stage or entry of `datasets`": of_data,
        "Recipe or stage": [name for name in own if name not in (*of_data, *OF_THE_RECIPE)],
        "Recipe or stage: trl's, transformers' and sentence-transformers' own": [
            name for name in libraries if name not in (*own, *OF_THE_RECIPE)
        ],
    }
    yield from list_keys(RecipeArguments, "Above the stages, beside `stages`, a list of mappings with a `name`")
    for title, names in places.items():
        yield from (f"### {title}", "", *(lines[name] for name in names), "")
