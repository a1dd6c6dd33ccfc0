"""Texts -> vectors on disk: computed in shards that survive a kill, and kept under a key of all that decides them.

The key (contract 4) holds the model's weights, tokenizer and revision, prompt, length, dtype and the texts
themselves, so a stale vector is never served and two steps that need the same vectors share them.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field
from tqdm import tqdm

from dataset_builders.cli import InputError
from dataset_builders.folders import fingerprint, folder_step
from dataset_builders.recipes import Section
from dataset_builders.references import ModelReference, resolve_model
from dataset_builders.schema import check_finite

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

SHARD = 1024  # texts, pairs or queries that a killed process loses at most


class ModelSection(Section):
    """A model as a recipe names it."""

    model: str
    max_seq_length: int | None = Field(None, ge=8)  # tokens; null: the model's own
    batch_tokens: int = Field(1024, ge=8)  # padded tokens in a batch: about 1,000 on a CPU, tens of thousands on a GPU
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def describe(self) -> dict[str, Any]:
        """What decides the section's results. The batches are left out: they move them by rounding only."""
        keys = self.model_dump(mode="json", exclude={"batch_tokens"})
        return {**keys, "model": resolve_model(self.model).fingerprint()}


class EncoderSection(ModelSection):
    """A SentenceTransformer. Without prompts of the recipe's own, those saved with the model are used."""

    query_prompt: str | None = None
    document_prompt: str | None = None


@dataclass(frozen=True)
class Embedder:
    """Vectors of an encoder, cached in folders below `cache`. The model is loaded when a text is not yet there."""

    section: EncoderSection
    cache: Path

    def queries(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(texts, "query", self.section.query_prompt)

    def documents(self, texts: Sequence[str]) -> np.ndarray:
        return self._vectors(texts, "document", self.section.document_prompt)

    def _vectors(self, texts: Sequence[str], side: str, prompt: str | None) -> np.ndarray:
        """(texts, dimensions), memory-mapped. Unit length, unless the model itself compares by dot product."""
        digest = hashlib.sha256()
        for text in texts:
            digest.update(text.encode("utf-8", "surrogatepass") + b"\x00")
        model = {name: self._description[name] for name in ("model", "max_seq_length", "dtype")}
        inputs = {**model, "side": side, "prompt": prompt, "texts": digest.hexdigest()}
        with folder_step(self.cache / fingerprint(inputs), inputs) as step:
            if not step.done:
                vectors = self._encode(texts, side, prompt, step.path)
                step.finish(texts=len(texts), dimensions=vectors.shape[1], reference=self.section.model)
        return np.load(step.folder / "vectors.npy", mmap_mode="r")

    def _encode(self, texts: Sequence[str], side: str, prompt: str | None, folder: Path) -> np.ndarray:
        model = self._model
        encode = model.encode_query if side == "query" else model.encode_document
        saved_prompt = "" if prompt is not None else model.prompts.get(side, "")
        lengths = count_tokens(model.tokenizer, [(prompt or saved_prompt) + text for text in texts])
        lengths = np.minimum(lengths, model.max_seq_length or lengths.max(initial=1))
        dtype = np.float16 if self.section.dtype == "float16" else np.float32

        def vectors(rows: np.ndarray) -> np.ndarray:
            found = []
            for batch in token_batches(lengths[rows], self.section.batch_tokens):
                found.append(
                    encode(
                        [texts[row] for row in rows[batch]],
                        prompt=prompt,
                        batch_size=len(batch),
                        show_progress_bar=False,
                        normalize_embeddings=model.similarity_fn_name != "dot",
                    ).astype(dtype)
                )
                progress.update(len(batch))
            found = np.concatenate(found)
            check_finite(found, f"embeddings of {self.section.model}")
            return found

        with tqdm(total=len(texts), desc=f"embed {side} texts", unit=" texts", smoothing=0) as progress:
            return in_shards(folder / "vectors.npy", longest_first(lengths), vectors, progress)

    @cached_property
    def _description(self) -> dict[str, Any]:
        return self.section.describe()

    @cached_property
    def _model(self) -> SentenceTransformer:
        from sentence_transformers import SentenceTransformer

        model = load_model(SentenceTransformer, self.section)
        if self.section.max_seq_length:
            model.max_seq_length = self.section.max_seq_length
        return model


def load_model(kind: Callable[..., Any], section: ModelSection, **keywords: Any) -> Any:
    """A sentence-transformers model of `kind`. Raises InputError when its files cannot be had or read."""
    from safetensors import SafetensorError

    reference: ModelReference = resolve_model(section.model)
    try:
        return kind(
            reference.name_or_path,
            revision=reference.revision,
            model_kwargs={"dtype": section.dtype},
            **keywords,
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"model {section.model!r} cannot be loaded: {str(error).splitlines()[0]}") from None


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


def in_shards(
    path: Path, order: np.ndarray, compute: Callable[[np.ndarray], np.ndarray], progress: tqdm | None = None
) -> np.ndarray:
    """Write `path` (.npy), whose row i is `compute`'s answer for i, working through `order` shard by shard.

    `compute` takes row numbers and returns an array with one row for each. A finished shard is a file of its own
    until all are there, so that a killed process goes on where it stopped. The answer is memory-mapped.
    """
    folder = path.with_suffix(".shards")
    if not path.exists():
        folder.mkdir(exist_ok=True)
        shards = []
        for start in range(0, len(order), SHARD):
            shard, rows = folder / f"{start // SHARD:06d}.npy", order[start : start + SHARD]
            if not shard.exists():
                _save(shard, compute(rows))
            elif progress is not None:
                progress.update(len(rows))
            shards.append((rows, shard))
        _save_merged(path, shards)
    for leftover in folder.glob("*"):
        leftover.unlink()
    if folder.exists():
        folder.rmdir()
    return np.load(path, mmap_mode="r")


def _save(path: Path, values: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as stream:
        np.save(stream, values)
    os.replace(temporary, path)


def _save_merged(path: Path, shards: Sequence[tuple[np.ndarray, Path]]) -> None:
    first = np.load(shards[0][1], mmap_mode="r")
    shape = (sum(len(rows) for rows, _ in shards), *first.shape[1:])
    temporary = path.with_name(path.name + ".tmp")
    merged = np.lib.format.open_memmap(temporary, mode="w+", dtype=first.dtype, shape=shape)
    for rows, shard in shards:
        merged[rows] = np.load(shard)
    merged.flush()
    os.replace(temporary, path)
