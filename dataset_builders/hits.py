"""Retrieved documents as integers that sort by score, then by smaller document position.

Top-k lists of different parts of a corpus then merge by sorting, and ties never depend on the machine's luck.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NONE = np.iinfo(np.int64).min  # no document: sorts below every hit


def sort_keys(scores: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """int64 keys of float32 scores and the positions of their documents.

    The upper half is the float's bits, made to sort as integers; the lower half counts documents downwards.
    """
    bits = (scores + np.float32(0)).view(np.int32)  # + 0: no negative zeros
    return (_flip(bits).astype(np.int64) << 32) | (0xFFFFFFFF - positions)


def merge_keys(parts: Sequence[np.ndarray], top_k: int) -> np.ndarray:
    """Top-k keys of the parts of a corpus, (queries, up to top_k) each -> those of the whole, best first."""
    return np.sort(np.concatenate(parts, axis=1), axis=1)[:, ::-1][:, :top_k]


def positions_and_scores(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document positions (int64; -1: none) and scores (float32; NaN: none) of keys."""
    positions = np.where(keys == NONE, -1, 0xFFFFFFFF - (keys & 0xFFFFFFFF))
    return positions, _flip((keys >> 32).astype(np.int32)).view(np.float32)


def _flip(bits: np.ndarray) -> np.ndarray:
    """Negative floats sort the wrong way round as integers: flip all but their sign. Its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
