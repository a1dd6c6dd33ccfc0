"""The keys of training recipes that are ours: the comment beside a field is what --list_keys and docs/keys.md say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from common.recipes import Section, key_line, key_lines, list_keys
from modeling.keys import LARGEST, REFUSED, library_keys

DEFAULT_LENGTH = 512  # tokens, of a start that names none: E5-mistral's
OF_THE_RECIPE = ("model_name_or_path", "model_revision", "num_hidden_layers", "output_dir")  # not a stage's

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


class DatasetArguments(Section):
    """A data set, the prompts of its texts, and the objective it is trained by."""

    dataset_name: str | None = None  # Hub id, or folder with a README.md that has `configs:` (DIR/hub)
    dataset_config: str = "train"  # `train`: query, positive, negative_1 ..., label
    dataset_revision: str | None = None  # of the Hub id
    weight: float = Field(1.0, gt=0)  # share of its stage's batches, relative to the others'
    # cosent for graded pairs, or an objective of modeling/objectives.py: soft_info_nce, info_nce, kl, margin_mse,
    # weighted_soft_info_nce, bixse, ranknet, pairdistill, lambda_loss
    loss: str = "soft_info_nce"
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
    hidden_size: int = Field(512, ge=128, lt=LARGEST, multiple_of=128)  # 128 a head
    intermediate_size: Count = 768  # of the MLPs
    num_hidden_layers: int = Field(2, ge=2, lt=LARGEST)  # 2 or more: the first counts, the last averages
    max_position_embeddings: Count = 4096  # tokens
    # constant a of the weight a / (a + p(word)); larger ones tell common words apart less
    sif: float = Field(1e-3, gt=0)
    seed: Amount = 0  # of the weights


class MergeArguments(Section):
    """Which stages' weights are averaged into model/, and how (see modeling.merging)."""

    stages: tuple[str, ...]  # two or more that run
    method: Literal["linear", "slerp"] = "linear"  # mean, or the arc between two
    weights: tuple[Annotated[float, Field(ge=0)], ...] = ()  # one a stage; none = equal ones

    @model_validator(mode="after")
    def _fit(self) -> MergeArguments:
        if len(set(self.stages)) < max(2, len(self.stages)):
            raise ValueError("name two stages or more, each once")
        if self.weights and (len(self.weights) != len(self.stages) or not any(self.weights)):
            raise ValueError(f"weights {list(self.weights)}: one a stage is needed, not all 0")
        if self.method == "slerp" and len(self.stages) != 2:
            raise ValueError("slerp lies on the arc between two models; name two stages, or method: linear")
        return self


class RecipeArguments(Section):
    """What belongs to the whole recipe."""

    student: StudentConfig | None = None  # start from a small model built on the spot, not from model_name_or_path
    merge: MergeArguments | None = None  # publish an average of stages as model/, not the last one
    # optimizer steps, shared out equally among the stages that run; max_steps, by contrast, holds for each stage
    total_steps: Count | None = None


def recipe_keys() -> Iterator[str]:
    """Lines of Markdown: every key with its default and meaning, by where it may stand."""
    libraries = {name: key for name, key in library_keys().items() if name not in REFUSED}
    own, of_data = key_lines(StageArguments), DatasetArguments.model_fields
    lines = own | {name: key_line(name, key.default, key.meaning) for name, key in libraries.items()}
    places = {
        "Above the stages": OF_THE_RECIPE,
        "Recipe, stage or entry of `datasets`": of_data,
        "Recipe or stage": [name for name in own if name not in (*of_data, *OF_THE_RECIPE)],
        "Recipe or stage: trl's, transformers' and sentence-transformers' own": [
            name for name in libraries if name not in OF_THE_RECIPE
        ],
    }
    yield from list_keys(RecipeArguments, "Above the stages, beside `stages`, a list of mappings with a `name`")
    for title, names in places.items():
        yield from (f"### {title}", "", *(lines[name] for name in names), "")
