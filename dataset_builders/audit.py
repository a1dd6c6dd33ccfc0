"""scores/, mined/ -> audit/: what the graded data are like, measured before anything is trained on them.

One pass over the row groups of scores.parquet and the mined rows of the same queries; each figure is a tally that
every row group is added to, so memory does not grow with the number of queries. What a figure means, and what it
does not, is said where it is computed; dataset_card.md shows them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from common.cli import InputError
from common.steps import row_groups
from dataset_builders.audit_plots import draw
from dataset_builders.build_record import Build
from dataset_builders.columns import positions_of
from dataset_builders.embeddings import Vectors
from dataset_builders.families import Families
from dataset_builders.mine import Block, Mining, choose_negatives, read_graded
from dataset_builders.schema import QRELS, SCORES

MARGINS = (0.90, 0.95, 0.98, 1.0)
LABEL_BINS = 20  # equal-width bins of the label
CUTOFF = 10  # of nDCG
TEMPERATURE = 0.05  # of the cosines: sentence-transformers' scale of 20
PAIRS = 16_384  # vectors gathered at a time


def write_audit(build: Build, folder: Path) -> dict[str, Any]:
    """Write the plots into `folder`; returns the figures for the manifest."""
    mining, vectors = build.recipe.mining, (build.query_vectors, build.document_vectors)
    tallies = {
        "mined_rows": MinedRows(mining.margin, len(build.documents)),
        "labels": Labels(),
        "false_negatives": FalseNegatives(mining),
        "found_by": FoundBy(),
        "negative_quality": NegativeQuality(mining, *vectors, list(build.queries)),
        "ndcg_at_10": Ndcg(build.corpus / "qrels.parquet", build.splits.split),
    }
    for part in read_parts(build.corpus, build.scores, build.mined):
        for tally in tallies.values():
            tally.add(part)
    figures = {name: tally.facts() for name, tally in tallies.items()}
    plots = draw(figures, mining.margin, build.calibration.get("reliability"))
    for name, plot in plots.items():
        # without the writing library's name and version the same figures give the same bytes
        plot.savefig(folder / name, metadata={"Software": None})
    return {**figures, "plots": list(plots)}


@dataclass(frozen=True)
class Part:
    """The graded candidates of some queries, and the rows mined from them."""

    block: Block
    table: pa.Table  # SCORES, row for row with the block
    mined: np.ndarray  # (rows, 1 + num_negatives) places in the block: the positive, then its negatives
    near_duplicates: Families

    def queries(self) -> Iterator[slice]:
        """Where each query's candidates are."""
        for start, stop in zip(self.block.bounds[:-1].tolist(), self.block.bounds[1:].tolist(), strict=True):
            yield slice(start, stop)

    def query_of(self, places: np.ndarray) -> np.ndarray:
        """The number of the query that each place in the block belongs to."""
        return np.searchsorted(self.block.bounds, places, side="right") - 1

    def column(self, name: str) -> np.ndarray:
        """A column of SCORES as floats; NaN for null."""
        return self.table[name].cast(pa.float64()).to_numpy()

    @cached_property
    def document_ids(self) -> pa.Array:
        return self.table["document_id"].combine_chunks()

    @cached_property
    def retrieved(self) -> np.ndarray:
        return self.table["rrf_rank"].is_valid().to_numpy()

    @cached_property
    def forbidden(self) -> np.ndarray:
        return self.block.is_positive | self.block.is_duplicate | self.block.shares_class


def read_parts(corpus: Path, scores: Path, mined: Path) -> Iterator[Part]:
    """One part for each row group of scores.parquet."""
    graded = read_graded(corpus, scores)
    document_ids = graded.documents["document_id"]
    near_duplicates = Families.of(graded.groups, "group", document_ids)
    classes = Families.of(graded.classes, "class", document_ids)
    path = scores / "scores.parquet"
    with tqdm(total=pq.read_metadata(path).num_rows, desc="audit", unit=" candidates", unit_scale=True) as progress:
        for table in row_groups(path, SCORES.names):
            block = Block.of(table, document_ids, near_duplicates, classes)
            yield Part(block, table, _mined_places(mined / "mined.parquet", block, document_ids), near_duplicates)
            progress.update(len(table))


def rows_of_queries(path: Path, query_ids: pa.Array, columns: Sequence[str]) -> pa.Table:
    """A Parquet file's rows for queries that are in order; only row groups that can hold some are read."""
    first, last = query_ids[0].as_py(), query_ids[-1].as_py()
    return pq.read_table(path, columns=list(columns), filters=[("query_id", ">=", first), ("query_id", "<=", last)])


def _mined_places(path: Path, block: Block, document_ids: pa.ChunkedArray) -> np.ndarray:
    rows = rows_of_queries(path, block.query_ids, ["query_id", "positive_id", "negative_ids"])
    negatives = rows["negative_ids"].combine_chunks()
    width = len(negatives.flatten()) // max(len(rows), 1)
    positions = [
        positions_of(rows["positive_id"].combine_chunks(), document_ids, "the mined positives")[:, None],
        positions_of(negatives.flatten(), document_ids, "the mined negatives").reshape(len(rows), width),
    ]
    queries = pc.index_in(rows["query_id"], block.query_ids).to_numpy()
    wanted = queries[:, None] * len(document_ids) + np.concatenate(positions, axis=1)
    keys = np.repeat(np.arange(len(block.query_ids)), np.diff(block.bounds)) * len(document_ids) + block.positions
    order = np.argsort(keys)
    places = order[np.minimum(np.searchsorted(keys, wanted, sorter=order), len(keys) - 1)]
    if not np.array_equal(keys[places], wanted):
        raise InputError(f"{path}: holds documents that were not graded for their query; mine again")
    return places


# ---- formulas ----------------------------------------------------------------------------------------------------


def wilson(successes: int, trials: int, clusters: int | None = None) -> dict[str, Any]:
    """A share with its 95 % Wilson score interval.

    Trials that share a query are not independent: `clusters`, the number of queries, then stands for the number of
    trials, as if each query were a single trial. That is the widest the interval can be.

    >>> wilson(5, 10)
    {'share': 0.5, 'low': 0.2366, 'high': 0.7634}
    """
    if not trials:
        return {"share": None, "low": None, "high": None}
    z, n, share = 1.959964, clusters or trials, successes / trials
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * np.sqrt(share * (1 - share) / n + z**2 / (4 * n**2))
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return {"share": round(share, 4), "low": round(float(low), 4), "high": round(float(high), 4)}


def leave_one_out(
    labels: np.ndarray, hidden: np.ndarray, known_label: float, margin: float, chosen: np.ndarray
) -> tuple[int, int, int]:
    """Pretend that a query had one labelled positive, of label `known_label`; `hidden` marks its other ones.

    Returns how many hidden positives the margin would let through as negatives, how many negatives were `chosen`
    (positions), and how many of those are hidden positives: false negatives for certain.

    >>> leave_one_out(np.array([0.9, 0.8, 0.3]), np.array([False, True, False]), 0.9, 0.95, np.array([1, 2]))
    (1, 2, 1)
    """
    admitted = hidden & (labels < margin * known_label)
    return int(admitted.sum()), len(chosen), int(hidden[chosen].sum())


def gradient_shares(cosines: np.ndarray, labels: np.ndarray, temperature: float) -> tuple[np.ndarray, np.ndarray]:
    """How hard each row's negatives are for an encoder as it is, and how much of that is safe to learn from.

    cosines, labels: (rows, 1 + negatives), the positive first. InfoNCE's gradient with respect to the cosine s_j of
    negative j is p_j / temperature, p = softmax(s / temperature) over the row's documents (van den Oord et al. 2018,
    arXiv 1807.03748, equation 4 differentiated). Returns, for each row,

        hardness = sum_j p_j              how strongly the row pulls at all: 0 when the encoder already has it right
        useful   = sum_j p_j (1 - y_j)    the part of it that pushes documents away which the teacher finds irrelevant

    (sums over negatives). hardness - useful is the part that pushes relevant documents away, and useful / hardness
    the safety of the negatives. ECI (Sinha et al. 2026, arXiv 2603.20990) asks the same question with other
    formulas; this is not ECI.
    """
    logits = cosines.astype(np.float64) / temperature
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights = (weights / weights.sum(axis=1, keepdims=True))[:, 1:]
    return weights.sum(axis=1), (weights * (1 - labels[:, 1:].astype(np.float64))).sum(axis=1)


def count_found_by(by_bm25: np.ndarray, by_dense: np.ndarray) -> dict[str, int]:
    """Numbers of documents by who retrieved them, from one flag a document for each retriever."""
    return {
        "bm25_only": int((by_bm25 & ~by_dense).sum()),
        "dense_only": int((by_dense & ~by_bm25).sum()),
        "both": int((by_bm25 & by_dense).sum()),
        "neither": int((~by_bm25 & ~by_dense).sum()),
    }


def best_first(queries: np.ndarray, ranks: np.ndarray, cutoff: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of each query's `cutoff` smallest `ranks` (NaN: not in the ranking), and their positions from 0.

    >>> best_first(np.array([0, 0, 0, 1]), np.array([2.0, np.nan, 1.0, 7.0]), 10)
    (array([2, 0, 3]), array([0, 1, 0]))
    """
    order = np.lexsort((ranks, queries))
    order = order[~np.isnan(ranks[order])]
    starts = np.searchsorted(queries[order], queries[order])
    position = np.arange(len(order)) - starts
    return order[position < cutoff], position[position < cutoff]


# ---- tallies: each is added every part, and then gives its facts -------------------------------------------------


class MinedRows:
    """The rows that were mined: queries that gave none, rules broken, and how often a document serves as a negative.

    Rules are checked from the files, so every count of `violations` should be 0. A few documents that are negatives
    in most rows teach little.
    """

    RULES = ("above_margin", "labelled_positive", "near_duplicate", "same_class", "repeated_in_row")

    def __init__(self, margin: float, documents: int) -> None:
        self.margin = margin
        self.queries = self.with_rows = self.rows = 0
        self.violations = dict.fromkeys(self.RULES, 0)
        self.uses = np.zeros(documents, np.int32)

    def add(self, part: Part) -> None:
        block, negatives = part.block, part.mined[:, 1:]
        self.queries += len(block.query_ids)
        self.with_rows += len(np.unique(part.query_of(part.mined[:, 0])))
        self.rows += len(part.mined)
        positions = np.sort(block.positions[part.mined], axis=1)
        broken = (
            block.labels[negatives] >= self.margin * block.labels[part.mined[:, :1]],
            block.is_positive[negatives],
            block.is_duplicate[negatives],
            block.shares_class[negatives],
            positions[:, 1:] == positions[:, :-1],
        )
        for rule, found in zip(self.RULES, broken, strict=True):
            self.violations[rule] += int(found.sum())
        np.add.at(self.uses, block.positions[negatives], 1)

    def facts(self) -> dict[str, Any]:
        used = np.sort(self.uses[self.uses > 0])[::-1]
        negatives = int(used.sum())
        return {
            "queries": self.queries,
            "queries_without_rows": self.queries - self.with_rows,
            "rows": self.rows,
            "violations": self.violations,
            "negatives": negatives,
            "distinct_negatives": len(used),
            "share_distinct": _ratio(len(used), negatives),
            "median_uses": int(np.median(used)) if negatives else 0,
            "most_uses": int(used.max(initial=0)),
            # of all negatives, by the hundredth of these documents that serves most often
            "share_of_top_percent": _ratio(used[: -(-len(used) // 100)].sum(), negatives),
        }


class Labels:
    """Histograms of the soft label: of labelled positives, of the negatives chosen, of all candidates unlabelled."""

    def __init__(self) -> None:
        self.counts = {name: np.zeros(LABEL_BINS, np.int64) for name in ("positives", "negatives", "candidates")}
        self.sums = dict.fromkeys(self.counts, 0.0)

    def add(self, part: Part) -> None:
        labels = part.block.labels
        chosen = {
            "positives": labels[part.block.is_positive],
            "negatives": labels[part.mined[:, 1:]].ravel(),
            "candidates": labels[~part.block.is_positive],
        }
        for name, values in chosen.items():
            self.counts[name] += np.histogram(values, LABEL_BINS, (0, 1))[0]
            self.sums[name] += float(values.sum(dtype=np.float64))

    def facts(self) -> dict[str, Any]:
        return {
            name: {"count": int(counts.sum()), "mean": _ratio(self.sums[name], counts.sum()), "bins": counts.tolist()}
            for name, counts in self.counts.items()
        }


class FalseNegatives:
    """How many negatives would be false, from queries with several labelled positives: all but one are hidden.

    Hidden positives are what false negatives look like where annotators stopped after the first; whether those of
    other queries look the same, no file can tell.
    """

    def __init__(self, mining: Mining) -> None:
        self.strategies = [replace_margin(mining, margin) for margin in sorted({*MARGINS, mining.margin})]
        self.queries = self.hidden = 0
        self.counts = {mining.margin: Counter[str]() for mining in self.strategies}
        self.has_classes = False

    def add(self, part: Part) -> None:
        self.has_classes |= bool(part.block.shares_class.any())
        for query, rows in enumerate(part.queries()):
            positive, retrieved = part.block.is_positive[rows], part.retrieved[rows]
            if positive.sum() > 1 and (positive & retrieved).any() and not self.has_classes:
                self.hidden += self._add_query(part, query, rows)
                self.queries += 1

    def _add_query(self, part: Part, query: int, rows: slice) -> int:
        labels, positive = part.block.labels[rows], part.block.is_positive[rows]
        # a positive that nobody labelled is a candidate only where a retriever found it
        absent = positive & ~part.retrieved[rows]
        with_rows = set()
        total = 0
        for place in np.flatnonzero(positive):
            known = np.arange(len(labels)) == place
            hidden = positive & ~known & ~absent
            total += int(hidden.sum())
            same = np.zeros(len(labels), np.int64)
            twins = part.near_duplicates.meet_positive(same, part.block.positions[rows], known)
            for mining in self.strategies:
                chosen = choose(mining, part, query, rows.start + place, known | twins | absent)
                counts = self.counts[mining.margin]
                admitted, negatives, false = leave_one_out(labels, hidden, labels[place], mining.margin, chosen)
                counts.update(admitted=admitted, negatives=negatives, false=false, rows=int(negatives > 0))
                if negatives and mining.margin not in with_rows:
                    with_rows.add(mining.margin)
                    counts["queries"] += 1
        return total

    def facts(self) -> dict[str, Any]:
        if self.has_classes:
            return {"reason": "documents of one class are never each other's negatives", "by_margin": []}
        if not self.hidden:
            return {"reason": "no query has two labelled positives of which one was retrieved", "by_margin": []}
        return {
            "reason": None,
            "queries": self.queries,
            "hidden": self.hidden,
            "by_margin": [
                {
                    "margin": margin,
                    "admitted": wilson(counts["admitted"], self.hidden, self.queries),
                    "rows": counts["rows"],
                    "negatives": counts["negatives"],
                    "among_negatives": wilson(counts["false"], counts["negatives"], counts["queries"]),
                }
                for margin, counts in self.counts.items()
            ],
        }


class FoundBy:
    """Which retriever found the candidates, the labelled positives and the negatives chosen."""

    def __init__(self) -> None:
        self.counts = {name: Counter[str]() for name in ("candidates", "positives", "negatives")}

    def add(self, part: Part) -> None:
        by_bm25, by_dense = (part.table[f"{name}_rank"].is_valid().to_numpy() for name in ("bm25", "dense"))
        places = {
            "candidates": np.flatnonzero(part.retrieved),
            "positives": np.flatnonzero(part.block.is_positive),
            "negatives": part.mined[:, 1:].ravel(),
        }
        for name, rows in places.items():
            self.counts[name].update(count_found_by(by_bm25[rows], by_dense[rows]))

    def facts(self) -> dict[str, Any]:
        return {
            name: {"count": counts.total(), **{key: _ratio(count, counts.total()) for key, count in counts.items()}}
            for name, counts in self.counts.items()
        }


class NegativeQuality:
    """`gradient_shares` of the mined rows, and of what other strategies would have taken from the same candidates."""

    def __init__(self, mining: Mining, queries: Vectors, documents: Vectors, query_ids: Sequence[str]) -> None:
        others = (
            mining.model_copy(update={"strategy": "random" if mining.strategy == "top" else "top"}),
            replace_margin(mining, 1.0),
        )
        self.strategies = [mining, *(other for other in others if other != mining)]
        self.sums = [np.zeros(3) for _ in self.strategies]  # rows, hardness, useful
        self.queries, self.documents = queries, documents
        self.query_ids = pa.array(query_ids)

    def add(self, part: Part) -> None:
        self._add_rows(0, part, part.mined)
        for number, mining in enumerate(self.strategies[1:], start=1):
            self._add_rows(number, part, choose_all(mining, part))

    def _add_rows(self, number: int, part: Part, places: np.ndarray) -> None:
        asked = pc.index_in(part.block.query_ids, self.query_ids).to_numpy()
        step = max(PAIRS // max(places.shape[1], 1), 1)
        for start in range(0, len(places), step):
            rows = places[start : start + step]
            queries = asked[part.query_of(rows[:, 0])]
            documents = unit(self.documents[part.block.positions[rows].ravel()]).reshape(*rows.shape, -1)
            cosines = np.einsum("rd,rnd->rn", unit(self.queries[queries]), documents)
            hardness, useful = gradient_shares(cosines, part.block.labels[rows], TEMPERATURE)
            self.sums[number] += len(rows), hardness.sum(), useful.sum()

    def facts(self) -> dict[str, Any]:
        return {
            "temperature": TEMPERATURE,
            "strategies": [
                {
                    "strategy": mining.strategy,
                    "margin": mining.margin,
                    "rows": int(rows),
                    "hardness": _ratio(hardness, rows),
                    "useful": _ratio(useful, rows),
                    "safety": _ratio(useful, hardness),
                }
                for mining, (rows, hardness, useful) in zip(self.strategies, self.sums, strict=True)
            ],
        }


class Ndcg:
    """nDCG@10 of the graded split's queries, by ranking: what fusion adds to the retrievers, and the teacher to both.

    Only retrieved candidates are ranked, and unlabelled ones count as irrelevant, unless they share the positive's
    class. A retriever's list is cut where
    fusion dropped some of it: where that touches its first ten, its figure is null.
    """

    RANKINGS = ("bm25", "dense", "rrf", "graded")

    def __init__(self, qrels: Path, split: str) -> None:
        self.qrels, self.split = qrels, split
        self.sums = dict.fromkeys(self.RANKINGS, 0.0)
        self.cut = dict.fromkeys(self.RANKINGS, 0)
        self.queries = 0

    def add(self, part: Part) -> None:
        queries = part.query_of(np.arange(len(part.table)))
        qrels = self._qrels(part)
        self.queries += len(qrels)
        order = np.lexsort((part.column("rrf_rank"), -part.column("teacher_score")))
        graded = np.full(len(queries), np.nan)
        graded[order] = np.arange(len(queries))
        graded[~part.retrieved] = np.nan
        for name in self.RANKINGS:
            ranks = graded if name == "graded" else part.column(f"{name}_rank")
            places, positions = best_first(queries, ranks, CUTOFF)
            if name != "graded":
                self.cut[name] += len(np.unique(queries[places[ranks[places] - 1 > positions]]))
            self.sums[name] += sum_of_ndcg(qrels, self._run(part, queries, places, positions))

    def _qrels(self, part: Part) -> dict[str, dict[str, int]]:
        rows = rows_of_queries(self.qrels, part.block.query_ids, QRELS.names)
        rows = rows.filter((pc.field("split") == self.split) & pc.is_in(pc.field("query_id"), part.block.query_ids))
        found: dict[str, dict[str, int]] = {query_id: {} for query_id in part.block.query_ids.to_pylist()}
        columns = (rows[name].to_pylist() for name in ("query_id", "document_id", "score"))
        for query_id, document_id, score in zip(*columns, strict=True):
            found[query_id][document_id] = score
        for place in np.flatnonzero(part.block.shares_class):
            query = np.searchsorted(part.block.bounds, place, side="right") - 1
            found[part.block.query_ids[int(query)].as_py()][part.document_ids[int(place)].as_py()] = 1
        return found

    def _run(
        self, part: Part, queries: np.ndarray, places: np.ndarray, positions: np.ndarray
    ) -> dict[str, dict[str, float]]:
        run: dict[str, dict[str, float]] = {query_id: {} for query_id in part.block.query_ids.to_pylist()}
        query_ids = part.block.query_ids.take(pa.array(queries[places])).to_pylist()
        document_ids = part.document_ids.take(pa.array(places)).to_pylist()
        for query_id, document_id, position in zip(query_ids, document_ids, positions.tolist(), strict=True):
            run[query_id][document_id] = -float(position)
        return run

    def facts(self) -> dict[str, Any]:
        return {
            "queries": self.queries,
            **{name: None if self.cut[name] else _ratio(self.sums[name], self.queries) for name in self.RANKINGS},
        }


def sum_of_ndcg(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> float:
    """nDCG@10 summed over queries, by ir_measures. A query for which nothing was found counts 0."""
    import ir_measures

    measure = ir_measures.parse_measure(f"nDCG@{CUTOFF}")
    values = {metric.query_id: metric.value for metric in ir_measures.iter_calc([measure], qrels, run)}
    return float(sum(values.get(query_id, 0.0) for query_id in qrels))


def replace_margin(mining: Mining, margin: float) -> Mining:
    return mining.model_copy(update={"margin": margin})


def choose(mining: Mining, part: Part, query: int, place: int, forbidden: np.ndarray) -> np.ndarray:
    """The candidates of `query` that mining would choose for its positive at `place`: none when too few qualify."""
    rows = slice(*part.block.bounds[query : query + 2])
    ids = part.block.query_ids[query].as_py(), part.document_ids[place].as_py()
    return choose_negatives(mining, part.block.labels[rows], place - rows.start, forbidden, *ids)


def choose_all(mining: Mining, part: Part) -> np.ndarray:
    """(rows, 1 + num_negatives) places in the block, as mining would choose them."""
    found = []
    for query, rows in enumerate(part.queries()):
        for place in rows.start + np.flatnonzero(part.block.is_positive[rows]):
            chosen = choose(mining, part, query, place, part.forbidden[rows])
            if len(chosen):
                found.append(np.r_[place, rows.start + chosen])
    return np.array(found, np.int64).reshape(len(found), 1 + mining.num_negatives)


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows at unit length; a row of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _ratio(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None
