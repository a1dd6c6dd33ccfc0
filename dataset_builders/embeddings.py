"""Texts -> vectors on disk: computed in shards that survive a kill, and kept under a key of all that decides them.

The key holds the model's weights, tokenizer and revision, prompt, length, dtypes and the texts themselves, so a stale
vector is never served and two steps that need the same vectors share them. Beside each vector stands whether its text
was cut to the model's length.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import pyarrow as pa
from pydantic import Field

from common.cli import InputError
from common.models import check_model_folder, fetch_settings, positions_in, resolve_model, without_bars
from common.plain_text import check_words, use_plain_text
from common.recipes import Section
from common.steps import fingerprint
from dataset_builders.columns import TextColumn
from dataset_builders.engines import LOCAL, Engine, Shards, compute_shards
from dataset_builders.schema import check_finite

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer
    from tokenizers import Tokenizer

SHARD = 1024  # texts in a shard: what a killed process loses at most
KNOWN = 1 << 18  # distinct words whose tokens are kept for the next shard
MAX_SHARDS = 1024  # beyond that many texts, longer shards rather than more files
Texts: TypeAlias = Sequence[str] | TextColumn
Dtype: TypeAlias = Literal["float32", "bfloat16", "float16"]


class ModelSection(Section):
    """A model as a recipe names it."""

    model: str  # Hub id, folder, GGUF file or package:NAME
    max_seq_length: int | None = Field(None, ge=8)  # tokens; null: the model's own
    batch_tokens: int = Field(1024, ge=8)  # padded tokens in a batch: about 1,000 on a CPU, tens of thousands on a GPU
    dtype: Dtype = "float32"  # of the weights

    def describe(self) -> dict[str, Any]:
        """What decides the section's results. The batches are left out: they move them by rounding only.

        Raises InputError for a model that is not there, or has fewer positions than max_seq_length.
        """
        keys = self.model_dump(mode="json", exclude={"batch_tokens"})
        model = resolve_model(self.model)
        if model.is_local:
            check_model_folder(Path(model.name_or_path))
        description = {**keys, "model": model.fingerprint()}
        positions = count_positions(model.name_or_path, model.revision) if self.max_seq_length else None
        if positions and self.max_seq_length > positions:
            raise InputError(f"max_seq_length {self.max_seq_length}: {self.model} goes to {positions}; lower it")
        return description


class EncoderSection(ModelSection):
    """A SentenceTransformer. Without prompts of the recipe's own, those saved with the model are used."""

    query_prompt: str | None = None  # before queries; null: that saved with the model
    document_prompt: str | None = None  # before documents; null: that saved with the model
    # how vectors are kept: half the disk for an error of about 1e-4 in a cosine
    vector_dtype: Literal["float16", "float32"] = "float16"


class Vectors:
    """(texts, dimensions) vectors in shards on disk; a slice or an array of row numbers gives them as float32."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def __len__(self) -> int:
        return int(self._shards.starts[-1])

    @property
    def shape(self) -> tuple[int, int]:
        return len(self), self._shards[0]["vector"].shape[1]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, slice):
            rows = np.arange(*rows.indices(len(self)))
        starts = self._shards.starts
        numbers = np.searchsorted(starts, rows, side="right") - 1
        found = np.empty((len(rows), self.shape[1]), np.float32)
        for number in np.unique(numbers):
            here = np.flatnonzero(numbers == number)
            found[here] = as_type(self._shards[number]["vector"][rows[here] - starts[number]], "float32")
        return found

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or np.float32, copy=False)

    def is_cut(self, rows: np.ndarray) -> np.ndarray:
        """(rows,) bool: whether a text was longer than the model reads."""
        return np.concatenate([shard["is_cut"] for shard in self._shards])[rows] > 0

    @cached_property
    def count_cut(self) -> int:
        """How many of the texts were longer than the model reads."""
        return sum(int(shard["is_cut"].sum()) for shard in self._shards)

    def all_equal(self) -> bool:
        """Whether no text can be told from another, up to float16."""
        first = self._shards[0]["vector"][0].astype(np.float32)
        return all(np.allclose(shard["vector"].astype(np.float32), first, atol=2e-3) for shard in self._shards)


def as_type(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """What `vectors.astype(dtype)` is; torch has instructions for float16 where numpy counts bits."""
    import torch

    return torch.from_numpy(vectors).to(getattr(torch, dtype)).numpy()


def vector_shard(vectors: np.ndarray, is_cut: np.ndarray) -> np.ndarray:
    """What `Vectors` reads: (texts,) pairs of a vector and a flag, which is as wide as a number of the vector."""
    fields = [("vector", vectors.dtype, vectors.shape[1:]), ("is_cut", f"i{vectors.dtype.itemsize}")]
    shard = np.empty(len(vectors), fields)
    shard["vector"], shard["is_cut"] = vectors, is_cut
    return shard


def warn_of_cut_texts(documents: Vectors, section: EncoderSection) -> list[str]:
    """Print, and return, one line where most documents are cut, or none can be told from another after it."""
    cut, count = documents.count_cut, len(documents)
    are_equal = cut and documents.all_equal()
    if 2 * cut <= count and not are_equal:
        return []
    equal = ", and then all documents are equal" if are_equal else ""
    length = f"{section.max_seq_length} tokens" if section.max_seq_length else "the model's length"
    warning = f"{cut:,} of {count:,} documents are cut to {length}{equal}; raise max_seq_length, or split them"
    print(f"warning: {section.model}: {warning}", file=sys.stderr, flush=True)
    return [warning]


@dataclass(frozen=True)
class Embedder:
    """Vectors of an encoder, cached in folders below `cache`. The model is loaded when a text is not yet there."""

    section: EncoderSection
    cache: Path
    engine: Engine = LOCAL

    def queries(self, texts: Texts) -> Vectors:
        return self._vectors(texts, "query", self.section.query_prompt)

    def documents(self, texts: Texts) -> Vectors:
        return self._vectors(texts, "document", self.section.document_prompt)

    def _vectors(self, texts: Texts, side: str, prompt: str | None) -> Vectors:
        """Unit length, unless the model itself compares by dot product."""
        keys = {name: self._description[name] for name in ("model", "max_seq_length", "dtype", "vector_dtype")}
        # `reads`: plain text, and shards that say which texts were cut
        inputs = {**keys, "side": side, "prompt": prompt, "texts": _digest(texts), "reads": "plain text"}
        work = _Encoding(self.section, keys["model"], side, prompt, texts)
        return Vectors(
            compute_shards(
                work,
                [len(rows) for rows in work.rows],
                self.cache / fingerprint(inputs),
                self.engine,
                description=f"embed {side} texts",
                unit="texts",
            )
        )

    @cached_property
    def _description(self) -> dict[str, Any]:
        return self.section.describe()


@dataclass(frozen=True)
class _Encoding:
    """Shard i: the vectors of the texts in rows[i]."""

    section: EncoderSection
    fingerprint: str  # of the model
    side: str
    prompt: str | None
    texts: Texts

    @cached_property
    def rows(self) -> list[range]:
        """Some hundred shards at most, of at least SHARD texts."""
        size = SHARD * max(math.ceil(len(self.texts) / (SHARD * MAX_SHARDS)), 1)
        return [range(start, min(start + size, len(self.texts))) for start in range(0, len(self.texts), size)]

    def __call__(self, number: int) -> np.ndarray:
        rows = self.rows[number]
        texts = self.texts[rows.start : rows.stop]
        model = _encoder(self.section, self.fingerprint)
        encode = model.encode_query if self.side == "query" else model.encode_document
        if is_static(model):
            is_cut, order, batches = np.zeros(len(texts), bool), np.arange(len(texts)), [np.arange(len(texts))]
        else:
            saved_prompt = "" if self.prompt is not None else model.prompts.get(self.side, "")
            lengths = count_tokens(model.tokenizer, [(self.prompt or saved_prompt) + text for text in texts])
            limit = model.max_seq_length or np.inf
            is_cut, lengths = lengths > limit, np.minimum(lengths, limit).astype(np.int64)
            order = longest_first(lengths)
            batches = token_batches(lengths[order], self.section.batch_tokens)
        found = [
            encode(
                [texts[row] for row in order[batch]],
                prompt=self.prompt,
                batch_size=len(batch),
                show_progress_bar=False,
                normalize_embeddings=model.similarity_fn_name != "dot",
            )
            for batch in batches
        ]
        vectors = as_type(np.concatenate(found), self.section.vector_dtype)
        check_finite(vectors, f"embeddings of {self.section.model}")
        return vector_shard(vectors[np.argsort(order)], is_cut)


@lru_cache(maxsize=1)  # queries and documents are embedded one after the other
def _encoder(section: EncoderSection, fingerprint: str) -> SentenceTransformer:
    """The model of `section`; `fingerprint` tells apart what the same name held at different times."""
    from sentence_transformers import SentenceTransformer

    model = load_model(SentenceTransformer, section)
    if section.max_seq_length:
        try:
            model.max_seq_length = section.max_seq_length
        except AttributeError:  # static embeddings read every word, however many there are
            raise InputError(f"model {section.model!r} has no maximal length; leave max_seq_length out") from None
    if is_static(model) and ends_at_spaces(model.tokenizer):
        model[0].preprocess = _Words(model.tokenizer).preprocess
    elif is_static(model):  # offsets, which it does not read, take a third of the time
        model[0].tokenizer = SimpleNamespace(encode_batch=model.tokenizer.encode_batch_fast)
    return model


def ends_at_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a space ends a token, whatever stands beside it, so that a text's ids are those of its words."""
    from tokenizers import normalizers, pre_tokenizers

    kinds = pre_tokenizers.BertPreTokenizer, pre_tokenizers.Whitespace, pre_tokenizers.WhitespaceSplit
    return (
        isinstance(tokenizer.pre_tokenizer, kinds)
        and isinstance(tokenizer.normalizer, normalizers.BertNormalizer | normalizers.Lowercase | None)
        and tokenizer.truncation is None
        and not any(" " in token.content for token in tokenizer.get_added_tokens_decoder().values())
    )


class _Words:
    """What a static model reads of texts, with each distinct word tokenised once: most of what such a model costs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def preprocess(self, inputs: Sequence[str], prompt: str | None = None, **_: Any) -> dict[str, torch.Tensor]:
        """As sentence-transformers' StaticEmbedding.preprocess: ids of all texts, and where each text begins."""
        import pyarrow.compute as pc
        import torch

        lists = pc.split_pattern(pa.array([(prompt or "") + text for text in inputs], pa.large_string()), " ")
        words = lists.flatten().dictionary_encode()
        ids = self._ids_of(words.dictionary.to_pylist())
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        numbers = words.indices.to_numpy()
        counts = lengths[numbers]  # of tokens, word by word
        ends = np.concatenate([[0], np.cumsum(counts)])
        # token t of the word that begins at ends[i] is token starts[numbers[i]] + t of all distinct words'
        starts = np.cumsum(lengths) - lengths
        places = np.arange(ends[-1]) + np.repeat(starts[numbers] - ends[:-1], counts)
        distinct = np.fromiter(chain.from_iterable(ids), np.int64, lengths.sum())
        begins = ends[lists.offsets.to_numpy()[:-1]]
        return {"input_ids": torch.from_numpy(distinct[places]), "offsets": torch.from_numpy(begins)}

    def _ids_of(self, words: list[str]) -> list[list[int]]:
        if len(self._known) > KNOWN:
            self._known.clear()
        new = [word for word in words if word not in self._known]
        found = self._tokenizer.encode_batch_fast(new, add_special_tokens=False)
        self._known.update((word, encoding.ids) for word, encoding in zip(new, found, strict=True))
        return [self._known[word] for word in words]


def is_static(model: SentenceTransformer) -> bool:
    """Whether it averages vectors of words: it pads nothing and cuts nothing."""
    return hasattr(model.tokenizer, "encode_batch")


def _digest(texts: Texts) -> str:
    digest = hashlib.sha256()
    for start in range(0, len(texts), SHARD):
        for text in texts[start : start + SHARD]:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\x00")
    return digest.hexdigest()


def load_model(kind: Callable[..., Any], section: ModelSection, **keywords: Any) -> Any:
    """What `kind` makes of a model: an encoder, which reads plain text (see common/plain_text.py), or another kind.

    Raises InputError when its files cannot be had or read.
    """
    from huggingface_hub.errors import HTTPError
    from safetensors import SafetensorError
    from sentence_transformers import CrossEncoder, SentenceTransformer

    reference = resolve_model(section.model)
    path = reference.name_or_path
    if reference.is_local:
        check_model_folder(Path(path))
    try:
        revision = fetch_settings(reference)
        with without_bars():
            model = kind(path, revision=revision, model_kwargs={"dtype": section.dtype}, **keywords)
        if kind is SentenceTransformer:
            use_plain_text(model, path, revision)
        elif kind is CrossEncoder:
            check_words(model.tokenizer, section.model)
        else:
            return model  # a language model, whose chat template is looked at
        positions = None if section.max_seq_length else count_positions(path, revision)
        if positions and (model.max_seq_length or 0) > positions:  # as its files may say
            model.max_seq_length = positions
        return model
    except (HTTPError, OSError, ValueError, RuntimeError, SafetensorError) as error:  # RuntimeError: other shapes
        raise InputError(f"model {section.model!r} cannot be loaded: {str(error).splitlines()[0]}") from None


def count_positions(name_or_path: str, revision: str | None) -> int | None:
    """The longest text that a model has positions for; None where it names no limit, or has no transformer."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name_or_path, revision=revision).get_text_config()
    except (OSError, ValueError, KeyError):  # static embeddings have no such file
        return None
    return positions_in(config)


def count_tokens(tokenizer: Any, texts: Sequence[str]) -> np.ndarray:
    """Tokens of each text, special ones included, before any truncation."""
    lengths: list[int] = []
    for start in range(0, len(texts), SHARD):
        block = list(texts[start : start + SHARD])
        if hasattr(tokenizer, "encode_batch"):  # static embedding models hold a bare tokenizers.Tokenizer
            lengths += [len(encoding) for encoding in tokenizer.encode_batch(block)]
        else:
            lengths += map(len, tokenizer(block, truncation=False, verbose=False)["input_ids"])
    return np.array(lengths, np.int64)


def longest_first(lengths: np.ndarray) -> np.ndarray:
    """Row numbers by falling length: what would run out of memory does so at once, and batches hardly need padding."""
    return np.argsort(-lengths, kind="stable")


def token_batches(lengths: np.ndarray, batch_tokens: int) -> Iterator[np.ndarray]:
    """Consecutive positions of `lengths`, as many as fit `batch_tokens` once padded to their longest; at least one.

    >>> [batch.tolist() for batch in token_batches(np.array([9, 8, 3, 3, 3]), 18)]
    [[0, 1], [2, 3, 4]]
    """
    start, longest = 0, 0
    for stop, length in enumerate(lengths):
        longest = max(longest, int(length))
        if stop > start and longest * (stop + 1 - start) > batch_tokens:
            yield np.arange(start, stop)
            start, longest = stop, int(length)
    yield np.arange(start, len(lengths))
