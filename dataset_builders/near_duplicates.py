"""Which texts are equal, and which are nearly equal: decided from arrays of some bytes a text.

Equal: the same text, case and white space aside (`normalised`), known by 16 bytes of hash.

Near: the sets of character 5-grams have a Jaccard similarity of 0.8 or more. MinHash proposes pairs (125 permutations
in 25 bands of 5, 100 bytes a text; Broder 1997), and the exact similarity of the two texts decides. Two texts are
compared when they agree in two bands or more: of pairs at 0.80 that finds 99.93 %, at 0.85 99.999 %, while unrelated
texts (0.06) practically never meet. Bands are joined by sorting, so memory is flat in the number of pairs.

Thousands of texts from one template would all meet in one bucket and cost a square of comparisons. There each is
compared with the 16 next to it and with the first one only. Every bucket of 17 or fewer is compared in full, texts
with the same 5-grams always end up in one group, and groups are chains, so what such a bucket can lose is a text
that is near some members but neither near its neighbours nor the first, in all of the bands that it shares with them
(of MedQuAD's 1,709 grouped answers, out of 15,809 that are written from templates, 1,688 are found).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np
from tqdm import tqdm

NEAR_DUPLICATE = 0.8  # Jaccard similarity of the sets of character 5-grams
SHINGLE = 5
BANDS, ROWS = 25, 5
AGREEING = 2  # bands
WINDOW = 16  # neighbours in a bucket that a text is compared with
BLOCK = 1024  # texts in memory at a time
PAIRS = 256  # pairs whose texts are in memory at a time
_HASHES = 1 << 16  # 5-grams hashed at a time: a text of a megabyte should not take hundreds
_WORD = re.compile(r"\w+")


class TextsByRow(Protocol):
    """Texts that need not be in memory: `texts[rows]` are those of a slice or of an array of row numbers."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | np.ndarray) -> Sequence[str]: ...


def normalised(text: str) -> str:
    """What two texts are compared by: case and white space do not make a difference."""
    return " ".join(text.split()).casefold()


def text_keys(texts: TextsByRow) -> np.ndarray:
    """(n, 2) uint64: 128 bits of hash of each normalised text, so equal rows mean equal texts."""
    keys = np.empty((len(texts), 2), np.uint64)
    for start in range(0, len(texts), BLOCK):
        normal = (normalised(text).encode() for text in texts[start : start + BLOCK])
        digests = b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in normal)
        keys[start : start + BLOCK] = np.frombuffer(digests, np.uint64).reshape(-1, 2)
    return keys


def first_equal(keys: np.ndarray) -> np.ndarray:
    """(n,) the smallest row with the same text key ((n, 2)): its own where no text before is equal."""
    order = np.lexsort(keys.T)  # stable, so the smallest row of equals comes first
    new = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))[: len(keys)]
    first = np.empty(len(keys), np.int64)
    first[order] = order[np.flatnonzero(new)][np.cumsum(new) - 1]
    return first


def same_text(keys: np.ndarray, known: np.ndarray) -> np.ndarray:
    """(n,) the row in `known` ((m, 2) distinct text keys) that each of `keys` ((n, 2)) equals, -1 where none does."""
    if not len(known):
        return np.full(len(keys), -1)
    order = np.argsort(known[:, 0])
    rows = order[np.searchsorted(known[order, 0], keys[:, 0]).clip(max=len(known) - 1)]
    return np.where((known[rows] == keys).all(axis=1), rows, -1)


def band_keys(texts: TextsByRow, description: str = "MinHash") -> np.ndarray:
    """(n, BANDS) uint32: texts that agree in a band have the same minima under its ROWS permutations."""
    from datasketch import MinHash

    keys = np.empty((len(texts), BANDS), np.uint32)
    # the 5-grams are hashed already
    empty = MinHash(num_perm=BANDS * ROWS, seed=0, hashfunc=int)
    with tqdm(total=len(texts), desc=description, unit=" texts", smoothing=0) as progress:
        for start in range(0, len(texts), BLOCK):
            for row, text in enumerate(texts[start : start + BLOCK], start):
                sketch, grams = empty.copy(), shingles(text)
                for first in range(0, len(grams), _HASHES):
                    sketch.update_batch(grams[first : first + _HASHES].tolist())
                keys[row] = _fold(sketch.hashvalues)
            progress.update(min(BLOCK, len(texts) - start))
    return keys


def near_duplicate_groups(texts: TextsByRow, keys: np.ndarray, similarity: float = NEAR_DUPLICATE) -> np.ndarray:
    """(n,) the smallest row of each text's group, which is its own row where it has no near duplicate.

    `keys` are the texts' `band_keys`. A chain of near duplicates is one group.
    """
    group = np.arange(len(texts))
    for left, right in _neighbours(keys):
        apart = group[left] != group[right]
        left, right = left[apart], right[apart]
        agreeing = _agreeing(keys, left, right)
        left, right = left[agreeing], right[agreeing]
        for start in range(0, len(left), PAIRS):
            _join(texts, group, left[start : start + PAIRS], right[start : start + PAIRS], similarity)
        if len(left):
            while not np.array_equal(roots := group[group], group):
                group = roots
    return group


def near_matches(
    texts: TextsByRow, keys: np.ndarray, others: TextsByRow, other_keys: np.ndarray, similarity: float = NEAR_DUPLICATE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row in `texts`, row in `others` and Jaccard similarity of the pairs that are near, ordered by rows.

    `keys` and `other_keys` are their `band_keys`. In each band a text meets at most WINDOW of the others.
    """
    order = np.argsort(other_keys, axis=0, kind="stable").T.copy()
    bands = np.take_along_axis(other_keys.T, order, axis=1)
    found = []
    for start in range(0, len(keys), _HASHES):
        block = keys[start : start + _HASHES]
        met = [_meetings(block[:, band].copy(), bands[band], order[band]) for band in range(BANDS)]
        pairs, agreeing = np.unique(np.concatenate(met), return_counts=True)
        left, right = np.divmod(pairs[agreeing >= AGREEING], max(len(others), 1))
        for first in range(0, len(left), PAIRS):
            rows, other_rows = left[first : first + PAIRS] + start, right[first : first + PAIRS]
            grams, other_grams = _shingles_of(texts, rows), _shingles_of(others, other_rows)
            for row, other in zip(rows.tolist(), other_rows.tolist(), strict=True):
                score = jaccard(grams[row], other_grams[other])
                if score >= similarity:
                    found.append((row, other, score))
    rows, other_rows, scores = zip(*found, strict=True) if found else ((), (), ())
    return np.array(rows, np.int64), np.array(other_rows, np.int64), np.array(scores, np.float64)


def shingles(text: str) -> np.ndarray:
    """The distinct 32-bit hashes of a text's 5-grams (bytes of its words in lower case, joined by one space).

    A text without a word is compared by its signs.
    """
    words = " ".join(_WORD.findall(text.casefold())) or normalised(text)
    data = np.frombuffer(words.encode().ljust(SHINGLE), np.uint8).astype(np.uint32)
    hashes = np.zeros(len(data) - SHINGLE + 1, np.uint32)
    for place in range(SHINGLE):
        hashes = hashes * np.uint32(1_000_003) + data[place : place + len(hashes)]
    hashes.sort()
    return hashes[np.append(True, hashes[1:] != hashes[:-1])]


def jaccard(one: np.ndarray, other: np.ndarray) -> float:
    """|A and B| / |A or B| of two arrays of distinct values."""
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _fold(minima: np.ndarray) -> np.ndarray:
    """(BANDS * ROWS,) uint32 minima -> (BANDS,) uint32: the upper half of a polynomial modulo 2 ** 64."""
    factors = np.array([pow(0x9E3779B97F4A7C15, power, 2**64) for power in range(1, ROWS + 1)], np.uint64)
    return ((minima.reshape(BANDS, ROWS).astype(np.uint64) * factors).sum(axis=1) >> np.uint64(32)).astype(np.uint32)


def _neighbours(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows to compare: in each band, those of one bucket that are no more than WINDOW places apart.

    In larger buckets also every row with the first. The next band orders a bucket, which brings equals together.
    """
    for band in range(BANDS):
        order = np.lexsort((keys[:, (band + 1) % BANDS], keys[:, band]))
        bucket = keys[order, band]
        for start in range(0, len(bucket), _HASHES):
            places = np.arange(start, min(start + _HASHES, len(bucket)))
            first = np.searchsorted(bucket, bucket[places], side="left")
            # one column for each neighbour before, the nearest last, and one for the first of the bucket
            partners = places[:, None] - np.arange(WINDOW, -1, -1)
            partners[:, -1] = np.where(places - first > WINDOW, first, places)
            rows, columns = np.nonzero((partners >= first[:, None]) & (partners < places[:, None]))
            yield order[partners[rows, columns]], order[places[rows]]


def _agreeing(keys: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """(pairs,) bool: the two rows agree in AGREEING bands or more."""
    blocks = [slice(start, start + _HASHES) for start in range(0, len(left), _HASHES)]
    counts = [np.count_nonzero(keys[left[block]] == keys[right[block]], axis=1) for block in blocks]
    return np.concatenate([np.zeros(0, np.int64), *counts]) >= AGREEING


def _meetings(block: np.ndarray, bucket: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """row in `block` * len(rows) + other row, for each text and the first WINDOW others of its bucket in one band."""
    first = np.searchsorted(bucket, block, side="left")
    count = np.minimum(np.searchsorted(bucket, block, side="right") - first, WINDOW)
    texts = np.repeat(np.arange(len(block)), count)
    places = np.arange(len(texts)) - np.repeat(np.cumsum(count) - count, count) + first[texts]
    return texts * len(rows) + rows[places]


def _join(texts: TextsByRow, group: np.ndarray, left: np.ndarray, right: np.ndarray, similarity: float) -> None:
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


def _shingles_of(texts: TextsByRow, rows: np.ndarray) -> dict[int, np.ndarray]:
    rows = np.unique(rows)
    return {row: shingles(text) for row, text in zip(rows.tolist(), texts[rows], strict=True)}
