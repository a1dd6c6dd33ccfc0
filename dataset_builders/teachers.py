"""Teachers: a model's raw scores for pairs of a query and a text.

    scorer = PairScorer(teacher, cache, engine, queries, texts)     # also for pairs of queries: symmetric=True
    scorer.scores(pairs, folder)                                    # (n, 2) positions -> (n,) float32

Pairs are graded shard by shard, so memory does not grow with their number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import ValidationInfo, field_validator

from common.cli import InputError
from common.models import expand_user
from common.recipes import Section
from common.steps import read_arrow, write_arrow
from dataset_builders.columns import TextColumn
from dataset_builders.embeddings import (
    Embedder,
    EncoderSection,
    Texts,
    Vectors,
    load_model,
    longest_first,
    token_batches,
)
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.near_duplicates import normalised, stable_hash
from dataset_builders.schema import check_finite

if TYPE_CHECKING:
    import torch
    from sentence_transformers import CrossEncoder

SHARD_PAIRS = 8192  # pairs in a shard: what a killed process loses at most; sorted by length, they hardly need padding
FOLD = "{fold}"  # in a model's name: a model for each fold of the queries, trained without it
TOKENISED = 256  # pairs tokenised together
PAIRS = pa.schema([("query", pa.int32()), ("document", pa.int32())])  # positions
# Of a pair: the score, its tokens, those computed for it (padding included; 0: from vectors), and whether a
# cross-encoder's limit cut it, or left no token of its document.
GRADE = np.dtype([("score", "f4"), ("tokens", "i4"), ("computed", "i4"), ("is_cut", "i2"), ("has_no_document", "i2")])


class Teacher(EncoderSection):
    """A cross-encoder reads query and document together; a bi-encoder compares their vectors.

    Cross-encoders are classification heads, whose logit is the score, and LLM rerankers, whose score is what their
    CrossEncoder folder states: logit(yes) - logit(no) after a chat template, as a rule.
    """

    kind: Literal["cross_encoder", "bi_encoder"]  # reads both texts together, or compares their vectors
    prompt: str | None = None  # a cross-encoder's instruction; without one, that saved with the model is used

    def describe(self) -> dict[str, Any]:
        if FOLD not in self.model:
            return super().describe()
        return {"folds": [member.describe() for member in self.members], "model": self.model}

    @property
    def members(self) -> tuple[Teacher, ...]:
        """The teacher alone; or, where its model's name holds FOLD, the models that were each trained without a fold.

        Raises InputError where these are less than two folders (train_teacher.py makes them).
        """
        if FOLD not in self.model:
            return (self,)
        names = takewhile(lambda name: expand_user(name).is_dir(), (self.model.replace(FOLD, str(n)) for n in count()))
        members = tuple(self.model_copy(update={"model": name}) for name in names)
        if len(members) < 2:
            raise InputError(
                f"teacher {self.model!r}: {len(members)} such folders; a cross-fitted teacher has 2 or more"
            )
        return members

    @field_validator("kind")
    @classmethod
    def _without_a_bi_encoders_prompts(cls, kind: str, info: ValidationInfo) -> str:
        if kind == "bi_encoder" and FOLD in info.data.get("model", ""):
            raise ValueError(f"{FOLD} stands in the name of a cross_encoder")
        if kind == "cross_encoder" and (info.data.get("query_prompt") or info.data.get("document_prompt")):
            raise ValueError("query_prompt and document_prompt are a bi_encoder's; a cross_encoder has one `prompt`")
        return kind

    @field_validator("prompt")
    @classmethod
    def _of_a_cross_encoder(cls, prompt: str | None, info: ValidationInfo) -> str | None:
        if prompt is not None and info.data.get("kind") == "bi_encoder":
            raise ValueError("a bi_encoder has a query_prompt and a document_prompt instead")
        return prompt


class Hybrid(Section):
    """A cross-fitted logistic regression on what retrieval knows, and on further teachers' scores (hybrid.py)."""

    kind: Literal["hybrid"]
    teachers: tuple[Teacher, ...] = ()  # a hybrid's: models whose scores join what retrieval knows

    def describe(self) -> dict[str, Any]:
        return {"kind": "hybrid", "teachers": [teacher.describe() for teacher in self.teachers]}


class Given(Section):
    """No model: the scores that the source has (docs/your-data.md); what it gives none for is not graded."""

    kind: Literal["given"]

    def describe(self) -> dict[str, Any]:
        return {"kind": "given"}


class Retriever(Section):
    """No model: one ranking's own scores, a baseline for teachers. A document that it did not return has 0."""

    kind: Literal["retriever"]
    by: Literal["bm25", "rrf", "convex"]  # whose scores; the dense model's are those of a bi_encoder

    def describe(self) -> dict[str, Any]:
        return {"kind": "retriever", "by": self.by}


def teacher_name(teacher: Teacher | Hybrid | Given | Retriever) -> str:
    return teacher.model if isinstance(teacher, Teacher) else teacher.kind


def as_teacher(section: EncoderSection) -> Teacher:
    """A dense model as a bi-encoder: its vectors are computed once."""
    return Teacher(kind="bi_encoder", **section.model_dump(include=set(EncoderSection.model_fields)))


@dataclass(frozen=True)
class PairScorer:
    """The teacher's raw scores for pairs of a query and a text (a document, or for STS another query)."""

    teacher: Teacher
    cache: Path
    engine: Engine
    queries: Texts
    texts: Texts
    symmetric: bool = False  # the texts are queries too

    @cached_property
    def vectors(self) -> tuple[Vectors, Vectors]:
        """A bi-encoder's, of the queries and of the texts."""
        embedder = Embedder(self.teacher, self.cache, self.engine)
        texts = embedder.queries(self.texts) if self.symmetric else embedder.documents(self.texts)
        return embedder.queries(self.queries), texts

    def scores(self, pairs: np.ndarray, folder: Path) -> np.ndarray:
        """(n,) float32 scores of (n, 2) positions in queries and texts; finished shards stay in `folder`."""
        batch = pa.record_batch([*np.asarray(pairs, np.int32).T], schema=PAIRS)
        write_arrow(folder / "pairs.arrow", [batch], PAIRS)
        grades = self.grade(folder / "pairs.arrow", folder / "teacher.shards")
        (folder / "pairs.arrow").unlink()
        return np.concatenate([grade["score"] for grade in grades])

    def grade(self, pairs: Path, folder: Path) -> Shards:
        """GRADE arrays, SHARD_PAIRS pairs each, of an Arrow file with the columns of PAIRS."""
        if self.teacher.kind == "bi_encoder":
            work = _Comparison(pairs, self.teacher, *self.vectors)
        else:
            kind = _Reading if len(self.teacher.members) == 1 else _CrossFitted
            work = kind(pairs, self.teacher, self.queries, self.texts)
        total = len(read_arrow(pairs))
        sizes = [min(SHARD_PAIRS, total - start) for start in range(0, total, SHARD_PAIRS)]
        return compute_shards(work, sizes, folder, self.engine, description="teacher", unit="pairs")


@dataclass(frozen=True)
class _Shard:
    """Shard i: the grades of the i-th SHARD_PAIRS pairs in an Arrow file, from both sides' vectors or texts."""

    pairs: Path
    teacher: Teacher
    queries: Vectors | Texts
    texts: Vectors | Texts

    def __call__(self, number: int) -> np.ndarray:
        table = read_arrow(self.pairs, PAIRS.names).slice(number * SHARD_PAIRS, SHARD_PAIRS)
        grades = self._grade(table["query"].to_numpy(), table["document"].to_numpy())
        check_finite(grades["score"], f"scores of teacher {self.teacher.model}")
        return grades


@dataclass(frozen=True)
class _Comparison(_Shard):
    """Dot products of stored vectors. Their float16 moves a cosine by less than 1e-3, as a rule by some 1e-5."""

    def _grade(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        grades = np.zeros(len(queries), GRADE)
        grades["score"] = np.einsum("ij,ij->i", self.queries[queries], self.texts[texts])
        return grades


@dataclass(frozen=True)
class _Reading(_Shard):
    """A cross-encoder's logits, in batches of pairs of like length.

    Logits, since a sigmoid over them, which many rerankers are saved with, would crowd the best pairs near 1.
    """

    def _grade(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        import torch

        model = self._model
        tokenised, grades = [], np.zeros(len(queries), GRADE)
        for start in range(0, len(queries), TOKENISED):
            part = slice(start, start + TOKENISED)
            sides = take_texts(self.queries, queries[part]), take_texts(self.texts, texts[part])
            pairs = list(zip(*sides, strict=True))
            rows = self._tokenise(pairs)
            tokenised += rows
            self._note_cuts(grades[part], pairs, rows)
        grades["tokens"] = lengths = np.array([len(row["input_ids"]) for row in tokenised])
        order = longest_first(lengths)
        for batch in token_batches(lengths[order], self.teacher.batch_tokens):
            rows = order[batch]
            with torch.inference_mode():
                scores = model(_padded([tokenised[row] for row in rows], model))["scores"]
            grades["score"][rows] = scores[:, 0].float().cpu().numpy()
            grades["computed"][rows] = lengths[rows].max()
        return grades

    def _tokenise(self, pairs: list[tuple[str, str]]) -> list[dict[str, Any]]:
        model = self._model
        prompt = model.prompts.get(model.default_prompt_name) if self.teacher.prompt is None else self.teacher.prompt
        return _unpadded(model.preprocess(pairs, prompt=prompt))

    def _note_cuts(self, grades: np.ndarray, pairs: list[tuple[str, str]], rows: list[dict[str, Any]]) -> None:
        """Set is_cut and has_no_document of pairs, tokenised as `rows`."""
        model, limit = self._model, self._model.max_seq_length
        full = [row for row, tokens in enumerate(rows) if limit and len(tokens["input_ids"]) >= limit]
        if not full:
            return
        model.max_seq_length = 10**9
        whole = [len(tokens["input_ids"]) for tokens in self._tokenise([pairs[row] for row in full])]
        model.max_seq_length = limit
        cut = [row for row, length in zip(full, whole, strict=True) if length > limit]
        alone = self._tokenise([(pairs[row][0], "") for row in cut]) if cut else []
        grades["is_cut"][cut] = 1
        # the query without a document comes to the same tokens
        grades["has_no_document"][cut] = [
            rows[row]["input_ids"].tolist() == query["input_ids"].tolist()
            for row, query in zip(cut, alone, strict=True)
        ]

    @cached_property
    def _model(self) -> CrossEncoder:
        return load_reranker(self.teacher).eval()


@dataclass(frozen=True)
class _CrossFitted(_Shard):
    """Each query's pairs as the member reads them that was trained without its fold."""

    def _grade(self, queries: np.ndarray, texts: np.ndarray) -> np.ndarray:
        grades = np.empty(len(queries), GRADE)
        folds = np.array([fold_of(query, len(self._readings)) for query in take_texts(self.queries, queries)])
        for fold in np.unique(folds):
            here = folds == fold
            grades[here] = self._readings[fold]._grade(queries[here], texts[here])
        return grades

    @cached_property
    def _readings(self) -> list[_Reading]:
        return [_Reading(self.pairs, member, self.queries, self.texts) for member in self.teacher.members]


def fold_of(query: str, folds: int) -> int:
    """The fold of a query, decided by its text alone, case and white space aside."""
    return stable_hash("teacher", normalised(query)) % folds


def load_reranker(teacher: Teacher) -> CrossEncoder:
    """The cross-encoder of `teacher`. Raises InputError when it does not give one score for a query and a document."""
    from sentence_transformers import CrossEncoder

    model = load_model(CrossEncoder, teacher, max_length=teacher.max_seq_length)
    if model.num_labels != 1:
        raise InputError(f"teacher {teacher.model!r}: {model.num_labels} scores a pair; a reranker gives one")
    try:
        model.preprocess([("query", "document")], prompt=teacher.prompt)
    except ValueError as error:  # a causal model whose chat template knows nothing of queries and documents
        raise InputError(f"teacher {teacher.model!r}: {str(error).splitlines()[0]}") from None
    return model


def _unpadded(features: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs of a tokenised batch, one by one: each its tokens alone, and what holds for the whole batch."""
    import torch

    mask = features["attention_mask"].bool()
    by_token = {key: value for key, value in features.items() if torch.is_tensor(value) and value.shape == mask.shape}
    common = {key: value for key, value in features.items() if key not in by_token}
    return [{**{key: value[row][mask[row]] for key, value in by_token.items()}, **common} for row in range(len(mask))]


def _padded(rows: Sequence[dict[str, Any]], model: CrossEncoder) -> dict[str, torch.Tensor]:
    """A batch of `_unpadded` pairs, as the model's own tokenizer would pad it, on the model's device."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    tokenizer, batch = model.tokenizer, dict(rows[0])
    for key, value in rows[0].items():
        if torch.is_tensor(value) and value.shape == rows[0]["input_ids"].shape:
            padding = tokenizer.pad_token_id if key == "input_ids" else 0
            columns = [row[key] for row in rows]
            padded = pad_sequence(columns, True, padding_value=padding, padding_side=tokenizer.padding_side)
            batch[key] = padded.to(model.device)
    return batch


def take_texts(texts: Texts, rows: np.ndarray) -> list[str]:
    return texts[rows] if isinstance(texts, TextColumn) else [texts[row] for row in rows]
