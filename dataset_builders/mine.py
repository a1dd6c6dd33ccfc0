"""scores/ -> mined/: hard negatives that the teacher grades clearly below the positive; and graded pairs for STS.

A row is dropped, with its reason counted, when fewer than `num_negatives` candidates qualify: repeating or inventing
negatives would teach the loss something that no teacher said.

Mining goes through the graded candidates row group by row group, so its memory does not grow with them. It needs no
teacher: the same candidates give other training sets at other margins (see builders.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from common.steps import ParquetStream, read_arrow, read_parquet, row_groups, write_parquet
from dataset_builders.build_record import Build
from dataset_builders.columns import positions_of, take
from dataset_builders.dense import dense_top_k
from dataset_builders.embeddings import Vectors
from dataset_builders.families import Families, read_classes
from dataset_builders.schema import SCORES, STS, mined_schema, to_schema
from dataset_builders.scores import Calibration, PairScorer, count_flat_and_one_hot
from dataset_builders.sources import stable_hash

READ = pa.schema([SCORES.field(name) for name in ("query_id", "document_id", "label", "is_positive")])
ROWS = 1024  # mined rows in a row group: their texts are in memory at once
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
STS_BINS = 10  # equal-width bins of the label
STS_NEIGHBOURS = 64  # how far down a query's nearest queries pairs are looked for
STS_POOL = 10  # pairs graded for each pair wanted


class Mining(Section):
    margin: float = Field(0.95, gt=0, le=1)
    num_negatives: int = Field(7, ge=1, le=1000)  # each is a column of the training set
    strategy: Literal["top", "random"] = "top"
    seed: int = Field(0, ge=0)

    def config_name(self) -> str:
        """What a published set mined so is called.

        >>> Mining(num_negatives=15, margin=0.9, strategy="random").config_name()
        'train-n15-m90-random'
        """
        margin = "" if self.margin == 0.95 else f"-m{100 * self.margin:.10g}"
        seed = f"-s{self.seed}" if self.seed else ""
        strategy = f"-random{seed}" if self.strategy == "random" else ""
        return f"train-n{self.num_negatives}{margin}{strategy}"


class Sts(Section):
    num_rows: int = Field(8000, ge=1)
    seed: int = Field(0, ge=0)


def select_negatives(
    labels: np.ndarray,
    positive_label: float,
    forbidden: np.ndarray | None = None,
    *,
    margin: float = 0.95,
    num_negatives: int = 7,
    strategy: str = "top",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Positions of one row's negatives among its candidates, highest label first; fewer when fewer qualify.

    A candidate qualifies iff label < margin * positive_label (NV-Retriever's TopK-PercPos) and it is not
    `forbidden` (labelled positives, exact and near duplicates of one, documents of its class). `top` takes the
    highest labels, ties in the order given; `random` draws evenly with `rng`. Labels are calibrated, in (0, 1): a
    ratio of raw scores turns round where they are negative, so those are refused with ValueError.

    >>> select_negatives(np.array([0.9, 0.2, 0.7, 0.86, 0.8]), 0.9, num_negatives=2)
    array([4, 2])
    """
    labels = np.asarray(labels)
    if not 0 < positive_label < 1 or np.any(~((labels > 0) & (labels < 1))):
        raise ValueError("labels must lie in (0, 1); calibrate raw teacher scores first")
    qualifies = labels < margin * positive_label
    if forbidden is not None:
        qualifies &= ~np.asarray(forbidden, bool)
    positions = np.flatnonzero(qualifies)
    if strategy == "random" and len(positions) > num_negatives:
        if rng is None:
            raise ValueError("strategy 'random' needs an rng")
        positions = np.sort(rng.choice(positions, num_negatives, replace=False))
    return positions[np.argsort(-labels[positions], kind="stable")][:num_negatives]


def choose_negatives(
    mining: Mining, labels: np.ndarray, place: int, ruled_out: np.ndarray, query_id: str, positive_id: str
) -> np.ndarray:
    """`select_negatives` for the row whose positive stands at `place`: all that `mining` asks for, or none.

    What is drawn is decided by the seed and the row's ids, so other rows do not change it.
    """
    rng = None
    if mining.strategy == "random":
        rng = np.random.default_rng(stable_hash(mining.seed, query_id, positive_id))
    chosen = select_negatives(
        labels,
        labels[place],
        ruled_out,
        margin=mining.margin,
        num_negatives=mining.num_negatives,
        strategy=mining.strategy,
        rng=rng,
    )
    return chosen if len(chosen) == mining.num_negatives else chosen[:0]


def write_mined(build: Build, folder: Path) -> dict[str, Any]:
    """Write mined.parquet into `folder`; returns the counts for the manifest."""
    mining, tally = build.recipe.mining, Tally()
    with ParquetStream(folder / "mined.parquet", mined_schema(mining.num_negatives)) as stream:
        for table in mine(read_graded(build.corpus, build.scores), mining, tally):
            stream.write(table)
    return tally.facts()


@dataclass(frozen=True)
class Graded:
    """Graded candidates, and what mining must know of their texts."""

    scores: Sequence[Path]  # Parquet files with the columns of READ; queries in id order, none in two row groups
    documents: pa.Table  # DOCUMENTS in id order, memory-mapped
    queries: pa.Table  # QUERIES in id order
    groups: pa.Table  # document_id, group: documents that share one are near duplicates
    classes: pa.Table  # document_id, class: documents that share one are positives of each other

    def blocks(self) -> Iterator[pa.Table]:
        """The graded candidates of some queries at a time."""
        total = sum(_count_rows(path) for path in self.scores)
        with tqdm(total=total, desc="mine", unit=" candidates", unit_scale=True) as progress:
            for path in self.scores:
                for block in row_groups(path, READ.names):
                    if len(block):  # no retriever may have found anything for some queries
                        yield _checked(block, str(path))
                    progress.update(len(block))


def _count_rows(path: Path) -> int:
    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable Parquet file: {error}") from None


def _checked(block: pa.Table, where: str) -> pa.Table:
    for name in READ.names:
        if name not in block.column_names:
            raise InputError(f"{where}: no column {name!r}; it has {', '.join(block.column_names)}")
    block = to_schema(block, READ, where)
    labels = block["label"].to_numpy()
    outside = np.flatnonzero(~((labels > 0) & (labels < 1)))
    if len(outside):
        query_id = block["query_id"][outside[0]].as_py()
        raise InputError(f"{where}: label {labels[outside[0]]} of query {query_id!r} is outside (0, 1); grade again")
    return block


def read_graded(corpus: Path, scores: Path) -> Graded:
    return Graded(
        [scores / "scores.parquet"],
        read_arrow(corpus / "documents.arrow", ["document_id", "text"]),
        read_parquet(corpus / "queries.parquet", ["query_id", "text"]),
        read_parquet(corpus / "groups.parquet", ["document_id", "group"]),
        read_classes(corpus),
    )


@dataclass
class Tally:
    """What became of the rows (a query and one of its positives) and of their candidates."""

    counts: Counter[str] = field(default_factory=Counter)
    qualifying: Counter[int] = field(default_factory=Counter)  # candidates that qualify -> rows
    rows_per_query: Counter[int] = field(default_factory=Counter)  # rows kept -> queries
    label_sums: np.ndarray = field(default_factory=lambda: np.zeros(2))  # of positives, of negatives

    def add_block(self, block: Block) -> None:
        """Why candidates were ruled out; each counts once for every row of its query."""
        positives, duplicates, of_class = (
            np.add.reduceat(flags.astype(np.int64), block.bounds[:-1])
            for flags in (block.is_positive, block.is_duplicate, block.shares_class)
        )
        self.counts["candidates"] += int(positives @ (np.diff(block.bounds) - 1))
        self.counts["is_other_positive"] += int(positives @ (positives - 1))
        self.counts["is_duplicate_of_positive"] += int(positives @ duplicates)
        self.counts["shares_class"] += int(positives @ of_class)

    def add_rows(self, labels: np.ndarray) -> None:
        """(rows, 1 + negatives) labels of rows that were kept."""
        self.counts["rows"] += len(labels)
        self.counts["negatives"] += labels[:, 1:].size
        self.label_sums += labels[:, 0].sum(dtype=np.float64), labels[:, 1:].sum(dtype=np.float64)
        self.counts.update(count_flat_and_one_hot(labels.ravel(), np.arange(len(labels)) * labels.shape[1]))

    def facts(self) -> dict[str, Any]:
        """For a manifest. `candidates` counts every candidate of every row once, under the first name that holds."""
        rows, negatives = self.counts["rows"], self.counts["negatives"]
        names = ("is_other_positive", "is_duplicate_of_positive", "shares_class")
        ruled_out = {name: self.counts[name] for name in names}
        qualifies = sum(count * rows_with for count, rows_with in self.qualifying.items())
        fails_margin = self.counts["candidates"] - sum(ruled_out.values()) - qualifies
        return {
            "rows": rows,
            "negatives": negatives,
            "rows_dropped": {name: self.counts[name] for name in ("too_few_negatives", "no_qualifying_candidate")},
            "candidates": {**ruled_out, "fails_margin": fails_margin, "qualifies": qualifies},
            "yield": {
                "qualifying_per_row": quantiles(self.qualifying),
                "rows_per_query": quantiles(self.rows_per_query),
            },
            "mean_label": {
                "positive": round(float(self.label_sums[0]) / rows, 4),
                "negative": round(float(self.label_sums[1]) / negatives, 4),
            },
            "flat_rows": self.counts["flat_rows"],
            "one_hot_rows": self.counts["one_hot_rows"],
        }


def quantiles(histogram: Counter[int]) -> dict[str, int]:
    """Of the values that a histogram counts: the smallest one that the share does not exceed.

    >>> quantiles(Counter({0: 1, 5: 8, 90: 1}))
    {'min': 0, 'p10': 0, 'median': 5, 'p90': 5, 'max': 90}
    """
    values = np.array(sorted(histogram))
    cumulated = np.cumsum([histogram[value] for value in values.tolist()])
    places = [np.searchsorted(cumulated, share * cumulated[-1] - 1e-9) for share in QUANTILES.values()]
    return {name: int(values[place]) for name, place in zip(QUANTILES, places, strict=True)}


def mine(graded: Graded, mining: Mining, tally: Tally) -> Iterator[pa.Table]:
    """Rows of `mined_schema`, at most ROWS at a time: one for each labelled positive with enough negatives.

    Raises InputError when no row is left, and for candidates that are not as `Graded` says.
    """
    document_ids = graded.documents["document_id"]
    near_duplicates = Families.of(graded.groups, "group", document_ids)
    classes = Families.of(graded.classes, "class", document_ids)
    last_query: list[str] = []
    for table in graded.blocks():
        block = Block.of(table, document_ids, near_duplicates, classes)
        query_ids = block.query_ids.to_pylist()
        for before, after in pairwise([*last_query, *query_ids]):
            if after <= before:  # half of a query's candidates would be mined as if they were all
                raise InputError(
                    f"{graded.scores[0].parent}: candidates of query {after!r} come after those of {before!r}, or in "
                    "two row groups; they must be together, in the order of query ids"
                )
        last_query = query_ids[-1:]
        places = _mine_block(block, mining, document_ids, tally)
        for start in range(0, len(places), ROWS):
            part = places[start : start + ROWS]
            tally.add_rows(block.labels[part])
            yield _with_texts(part, block, graded)
    if not tally.counts["rows"]:
        considered = sum(tally.qualifying.values())
        raise InputError(
            f"{graded.scores[0].parent}: none of {considered} rows has {mining.num_negatives} negatives below margin "
            f"{mining.margin}; raise --margin, lower --num_negatives or raise the candidates' top_k"
        )


@dataclass(frozen=True)
class Block:
    """The graded candidates of some queries: one value for each candidate, unless said otherwise."""

    query_ids: pa.Array  # one for each query
    bounds: np.ndarray  # query i's candidates are bounds[i]:bounds[i + 1]
    positions: np.ndarray  # of the document in documents.arrow
    labels: np.ndarray  # float32
    is_positive: np.ndarray
    is_duplicate: np.ndarray  # of one of the query's positives
    shares_class: np.ndarray  # with one of the query's positives, and is no near duplicate

    @classmethod
    def of(cls, table: pa.Table, document_ids: pa.ChunkedArray, near_duplicates: Families, classes: Families) -> Block:
        query_ids = table["query_id"].combine_chunks()
        starts = np.flatnonzero(np.r_[True, pc.not_equal(query_ids[1:], query_ids[:-1]).to_numpy(False)])
        bounds = np.r_[starts, len(table)]
        queries = np.repeat(np.arange(len(starts)), np.diff(bounds))
        labels, is_positive = table["label"].to_numpy(), table["is_positive"].to_numpy()
        positions = positions_of(table["document_id"].combine_chunks(), document_ids, "graded candidates")
        is_duplicate = near_duplicates.meet_positive(queries, positions, is_positive) & ~is_positive
        shares_class = classes.meet_positive(queries, positions, is_positive) & ~is_positive & ~is_duplicate
        query_ids = query_ids.take(pa.array(starts))
        return cls(query_ids, bounds, positions, labels, is_positive, is_duplicate, shares_class)


def _mine_block(block: Block, mining: Mining, document_ids: pa.ChunkedArray, tally: Tally) -> np.ndarray:
    """(rows kept, 1 + num_negatives) places in the block: the positive, then its negatives."""
    forbidden = block.is_positive | block.is_duplicate | block.shares_class
    positive_rows = np.flatnonzero(block.is_positive)
    positive_ids = dict(
        zip(positive_rows, take(document_ids, block.positions[positive_rows]).to_pylist(), strict=True)
    )
    kept = []
    for query_id, start, stop in zip(block.query_ids.to_pylist(), block.bounds[:-1], block.bounds[1:], strict=True):
        labels, ruled_out = block.labels[start:stop], forbidden[start:stop]
        rows_before = len(kept)
        for place in np.flatnonzero(block.is_positive[start:stop]):
            qualifying = int(np.count_nonzero((labels < mining.margin * labels[place]) & ~ruled_out))
            tally.qualifying[qualifying] += 1
            chosen = choose_negatives(mining, labels, place, ruled_out, query_id, positive_ids[start + place])
            if len(chosen):
                kept.append(start + np.r_[place, chosen])
            else:
                tally.counts["too_few_negatives" if qualifying else "no_qualifying_candidate"] += 1
        tally.rows_per_query[len(kept) - rows_before] += 1
    tally.add_block(block)
    return np.array(kept, np.int64).reshape(len(kept), mining.num_negatives + 1)


def _with_texts(places: np.ndarray, block: Block, graded: Graded) -> pa.Table:
    """`mined_schema` rows from their (rows, 1 + negatives) places in a block."""
    rows, width = places.shape
    positions = block.positions[places]
    query_ids = block.query_ids.take(pa.array(np.searchsorted(block.bounds, places[:, 0], "right") - 1))
    queries = positions_of(query_ids, graded.queries["query_id"], "graded candidates")
    ids, texts = graded.documents["document_id"], graded.documents["text"]
    columns = [
        query_ids,
        take(ids, positions[:, 0]),
        _lists(take(ids, positions[:, 1:].ravel()), rows),
        take(graded.queries["text"], queries),
        *(take(texts, positions[:, column]) for column in range(width)),
        _lists(pa.array(block.labels[places].ravel()), rows),
    ]
    return pa.table(columns, schema=mined_schema(width - 1))


def _lists(values: pa.Array, rows: int) -> pa.ListArray:
    """`rows` lists of equal length."""
    return pa.ListArray.from_arrays(np.linspace(0, len(values), rows + 1).astype(np.int32), values)


def write_sts(build: Build, folder: Path) -> dict[str, Any]:
    """Write sts.parquet into `folder`: pairs of the graded split's queries, spread over the range of labels.

    Neighbours give the upper end of the range and random pairs the lower; the teacher grades both, and its
    calibrated label decides which pairs are kept.
    """
    sts, split, constants = build.recipe.sts, build.splits.split, build.calibration
    graded_split = build.queries_of(split)
    rows = np.array([row for row, query_id in enumerate(build.queries) if query_id in graded_split])
    if len(rows) < 2:
        raise InputError(f"sts: split {split!r} has {len(rows)} query; a pair needs two")
    texts = list(build.queries.values())
    pool = rows[_sts_pool(Selected(build.query_vectors, rows), sts)]
    scorer = PairScorer(build.recipe.teacher, build.cache, build.engine, texts, texts, symmetric=True)
    labels = Calibration(constants["a"], constants["b"])(scorer.scores(pool, folder))
    chosen = spread_over_bins(labels, sts.num_rows, np.random.default_rng(sts.seed))
    left, right = ([texts[query] for query in side] for side in pool[chosen].T)
    write_parquet(folder / "sts.parquet", pa.table([left, right, pa.array(labels[chosen])], schema=STS))
    return {"rows": len(chosen), "pairs_graded": len(pool), "rows_by_label_bin": count_by_bin(labels[chosen])}


@dataclass(frozen=True)
class Selected:
    """Some rows of vectors on disk, read when they are asked for."""

    vectors: Vectors
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        return self.vectors[self.rows[rows]]


def spread_over_bins(labels: np.ndarray, num_rows: int, rng: np.random.Generator) -> np.ndarray:
    """Positions of `num_rows` labels in (0, 1), as evenly over ten equal bins as their numbers allow, in order.

    >>> spread_over_bins(np.array([0.01, 0.02, 0.03, 0.55, 0.99]), 3, np.random.default_rng(0))[1:].tolist()
    [3, 4]
    """
    order = rng.permutation(len(labels))
    # the first of every bin, then the second of every bin, ...: short bins simply run out
    bins = _bins(labels[order])
    turn = np.empty(len(labels), np.int64)
    for number in range(STS_BINS):
        members = np.flatnonzero(bins == number)
        turn[members] = np.arange(len(members))
    return np.sort(order[np.argsort(turn, kind="stable")[:num_rows]])


def count_by_bin(labels: np.ndarray) -> list[int]:
    """How many labels lie in each tenth of (0, 1)."""
    return np.bincount(_bins(labels), minlength=STS_BINS).tolist()


def _bins(labels: np.ndarray) -> np.ndarray:
    return np.minimum((labels * STS_BINS).astype(np.int64), STS_BINS - 1)


def _sts_pool(vectors: np.ndarray | Selected, sts: Sts) -> np.ndarray:
    """(n, 2) different pairs of positions: half of them neighbours, nearest first, half of them random."""
    rng = np.random.default_rng(sts.seed)
    count, wanted = len(vectors), STS_POOL * sts.num_rows // 2
    far = rng.integers(count, size=(wanted, 2))
    # of more queries than pairs are wanted, a sample with one neighbour each: every query would be compared with all
    anchors = np.arange(count) if count <= wanted else np.sort(rng.choice(count, wanted, replace=False))
    depth = min(STS_NEIGHBOURS + 1, count, 2 + wanted // len(anchors))
    nearest, _ = dense_top_k(vectors[anchors], vectors, depth)
    near = np.stack([np.repeat(anchors, depth), nearest.ravel()], axis=1)
    pairs = np.sort(np.concatenate([near, far]), axis=1)
    return np.unique(pairs[pairs[:, 0] != pairs[:, 1]], axis=0)
