"""Dense retrieval by parts of the corpus: exact inner products block by block; beyond a stated size, FAISS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from common.cli import InputError
from dataset_builders.embeddings import EncoderSection, Vectors
from dataset_builders.engines import Engine, Shards, compute_shards
from dataset_builders.top_k import NOTHING, Ranking, Search, merge, ranges, ranked

if TYPE_CHECKING:
    from torch import Tensor

QUERY_BLOCK = 256
DOCUMENT_BLOCK = 8192  # with the above, 8 MiB of scores at a time
_PAIRS = 512  # multiplied again at a time
_MOST_LEFT = 1 / 32  # of all pairs: beyond, multiplying them again takes longer than bfloat16 saves


class Dense(EncoderSection):
    """Exact search costs queries x documents; a FAISS index misses neighbours, and repays its training late."""

    top_k: int = Field(100, ge=1)  # documents found for a query
    # Documents from which on FAISS searches. Up to there exact search is minutes on a GPU, and hours on CPU cores.
    faiss_from: int = Field(20_000_000, ge=1)
    # Lists of an inverted file that a query visits, of about 4 sqrt(documents of a part); 64 of 1,024 found 79 % of
    # the 100 nearest of static embeddings in half the time of exact search.
    faiss_probes: int = Field(64, ge=1, le=1_000_000)


def search_dense(
    section: Dense,
    queries: Vectors,
    blocks: Sequence[range],
    documents: Vectors,
    parts: Sequence[range],
    folder: Path,
    engine: Engine,
) -> Ranking:
    """The queries' top-k documents; shards of unfinished work lie in `folder`."""
    if len(documents) < section.faiss_from:
        whole = [range(len(documents))]  # no parts: each would look for a top k of its own
        return _ExactSearch(section.top_k, blocks, whole, queries, documents).run(
            folder / "dense.shards", engine, "dense search"
        )
    sizes = [len(part) for part in parts]
    index = _FaissIndex(documents, parts)
    indexes = compute_shards(index, sizes, folder / "faiss.shards", engine, description="FAISS index", unit="texts")
    return _FaissSearch(section.top_k, blocks, parts, queries, indexes, section.faiss_probes).run(
        folder / "dense.shards", engine, "dense search"
    )


def dense_top_k(queries: np.ndarray, documents: np.ndarray | Vectors, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions and inner products of each query's best documents, best first; both (queries, top_k).

    Exact, never the whole score matrix, and ties go to the smaller position.
    """
    found = exact_search(queries, documents, top_k)
    return found["document"].astype(np.int64), found["score"]


@dataclass(frozen=True)
class _ExactSearch(Search):
    queries: Vectors
    documents: Vectors

    def search(self, queries: range, part: int) -> np.ndarray:
        return exact_search(self.queries[queries.start : queries.stop], self.documents, self.top_k)


def exact_search(
    queries: np.ndarray, documents: np.ndarray | Vectors, top_k: int, bfloat16: bool | None = None
) -> np.ndarray:
    """FOUND (queries, up to top_k), best first: fast products rule documents out, the pairs that are left are
    multiplied again in float32.

    A pair is left unless its fast product is below the top k by more than that product's error. So the fast ones may
    be in bfloat16 (None: where the processor multiplies it), and a score depends on its two vectors alone: equal
    documents have equal scores, wherever they lie.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if bfloat16 is None:
        bfloat16 = device == "cpu" and _multiplies_bfloat16()
    dtype = torch.bfloat16 if bfloat16 else torch.float32
    queries = np.array(queries, np.float32)
    lengths = np.linalg.norm(queries, axis=1)
    found = np.full((len(queries), min(top_k, len(documents))), NOTHING)
    blocks = [slice(rows.start, rows.stop) for rows in ranges(len(queries), QUERY_BLOCK)]
    asked = [torch.from_numpy(queries[here]).to(device, dtype) for here in blocks]
    centre = None
    for rows in ranges(len(documents), DOCUMENT_BLOCK):  # read once, compared with every block of queries
        texts = np.array(documents[rows.start : rows.stop], np.float32)
        # A model's vectors point the same way: without what they share, the numbers and their errors are small.
        centre = texts.mean(axis=0) if centre is None else centre
        centred = texts - centre
        compared, longest = torch.from_numpy(centred).to(device, dtype), np.linalg.norm(centred, axis=1).max()
        # |q d - q' d'| <= |q - q'| |d| + |q'| |d - d'|, both at most eps / 2 |q| |d|; and what sums in float32 lose
        errors = lengths * (2 * longest + np.linalg.norm(centre)) * len(centre) * np.finfo(np.float32).eps
        errors += 1.01 * lengths * longest * torch.finfo(dtype).eps
        count = 0
        for here, rounded in zip(blocks, asked, strict=True):
            block, so_far = queries[here], found[here]
            bars = so_far["score"][:, -1] - block @ centre
            left, places = _pairs_left(rounded @ compared.T, bars, errors[here], so_far.shape[1])
            steps = [slice(first, first + _PAIRS) for first in range(0, len(left), _PAIRS)]  # which stay in the cache
            scores = [np.einsum("ij,ij->i", block[left[step]], texts[places[step]]) for step in steps]
            best = ranked(left, rows.start + places, np.concatenate([np.empty(0, np.float32), *scores]), so_far.shape)
            found[here] = merge([so_far, best], so_far.shape[1])
            count += len(left)
        if bfloat16 and rows.start and count > _MOST_LEFT * len(queries) * len(rows):  # scores lie too close for it
            return exact_search(queries, documents, top_k, bfloat16=False)
    return found


def _pairs_left(products: Tensor, bars: np.ndarray, errors: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns, sorted, of the products (queries, documents) that may be above their query's bar (-inf: none
    yet) and among its top k here, if each is right but for the query's error and its own rounding.
    """
    import torch

    low = torch.from_numpy(bars - errors).to(products.device, torch.float32)
    if low.isinf().any():  # the top k of these products, which bars the others
        last = products.topk(min(top_k, products.shape[1]), dim=1).values[:, -1].float()
        last -= torch.finfo(products.dtype).eps * last.abs()
        low = torch.maximum(low, last - torch.from_numpy(2 * errors).to(last))
    reached = products >= low.to(products.dtype).float()[:, None]  # rounded like the products, which keeps the order
    # where the scores lie, but numpy is the faster on a CPU
    places = reached.flatten().nonzero().ravel().cpu().numpy() if reached.is_cuda else np.flatnonzero(reached.numpy())
    return np.divmod(places, products.shape[1])


def _multiplies_bfloat16() -> bool:
    import torch

    flags = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch has none
    return any(flags.get(name) for name in ("avx512_bf16", "amx_bf16"))


@dataclass(frozen=True)
class _FaissIndex:
    """Shard i: an inverted file of part i, trained on its own documents with a fixed seed, as bytes."""

    documents: Vectors
    parts: Sequence[range]

    def __call__(self, number: int) -> np.ndarray:
        faiss = _faiss(len(self.documents))
        rows = self.parts[number]
        vectors = self.documents[rows.start : rows.stop]
        lists = max(min(int(4 * len(rows) ** 0.5), len(rows) // 39), 1)  # FAISS wants 39 training points a list
        index = faiss.index_factory(vectors.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
        index.cp.seed = 0
        index.train(vectors)
        index.add(vectors)
        return faiss.serialize_index(index)


@dataclass(frozen=True)
class _FaissSearch(Search):
    queries: Vectors
    indexes: Shards
    probes: int

    def search(self, queries: range, part: int) -> np.ndarray:
        index = _faiss(self.parts[-1].stop).deserialize_index(np.array(self.indexes[part]))
        index.nprobe = self.probes
        scores, places = index.search(self.queries[queries.start : queries.stop], self.top_k)
        found = np.full(scores.shape, NOTHING)  # where the lists that were visited hold fewer than top_k
        found["document"][places >= 0] = self.parts[part].start + places[places >= 0]
        found["score"][places >= 0] = scores[places >= 0]
        order = np.lexsort((found["document"], -found["score"]))
        return np.take_along_axis(found, order, axis=1)


def _faiss(documents: int) -> Any:
    try:
        import faiss
    except ImportError:
        raise InputError(
            f"{documents:,} documents are searched with FAISS: pip install '.[faiss]', "
            "or raise dense.faiss_from for exact search"
        ) from None
    return faiss
