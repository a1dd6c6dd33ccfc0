"""BM25 by parts of the corpus: the scores of one index over all of it, with one part in memory at a time.

Words, stop words and scores are bm25s's (method "lucene"), bit for bit. What a part cannot know by itself (how many
documents hold a term, how long the average document is) is counted first, over all parts. Only terms that occur in a
query are indexed.

Words are stemmed by Snowball and lose bm25s's stop words, by the language of the texts, where these have some. Scripts
that write no spaces between words (Chinese, Japanese, Thai, Lao, Burmese, Khmer) are read as overlapping pairs of
characters, as in Lucene's CJKAnalyzer: known by the characters, whatever the language.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from common.recipes import Section
from dataset_builders.columns import TextColumn
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.languages import STEMMERS, STOP_WORDS, language_name
from dataset_builders.near_duplicates import ASCII_WORDS
from dataset_builders.top_k import Ranking, Search, best, in_threads, ranges

QUERY_BLOCK = 8  # queries whose scores of a part are in memory at a time: a processor's cache holds them
THREAD_BLOCK = 512  # queries that a thread is given at a time
COLUMNS = 1 << 26  # bytes of scores of a part's most frequent terms that are kept by document
_STOP = -2  # the place of a word that is no term
TEXT_BLOCK = 8192  # texts whose words are in memory at a time
KNOWN = 1 << 18  # words whose stems are kept for the next part
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
    rows, numbers, words = split_words(texts)
    stems = _stems(words, language)
    tokens: list[list[str]] = [[] for _ in texts]
    for row, number in zip(rows.tolist(), numbers.tolist(), strict=True):
        if (stem := stems[number]) is not None:
            tokens[row].append(stem)
    return tokens


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


def _stems(words: list[str], language: str | None) -> list[str | None]:
    """None for a stop word."""
    import Stemmer
    from bm25s.tokenization import _infer_stopwords

    language = language or "en"
    stop_words = frozenset(_infer_stopwords(language) if language in STOP_WORDS else ())
    stems = Stemmer.Stemmer(STEMMERS[language]).stemWords(words) if language in STEMMERS else words
    return [None if word in stop_words else stem for word, stem in zip(words, stems, strict=True)]


def split_words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """The row and number of each word of the texts, in order, stop words too; and the words by number."""
    import pyarrow.compute as pc  # slow to import: --help needs none

    split = re.compile(_term()).findall
    spaced = [
        text.translate(ASCII_WORDS) if text.isascii() else " ".join(split(re.sub(_SPACELESS, _bigrams, text).lower()))
        for text in texts
    ]
    lists = pc.ascii_split_whitespace(pa.array(spaced, pa.large_string()))
    words = lists.flatten().dictionary_encode()
    rows = np.repeat(np.arange(len(texts), dtype=np.int32), lists.value_lengths().to_numpy())
    numbers, distinct = words.indices.to_numpy(), words.dictionary
    is_word = pc.binary_length(distinct).to_numpy() > 1  # of two letters, or one of a script without spaces
    kept = is_word[numbers]
    return rows[kept], numbers[kept], distinct.to_pylist()


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
    words = tokenise(queries, language)
    if section.backend == "rank_bm25":  # knows no parts
        search = _OkapiSearch(section.top_k, blocks, [range(len(documents))], words, section, documents, language)
        return search.run(folder / "bm25.shards", engine, "BM25 search")
    vocabulary = {word: place for place, word in enumerate(sorted({word for query in words for word in query}))}
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
    terms = [[vocabulary[word] for word in query] for query in words]
    search = _Bm25sSearch(section.top_k, blocks, parts, terms, section, postings, idf, length / max(count, 1))
    return search.run(folder / "bm25.shards", engine, "BM25 search")


@dataclass(frozen=True)
class _Postings:
    documents: TextColumn
    parts: Sequence[range]
    vocabulary: dict[str, int]  # term -> place
    language: str | None

    def __call__(self, number: int) -> np.ndarray:
        from scipy.sparse import coo_array

        part = self.parts[number]
        count = len(part)
        known = self._known
        if len(known) > KNOWN:
            known.clear()

        def read(block: range) -> tuple[np.ndarray, np.ndarray]:
            """Row and place of each word but stop words."""
            rows, numbers, words = split_words(self.documents[part.start + block.start : part.start + block.stop])
            unknown = [*{*words}.difference(known)]
            for word, stem in zip(unknown, _stems(unknown, self.language), strict=True):
                known[word] = _STOP if stem is None else self.vocabulary.get(stem, -1)
            places = np.fromiter(map(known.__getitem__, words), np.int32, len(words))[numbers]
            return block.start + rows[places > _STOP], places[places > _STOP]

        lengths, found = np.zeros(count, np.int32), []
        for rows, places in in_threads(read, ranges(count, TEXT_BLOCK)):
            lengths += np.bincount(rows, minlength=count)
            found.append((places[places >= 0], rows[places >= 0]))
        pairs = np.concatenate(found, axis=1)
        counts = coo_array((np.ones(pairs.shape[1], np.int32), tuple(pairs)), (len(self.vocabulary), count)).tocsr()
        postings = np.empty(count + counts.nnz, POSTING)
        postings["term"] = np.repeat(np.arange(-1, len(self.vocabulary)), [count, *np.diff(counts.indptr)])
        postings["document"] = np.concatenate([np.arange(count), counts.indices])
        postings["count"] = np.concatenate([lengths, counts.data])
        return postings

    @functools.cached_property
    def _known(self) -> dict[str, int]:
        """The places of words' terms, kept from one part to the next; -1 for a term that no query holds."""
        return {}


@dataclass(frozen=True)
class _SparseSearch(Search):
    queries: Sequence[list]  # what `scorer` reads of each
    section: Bm25

    def scorer(self, part: int) -> Callable[[list, np.ndarray], None]:
        """What adds a query's scores of the part's documents to an array of zeros."""
        raise NotImplementedError

    def search(self, queries: range, part: int) -> np.ndarray:
        add, rows = self.scorer(part), self.parts[part]

        def found(block: range) -> np.ndarray:
            buffer, results = np.empty((QUERY_BLOCK, len(rows)), np.float32), []
            for some in ranges(len(block), QUERY_BLOCK):
                scores = buffer[: len(some)]
                scores.fill(0)
                for place, query in enumerate(block[some.start : some.stop]):
                    add(self.queries[query], scores[place])
                results.append(best(scores, self.top_k, rows.start, above=0))
            return np.concatenate(results)

        blocks = ranges(len(queries), THREAD_BLOCK)
        return np.concatenate([*in_threads(found, [queries[block.start : block.stop] for block in blocks])])


@dataclass(frozen=True)
class _Bm25sSearch(_SparseSearch):
    postings: Shards
    idf: np.ndarray  # of each term of the vocabulary, in the whole corpus
    average_length: float  # of its documents, in words

    def scorer(self, part: int) -> Callable[[list, np.ndarray], None]:
        k1, b = self.section.k1, self.section.b
        terms, documents, counts = (np.ascontiguousarray(self.postings[part][name]) for name in POSTING.names)
        lengths, first = counts[: len(self.parts[part])], len(self.parts[part])
        terms, documents, counts = terms[first:], documents[first:].astype(np.intp), counts[first:]
        length = lengths[documents] / self.average_length
        scores = (self.idf[terms] * (counts / (counts + k1 * (1 - b + b * length)))).astype(np.float32)
        bounds = np.searchsorted(terms, np.arange(len(self.idf) + 1))  # sorted by term
        spans = [slice(start, stop) for start, stop in pairwise(bounds.tolist())]
        columns = {}  # a whole column is added faster than many scattered scores
        for term in np.argsort(-np.diff(bounds), kind="stable")[: COLUMNS // (4 * len(lengths))].tolist():
            columns[term] = np.zeros(len(lengths), np.float32)
            columns[term][documents[spans[term]]] = scores[spans[term]]

        def add(query: list[int], row: np.ndarray) -> None:
            for term in query:  # in this order, which rounding depends on
                if term in columns:
                    row += columns[term]
                else:
                    np.add.at(row, documents[spans[term]], scores[spans[term]])

        return add


@dataclass(frozen=True)
class _OkapiSearch(_SparseSearch):
    documents: TextColumn
    language: str | None

    def scorer(self, part: int) -> Callable[[list, np.ndarray], None]:
        from rank_bm25 import BM25Okapi

        index = BM25Okapi(tokenise(self.documents[:], self.language), k1=self.section.k1, b=self.section.b)

        def add(query: list[str], row: np.ndarray) -> None:
            row += index.get_scores(query)

        return add
