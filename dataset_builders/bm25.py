"""BM25 by parts of the corpus: the scores of one index over all of it, with one part in memory at a time.

The formulas and the search are bm25s's. What a part cannot know by itself (how many documents hold a term, how long
the average document is) is counted first, over all parts. Only terms that occur in a query are indexed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from common.recipes import Section
from dataset_builders.columns import TextColumn
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.hits import NONE, sort_keys

if TYPE_CHECKING:
    import bm25s

# How often a term (by its place in the vocabulary) occurs in a document (by its place in the part). Term -1 stands
# for all terms: its count is the document's length.
POSTING = np.dtype([("term", np.int32), ("document", np.int32), ("count", np.int32)])


class Bm25(Section):
    """k1 and b are bm25s's defaults. rank_bm25 (Okapi, negative idf floored) ranks differently: a reference."""

    backend: Literal["bm25s", "rank_bm25"] = "bm25s"
    top_k: int = Field(100, ge=1)
    k1: float = Field(1.5, ge=0)
    b: float = Field(0.75, ge=0, le=1)


def tokenise(texts: Sequence[str]) -> list[list[str]]:
    """Words of two letters or more in lower case, without English stop words, by their Snowball stem."""
    tokens = _tokenised(texts)
    words = {number: word for word, number in tokens.vocab.items()}
    return [[words[number] for number in text] for text in tokens.ids]


def _tokenised(texts: Sequence[str]) -> bm25s.tokenization.Tokenized:
    import bm25s
    import Stemmer

    return bm25s.tokenize(list(texts), stopwords="en", stemmer=Stemmer.Stemmer("english"), show_progress=False)


def search_bm25(
    section: Bm25,
    documents: TextColumn,
    parts: Sequence[range],
    queries: Sequence[str],
    blocks: Sequence[range],
    folder: Path,
    engine: Engine,
) -> Shards:
    """Keys of the top-k documents of every part for every block of queries: shard block * len(parts) + part.

    Documents that share no word with the query are not found: their places hold hits.NONE.
    """
    if section.backend == "rank_bm25":
        work = _OkapiSearch(section, documents, parts, queries, blocks)
    else:
        vocabulary = sorted({word for query in tokenise(queries) for word in query})
        postings = compute_shards(
            _Postings(documents, parts, vocabulary),
            [len(part) for part in parts],
            folder / "postings.shards",
            engine,
            description="BM25 index",
            unit="texts",
        )
        frequencies, length = np.zeros(len(vocabulary), np.int64), 0
        for part in postings:
            indexed = part["term"] >= 0
            frequencies += np.bincount(part["term"][indexed], minlength=len(vocabulary))
            length += int(part["count"][~indexed].sum(dtype=np.int64))
        statistics = _Statistics(len(documents), length / max(len(documents), 1), frequencies)
        work = _Search(section, vocabulary, statistics, postings, parts, queries, blocks)
    return compute_shards(
        work,
        [len(block) * len(part) for block in blocks for part in parts],
        folder / "bm25.shards",
        engine,
        description="BM25 search",
        unit="pairs",
    )


@dataclass(frozen=True)
class _Postings:
    documents: TextColumn
    parts: Sequence[range]
    vocabulary: list[str]

    def __call__(self, number: int) -> np.ndarray:
        part = self.parts[number]
        tokens = _tokenised(self.documents[part.start : part.stop])
        lengths = np.array([len(ids) for ids in tokens.ids], np.int64)
        terms = np.full(max(tokens.vocab.values(), default=-1) + 1, -1, np.int64)
        for place, word in enumerate(self.vocabulary):
            if word in tokens.vocab:
                terms[tokens.vocab[word]] = place
        places = terms[np.concatenate([np.asarray(ids, np.int64) for ids in tokens.ids])]
        rows = np.repeat(np.arange(len(part)), lengths)
        indexed = places >= 0
        pairs, counts = np.unique(places[indexed] * len(part) + rows[indexed], return_counts=True)
        found = np.empty(len(part) + len(pairs), POSTING)
        found["term"] = np.concatenate([np.full(len(part), -1), pairs // len(part)])
        found["document"] = np.concatenate([np.arange(len(part)), pairs % len(part)])
        found["count"] = np.concatenate([lengths, counts])
        return found


@dataclass(frozen=True)
class _Statistics:
    """Of the whole corpus."""

    documents: int
    average_length: float  # in words
    frequencies: np.ndarray  # documents that hold each term of the vocabulary


@dataclass(frozen=True)
class _Search:
    section: Bm25
    vocabulary: list[str]
    statistics: _Statistics
    postings: Shards
    parts: Sequence[range]
    queries: Sequence[str]
    blocks: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        block, part = divmod(number, len(self.parts))
        index = self._index(part)
        words = tokenise([self.queries[row] for row in self.blocks[block]])
        first, size = self.parts[part].start, len(self.parts[part])
        found = np.full((len(words), min(self.section.top_k, size)), NONE, np.int64)
        for row, query in enumerate(words):
            if query:
                scores = index.get_scores_from_ids([self._places[word] for word in query])
                keys = top_keys(scores, self.section.top_k, first)
                found[row, : len(keys)] = keys
        return found

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.vocabulary)}

    def _index(self, part: int) -> bm25s.BM25:
        """bm25s's index of a part, its scores made with the statistics of the whole corpus (Lucene's formula)."""
        import bm25s

        index = bm25s.BM25(method="lucene", k1=self.section.k1, b=self.section.b)
        postings = self.postings[part]
        indexed = postings["term"] >= 0
        lengths, postings = postings["count"][~indexed], postings[indexed]
        whole = self.statistics
        rarity = np.log1p((whole.documents - whole.frequencies + 0.5) / (whole.frequencies + 0.5))
        length = lengths[postings["document"]] / whole.average_length
        saturated = postings["count"] / (postings["count"] + index.k1 * (1 - index.b + index.b * length))
        index.scores = {
            "data": (rarity[postings["term"]] * saturated).astype(np.float32),
            "indices": postings["document"].astype(np.int32),
            "indptr": np.searchsorted(postings["term"], np.arange(len(self.vocabulary) + 1)),  # sorted by term
            "num_docs": len(self.parts[part]),
        }
        index.nonoccurrence_array = None  # Lucene's scores are zero where a term does not occur
        return index


@dataclass(frozen=True)
class _OkapiSearch:
    """rank_bm25 knows no parts: it scores the whole corpus and answers for the part that it was asked for."""

    section: Bm25
    documents: TextColumn
    parts: Sequence[range]
    queries: Sequence[str]
    blocks: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        block, part = divmod(number, len(self.parts))
        rows = self.parts[part]
        words = tokenise([self.queries[row] for row in self.blocks[block]])
        found = np.full((len(words), min(self.section.top_k, len(rows))), NONE, np.int64)
        for row, query in enumerate(words):
            keys = top_keys(self._index.get_scores(query)[rows.start : rows.stop], self.section.top_k, rows.start)
            found[row, : len(keys)] = keys
        return found

    @cached_property
    def _index(self):
        from rank_bm25 import BM25Okapi

        return BM25Okapi(tokenise(self.documents[:]), k1=self.section.k1, b=self.section.b)


def top_keys(scores: np.ndarray, top_k: int, first: int) -> np.ndarray:
    """Keys of the `top_k` highest positive scores of documents numbered from `first`, best first; fewer if so."""
    scores = np.asarray(scores, np.float32)
    places = np.flatnonzero(scores > 0)
    keys = sort_keys(scores[places], first + places)
    if len(keys) > top_k:
        keys = np.partition(keys, -top_k)[-top_k:]  # keys have no ties
    return np.sort(keys)[::-1]
