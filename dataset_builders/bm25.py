"""BM25 by parts of the corpus: the scores of one index over all of it, with one part in memory at a time.

Tokens, index and search are bm25s's. What a part cannot know by itself (how many documents hold a term, how long the
average document is) is counted first, over all parts. Only terms that occur in a query are indexed.

Words are stemmed by Snowball and lose bm25s's stop words, by the language of the texts, where these have some. Scripts
that write no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) are read as overlapping pairs of
characters, as in Lucene's CJKAnalyzer: known by the characters, whatever the language.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from common.recipes import Section
from dataset_builders.columns import TextColumn
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.languages import STEMMERS, STOP_WORDS, language_name
from dataset_builders.top_k import Ranking, Search, best, ranges

if TYPE_CHECKING:
    import bm25s

QUERY_BLOCK = 64  # queries whose scores of a part are in memory at a time
# How often a term (by its place in the vocabulary) occurs in a document (by its place in the part). Term -1 stands
# for all terms: its count is the document's length.
POSTING = np.dtype([("term", np.int32), ("document", np.int32), ("count", np.int32)])
# Thai and Lao, Burmese, Khmer; Japanese kana; Han characters with their iteration marks
_SPACELESS = r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\uff66-\uff9f"
_SPACELESS += r"\u3005\u3007\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+"


class Bm25(Section):
    """k1 and b are bm25s's defaults. rank_bm25 (Okapi, negative idf floored) ranks differently: a reference."""

    backend: Literal["bm25s", "rank_bm25"] = "bm25s"  # rank_bm25 is Okapi, a reference
    top_k: int = Field(100, ge=1)  # documents found for a query
    k1: float = Field(1.5, ge=0)  # how soon a repeated term stops to count
    b: float = Field(0.75, ge=0, le=1)  # how much long documents are marked down


@functools.cache
def _term() -> str:
    """A pattern of words. `re` takes no combining mark for a part of a word, which would cut Hindi into pieces."""
    marks = "".join(filter(lambda char: unicodedata.category(char)[0] == "M", map(chr, range(0xFFFF))))
    return rf"{_SPACELESS}|\w[\w{marks}]+"


def tokenise(texts: Sequence[str], language: str | None = None) -> list[list[str]]:
    """Words of two letters or more in lower case, without stop words, by their stem; English's where none is named."""
    tokens = _tokenised(texts, language)
    words = {number: word for word, number in tokens.vocab.items()}
    return [[words[number] for number in text] for text in tokens.ids]


def describe_words(language: str | None) -> str:
    """
    >>> describe_words("pl")
    'words of two letters or more in lower case, no stop words removed, Snowball stems of Polish'
    """
    language = language or "en"
    name = language_name(language)
    stop_words = f"stop words of {name}" if language in STOP_WORDS else "no stop words"
    stems = f"Snowball stems of {name}" if language in STEMMERS else "not stemmed"
    return f"words of two letters or more in lower case, {stop_words} removed, {stems}"


def _tokenised(texts: Sequence[str], language: str | None) -> bm25s.tokenization.Tokenized:
    import bm25s
    import Stemmer

    language = language or "en"
    texts = [text if text.isascii() else re.sub(_SPACELESS, _bigrams, text) for text in texts]
    stop_words = language if language in STOP_WORDS else None
    stemmer = Stemmer.Stemmer(STEMMERS[language]) if language in STEMMERS else None
    return bm25s.tokenize(texts, token_pattern=_term(), stopwords=stop_words, stemmer=stemmer, show_progress=False)


def _bigrams(run: re.Match) -> str:
    """
    >>> _bigrams(re.match(".*", "植物园"))
    ' 植物 物园 '
    """
    return f" {' '.join(map(''.join, pairwise(run[0]))) or run[0]} "


def search_bm25(
    section: Bm25,
    documents: TextColumn,
    parts: Sequence[range],
    queries: Sequence[str],
    blocks: Sequence[range],
    folder: Path,
    engine: Engine,
    language: str | None = None,
) -> Ranking:
    """The queries' top-k documents among those that share a word with them."""
    if section.backend == "rank_bm25":  # knows no parts
        search = _OkapiSearch(section.top_k, blocks, [range(len(documents))], queries, section, language, documents)
        return search.run(folder / "bm25.shards", engine, "BM25 search")
    vocabulary = sorted({word for query in tokenise(queries, language) for word in query})
    postings = compute_shards(
        _Postings(documents, parts, vocabulary, language),
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
    count = len(documents)
    idf = np.log1p((count - frequencies + 0.5) / (frequencies + 0.5))  # Lucene's
    plan = (section.top_k, blocks, parts, queries, section, language)
    search = _Bm25sSearch(*plan, postings, vocabulary, idf, length / max(count, 1))
    return search.run(folder / "bm25.shards", engine, "BM25 search")


@dataclass(frozen=True)
class _Postings:
    documents: TextColumn
    parts: Sequence[range]
    vocabulary: list[str]
    language: str | None

    def __call__(self, number: int) -> np.ndarray:
        part = self.parts[number]
        tokens = _tokenised(self.documents[part.start : part.stop], self.language)
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
class _SparseSearch(Search):
    queries: Sequence[str]
    section: Bm25
    language: str | None

    def scorer(self, part: int) -> Any:
        """Words of a query -> scores of the part's documents."""
        raise NotImplementedError

    def search(self, queries: range, part: int) -> np.ndarray:
        import torch

        words = tokenise([self.queries[row] for row in queries], self.language)
        score, rows = self.scorer(part), self.parts[part]
        found = []
        for block in ranges(len(words), QUERY_BLOCK):
            scores = np.zeros((len(block), len(rows)), np.float32)
            for place, query in enumerate(words[block.start : block.stop]):
                if query:
                    scores[place] = score(query)
            found.append(best(torch.from_numpy(scores), self.top_k, rows.start, above=0))
        return np.concatenate(found)


@dataclass(frozen=True)
class _Bm25sSearch(_SparseSearch):
    postings: Shards
    vocabulary: list[str]
    idf: np.ndarray  # of each term of the vocabulary, in the whole corpus
    average_length: float  # of its documents, in words

    @cached_property
    def _places(self) -> dict[str, int]:
        return {word: place for place, word in enumerate(self.vocabulary)}

    def scorer(self, part: int) -> Any:
        import bm25s

        index = bm25s.BM25(method="lucene", k1=self.section.k1, b=self.section.b)
        postings = self.postings[part]
        indexed = postings["term"] >= 0
        lengths, postings = postings["count"][~indexed], postings[indexed]
        length = lengths[postings["document"]] / self.average_length
        saturated = postings["count"] / (postings["count"] + index.k1 * (1 - index.b + index.b * length))
        index.scores = {
            "data": (self.idf[postings["term"]] * saturated).astype(np.float32),
            "indices": postings["document"].astype(np.int32),
            "indptr": np.searchsorted(postings["term"], np.arange(len(self.vocabulary) + 1)),  # sorted by term
            "num_docs": len(self.parts[part]),
        }
        index.nonoccurrence_array = None  # Lucene's scores are zero where a term does not occur
        return lambda query: index.get_scores_from_ids([self._places[word] for word in query])


@dataclass(frozen=True)
class _OkapiSearch(_SparseSearch):
    documents: TextColumn

    def scorer(self, part: int) -> Any:
        from rank_bm25 import BM25Okapi

        return BM25Okapi(tokenise(self.documents[:], self.language), k1=self.section.k1, b=self.section.b).get_scores
