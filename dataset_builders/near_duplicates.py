"""Which texts are equal, and which are near duplicates, without a comparison of all pairs.

Equal: the same text but for case and white space (`normalised`), recognised by a hash of 16 bytes.

Near: the sets of character 5-grams have a Jaccard similarity of 0.8 or more. MinHash proposes pairs (125 permutations
in 25 bands of 5, 100 bytes a text; Broder 1997), and the exact similarity of the two texts decides. Pairs that agree
in two bands or more are compared: that finds 99.93 % of the pairs at 0.80 and 99.999 % at 0.85, while unrelated texts
(0.06) practically never agree. Bands are joined by sorting, so memory does not grow with the number of pairs.

Thousands of texts from one template agree in the same bands, and all pairs would be too many. So in a bucket of more
than 17 texts, each is compared with the 16 next to it and with the first. What this can miss is a text that is near
some members, but neither near its neighbours nor near the first, in all bands that it shares with them (of MedQuAD's
1,709 grouped answers, out of 15,809 that are written from templates, 1,688 are found).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator

import numpy as np
import polars as pl
from tqdm import tqdm

from dataset_builders.top_k import in_threads

NEAR_DUPLICATE = 0.8  # Jaccard similarity of the sets of character 5-grams
SHINGLE = 5
BANDS, ROWS = 25, 5
AGREEING = 2  # bands
WINDOW = 16  # neighbours in a bucket that a text is compared with
BLOCK = 1024  # texts in memory at a time
PAIRS = 256  # pairs whose 5-grams are in memory at a time
_HASHED = 128  # texts whose 5-grams are permuted at a time: a processor's cache holds them
_ROWS = 1 << 16  # of texts whose bands are joined at a time
_WORD = re.compile(r"\w+")
# An ASCII character in lower case if it is one of a word, else a space: much faster than the pattern.
ASCII_WORDS = "".join(char.lower() if _WORD.match(char) else " " for char in map(chr, range(128)))


def in_blocks(values: pl.Series) -> Iterator:
    """The values one by one, with few of them as Python objects at a time."""
    for start in range(0, len(values), BLOCK):
        yield from values.slice(start, BLOCK).to_list()


def normalised(text: str) -> str:
    """What two texts are compared by: case and white space make no difference."""
    return " ".join(text.split()).casefold()


def stable_hash(*parts: object) -> int:
    """64 bits that depend on nothing but `parts`: the same in every process, on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


def text_keys(texts: pl.Series) -> pl.Series:
    """128 bits of hash of each normalised text: equal keys mean equal texts."""
    keys = (hashlib.blake2b(normalised(text).encode(), digest_size=16).digest() for text in in_blocks(texts))
    return pl.Series("key", keys, pl.Binary)


def band_keys(texts: pl.Series, description: str = "MinHash") -> np.ndarray:
    """(n, BANDS) uint32: texts that agree in a band have the same minima under its ROWS permutations.

    The minima are those of datasketch's MinHash (affine32), which hashes one text at a time.
    """
    found = []
    with tqdm(total=len(texts), desc=description, unit=" texts", smoothing=0) as progress:
        for keys in in_threads(_block_keys, texts.to_frame().iter_slices(_HASHED)):
            found.append(keys)
            progress.update(len(keys))
    return np.concatenate([np.empty((0, BANDS), np.uint32), *found])


def _block_keys(texts: pl.DataFrame) -> np.ndarray:
    data = [_compared(text) for text in texts.to_series().to_list()]
    ends = np.cumsum([len(part) for part in data])
    within = np.ones(ends[-1], bool)
    within[(ends[:, None] - np.arange(1, SHINGLE)).ravel()] = False  # 5-grams that begin there reach the next text
    hashes = _mixed(_gram_hashes(b"".join(data))[within[: 1 - SHINGLE]])
    starts = np.concatenate([[0], ends[:-1]]) - (SHINGLE - 1) * np.arange(len(data))
    minima = np.empty((BANDS * ROWS, len(data)), np.uint32)
    permuted = np.empty_like(hashes)
    for row, (factor, offset) in enumerate(_permutations()):
        np.multiply(hashes, factor, out=permuted)
        permuted += offset
        np.minimum.reduceat(permuted, starts, out=minima[row])
    return _fold(minima.T)


def near_duplicate_groups(texts: pl.Series, keys: np.ndarray, similarity: float = NEAR_DUPLICATE) -> np.ndarray:
    """(n,) the smallest row of each text's group, which is its own row where it has no near duplicate.

    `keys` are the texts' `band_keys`. A chain of near duplicates is one group.
    """
    group = np.arange(len(texts))
    for left, right in _neighbours(keys):
        compared = group[left] != group[right]
        left, right = left[compared], right[compared]
        agreeing = (keys[left] == keys[right]).sum(axis=1) >= AGREEING
        left, right = left[agreeing], right[agreeing]
        for start in range(0, len(left), PAIRS):
            _join(texts, group, left[start : start + PAIRS], right[start : start + PAIRS], similarity)
        while len(left) and not np.array_equal(roots := group[group], group):
            group = roots
    return group


def near_matches(
    texts: pl.Series, keys: np.ndarray, others: pl.Series, other_keys: np.ndarray, similarity: float = NEAR_DUPLICATE
) -> pl.DataFrame:
    """row of `texts`, other (a row of `others`) and their Jaccard similarity, for the pairs that are near, by rows.

    `keys` and `other_keys` are their `band_keys`. In each band a text meets at most WINDOW of the others.
    """
    first_others = [
        pl.DataFrame({"key": band, "other": np.arange(len(band), dtype=np.int64)}).filter(
            pl.int_range(pl.len()).over("key") < WINDOW
        )
        for band in np.ascontiguousarray(other_keys.T)
    ]
    pair = pl.Schema({"row": pl.Int64, "other": pl.Int64})
    found = [pl.DataFrame(schema={**pair, "similarity": pl.Float64})]
    for start in range(0, len(keys), _ROWS):
        block = np.ascontiguousarray(keys[start : start + _ROWS].T)
        rows = np.arange(start, start + block.shape[1])
        met = [
            pl.DataFrame({"key": band, "row": rows}).join(others_, on="key").select(pair.names())
            for band, others_ in zip(block, first_others, strict=True)
        ]
        agreeing = pl.concat(met).group_by(pair.names()).len().filter(pl.col("len") >= AGREEING).sort(pair.names())
        for part in agreeing.select(pair.names()).iter_slices(PAIRS):
            grams, other_grams = _shingles_of(texts, part["row"]), _shingles_of(others, part["other"])
            scores = [jaccard(grams[row], other_grams[other]) for row, other in part.iter_rows()]
            part = part.with_columns(similarity=pl.Series(scores, dtype=pl.Float64))
            found.append(part.filter(pl.col("similarity") >= similarity))
    return pl.concat(found)


def shingles(text: str) -> np.ndarray:
    """The distinct 32-bit hashes of a text's 5-grams (bytes of its words in lower case, joined by one space).

    A text without a word is compared by its other characters.
    """
    return np.unique(_gram_hashes(_compared(text)))


def compared_words(text: str) -> str:
    """Its words in lower case, joined by one space; its other characters where it has no word."""
    words = text.translate(ASCII_WORDS).split() if text.isascii() else _WORD.findall(text.casefold())
    return " ".join(words) or normalised(text)


def _compared(text: str) -> bytes:
    return compared_words(text).encode().ljust(SHINGLE)


def _gram_hashes(data: bytes) -> np.ndarray:
    """(len(data) - SHINGLE + 1,) uint32"""
    codes = np.frombuffer(data, np.uint8).astype(np.uint32)
    hashes = np.zeros(len(codes) - SHINGLE + 1, np.uint32)
    for place in range(SHINGLE):
        hashes = hashes * np.uint32(1_000_003) + codes[place : place + len(hashes)]
    return hashes


def _permutations() -> np.ndarray:
    """(BANDS * ROWS, 2) uint32 pairs a, b, a odd: h -> a h + b modulo 2 ** 32 is one to one."""
    random = np.random.RandomState(0)
    factors = random.randint(0, 1 << 31, BANDS * ROWS, np.uint32) * np.uint32(2) + np.uint32(1)
    return np.stack([factors, random.randint(0, 1 << 32, BANDS * ROWS, np.uint32)], axis=1)


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """MurmurHash3's finalizer, one to one: permutations of unmixed hashes would keep their order too often."""
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two arrays of distinct values."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _fold(minima: np.ndarray) -> np.ndarray:
    """(n, BANDS * ROWS) uint32 minima -> (n, BANDS) uint32: the upper half of a polynomial modulo 2 ** 64."""
    factors = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, ROWS + 1)], np.uint64)
    return ((minima.reshape(-1, BANDS, ROWS) * factors).sum(axis=2) >> np.uint64(32)).astype(np.uint32)


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows to compare: within a bucket of a band, those up to WINDOW places apart, and each with the first.

    The next band orders a bucket, which brings equals together.
    """
    for band in range(BANDS):
        order = np.argsort(keys[:, band])
        is_next = np.diff(keys[order, band]) == 0
        rows = np.sort(order[np.append(is_next, False) | np.append(False, is_next)])  # few: not alone in their bucket
        order = rows[np.lexsort((keys[rows, (band + 1) % BANDS], keys[rows, band]))]
        bucket = keys[order, band]
        for distance in range(1, WINDOW + 1):
            places = np.flatnonzero(bucket[distance:] == bucket[:-distance])
            yield order[places], order[places + distance]
        first = np.searchsorted(bucket, bucket)
        places = np.flatnonzero(np.arange(len(bucket)) - first > WINDOW)
        yield order[first[places]], order[places]


def _join(texts: pl.Series, group: np.ndarray, left: np.ndarray, right: np.ndarray, similarity: float) -> None:
    """Join the groups of the pairs that are near. Pairs that are in one group by then are not compared."""
    grams = _shingles_of(texts, np.concatenate([left, right]))
    for row, other in zip(left.tolist(), right.tolist(), strict=True):
        roots = _root(group, row), _root(group, other)
        if roots[0] != roots[1] and jaccard(grams[row], grams[other]) >= similarity:
            group[max(roots)] = min(roots)


def _root(group: np.ndarray, row: int) -> int:
    while group[row] != row:
        row = int(group[row])
    return row


def _shingles_of(texts: pl.Series, rows: Iterable[int]) -> dict[int, np.ndarray]:
    rows = np.unique(rows)
    return {row: shingles(text) for row, text in zip(rows.tolist(), texts.gather(rows), strict=True)}
