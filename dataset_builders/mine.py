"""scores/ -> mined/: hard negatives that the teacher grades clearly below the positive.

A row is a query and one of its labelled positives. Where fewer than `num_negatives` candidates qualify the row is
dropped and counted: a repeated or invented negative would teach what no teacher said. All labelled positives of a
query go along in positives.parquet, so that training never takes one for an in-batch negative.

Candidates are read one row group (1,024 queries) at a time, so memory does not grow with their number. Mining needs
no teacher: the same grades give other training sets at other margins (see builders.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field
from tqdm import tqdm

from common.cli import InputError
from common.recipes import Section
from common.steps import parquet_writer, read_arrow, read_parquet, row_groups, write_parquet
from dataset_builders.calibration import count_flat_and_one_hot
from dataset_builders.columns import positions_of, take
from dataset_builders.schema import CLASSES, GROUPS, POSITIVES, mined_schema
from dataset_builders.sources import stable_hash

if TYPE_CHECKING:
    from dataset_builders.build_record import Build

READ = ("query_id", "document_id", "label", "is_positive")
ROWS = 1024  # mined rows in a row group: their texts are held together
QUANTILES = {"min": 0.0, "p10": 0.1, "median": 0.5, "p90": 0.9, "max": 1.0}
# Why a candidate cannot be a negative of its query; the first that holds is counted.
REASONS = ("is_other_positive", "is_duplicate_of_positive", "shares_class", "graded_above_positive")


class Mining(Section):
    """Which graded candidates become a row's negatives. See `threshold` and `select_negatives`.

    margin_type: ratio, below margin * positive's label (the report's); absolute, below positive's label - margin;
    none, whatever the label; flipped_control, the inequality as the report prints it, the wrong way round, which is no
    data to train on. relabel: candidates graded above all labelled positives are most likely relevant themselves;
    exclude makes them no negatives of their query in a batch either, promote makes them positives with rows of their
    own, as ARHN (arXiv 2604.11092) relabels.
    """

    margin: float = Field(0.95, gt=0, le=1)  # a negative's label is below so much of the positive's
    # of that label, or absolute: so far below it; none: whatever the label; flipped_control: not below it
    margin_type: Literal["ratio", "absolute", "none", "flipped_control"] = "ratio"
    num_negatives: int = Field(7, ge=1, le=1000)  # each is a column of the training set
    strategy: Literal["top", "random"] = "top"  # the highest labels, or any below the margin
    skip: int = Field(0, ge=0)  # so many candidates that qualify, highest label first, are passed over
    relabel: Literal["none", "exclude", "promote"] = "none"  # of candidates graded above every labelled positive
    seed: int = Field(0, ge=0)  # of strategy random

    def threshold(self, positive_label: Any) -> Any:
        """The label that a negative stays below; for an array, a float or an expression of polars."""
        margin = pl.lit(self.margin, pl.Float32) if isinstance(positive_label, pl.Expr) else self.margin
        return positive_label - margin if self.margin_type == "absolute" else margin * positive_label

    def config_name(self) -> str:
        """The name of the published training set that is mined with these settings.

        >>> Mining(num_negatives=15, margin=0.9, strategy="random").config_name()
        'train-n15-m90-random'
        """
        margin = "" if self.margin == 0.95 else f"-m{100 * self.margin:.10g}"
        kind = "" if self.margin_type == "ratio" else f"-{self.margin_type}"
        skip = f"-skip{self.skip}" if self.skip else ""
        relabel = "" if self.relabel == "none" else f"-{self.relabel}"
        seed = f"-s{self.seed}" if self.seed else ""
        strategy = f"-random{seed}" if self.strategy == "random" else ""
        return f"train-n{self.num_negatives}{margin}{kind}{skip}{relabel}{strategy}"


def select_negatives(
    labels: np.ndarray,
    positive_label: float,
    forbidden: np.ndarray | None = None,
    *,
    margin: float = 0.95,
    margin_type: str = "ratio",
    num_negatives: int = 7,
    strategy: str = "top",
    skip: int = 0,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Positions of one row's negatives among its candidates, highest label first; fewer when fewer qualify.

    A candidate qualifies iff label < margin * positive_label (NV-Retriever's TopK-PercPos; `margin_type` has others,
    see `Mining`) and it is not `forbidden` (labelled positives, exact and near duplicates of one, documents of its
    class). The `skip` highest that qualify are passed over; of the others `top` takes the highest labels, ties in the
    order given, and `random` draws evenly with `rng`. Labels are calibrated, in (0, 1): the margin as a ratio means
    nothing for raw scores, which may be negative, so those raise ValueError.

    >>> select_negatives(np.array([0.9, 0.2, 0.7, 0.86, 0.8]), 0.9, num_negatives=2)
    array([4, 2])
    """
    labels = np.asarray(labels)
    if not 0 < positive_label < 1 or np.any(~((labels > 0) & (labels < 1))):
        raise ValueError("labels must lie in (0, 1); calibrate raw teacher scores first")
    keys = {"margin": margin, "margin_type": margin_type, "num_negatives": num_negatives}
    mining = Mining(**keys, strategy=strategy, skip=skip)
    allowed = np.ones(len(labels), bool) if forbidden is None else ~np.asarray(forbidden, bool)
    return _choose(_qualifying(labels, positive_label, allowed, mining), labels, mining, rng)


def _qualifying(labels: np.ndarray, positive_label: float, allowed: np.ndarray, mining: Mining) -> np.ndarray:
    """Positions of the candidates that may be negatives of a row, highest label first, without those passed over."""
    if mining.margin_type != "none":
        below = labels < mining.threshold(positive_label)
        allowed = allowed & (~below if mining.margin_type == "flipped_control" else below)
    positions = np.flatnonzero(allowed)
    return positions[np.argsort(-labels[positions], kind="stable")][mining.skip :]


def _choose(positions: np.ndarray, labels: np.ndarray, mining: Mining, rng: np.random.Generator | None) -> np.ndarray:
    if mining.strategy == "random" and len(positions) > mining.num_negatives:
        if rng is None:
            raise ValueError("strategy 'random' needs an rng")
        positions = np.sort(rng.choice(np.sort(positions), mining.num_negatives, replace=False))
        positions = positions[np.argsort(-labels[positions], kind="stable")]
    return positions[: mining.num_negatives]


def write_mined(build: Build, folder: Path) -> dict[str, Any]:
    """Write mined.parquet and positives.parquet into `folder`; returns the counts for the manifest."""
    mining, tally = build.recipe.mining, Tally()
    graded = read_graded(build.corpus, build.scores)
    with parquet_writer(folder / "mined.parquet", mined_schema(mining.num_negatives)) as writer:
        for table in mine(graded, mining, tally):
            writer.write(table)
    qrels = pl.from_arrow(read_parquet(build.corpus / "qrels.parquet")).filter(split=build.splits.split)
    positives = known_positives(graded, qrels, tally.relabelled)
    if len(positives):
        write_parquet(folder / "positives.parquet", positives)
    return tally.facts()


@dataclass(frozen=True)
class Graded:
    """Graded candidates, and the texts and groups that mining needs. Documents and queries are in id order."""

    scores: Sequence[Path]  # Parquet files with the columns of SCORES; queries in id order, each in one row group
    documents: pa.Table  # document_id, text; memory-mapped
    queries: pa.Table  # query_id, text
    groups: pl.DataFrame  # document_id, group: documents that share one are near duplicates
    classes: pl.DataFrame  # document_id, class: documents that share one are positives of each other

    def blocks(self, relabel: str, columns: Sequence[str] = READ, description: str = "mine") -> Iterator[pl.DataFrame]:
        """The candidates of some queries at a time, relabelled: `columns`, and `ruled_out` (see `rule_out`)."""
        last = ""
        with tqdm(total=_count_rows(self.scores), desc=description, unit=" candidates", unit_scale=True) as progress:
            for path in self.scores:
                for table in row_groups(path, list(columns)):
                    block = pl.from_arrow(table)
                    _check(block, last, path)
                    last = block["query_id"].last() or last
                    if len(block):  # retrievers may have found nothing for all queries of a row group
                        yield relabelled(block, self.groups, self.classes, relabel)
                    progress.update(len(block))


def read_graded(corpus: Path, scores: Path) -> Graded:
    return Graded(
        [scores / "scores.parquet"],
        read_arrow(corpus / "documents.arrow", ["document_id", "text"]),
        read_parquet(corpus / "queries.parquet", ["query_id", "text"]),
        pl.from_arrow(read_parquet(corpus / "groups.parquet", GROUPS.names)),
        read_classes(corpus),
    )


def read_classes(corpus: Path) -> pl.DataFrame:
    path = corpus / "classes.parquet"
    return pl.from_arrow(read_parquet(path, CLASSES.names) if path.exists() else CLASSES.empty_table())


def _count_rows(paths: Sequence[Path]) -> int:
    try:
        return sum(pq.read_metadata(path).num_rows for path in paths)
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{paths[0]}: not a readable Parquet file: {error}") from None


def _check(block: pl.DataFrame, last: str, path: Path) -> None:
    """Raises InputError for labels outside (0, 1), and for queries out of order or not after the query `last`."""
    wrong = block.filter(~pl.col("label").is_between(0, 1, closed="none").fill_null(False))
    if len(wrong):
        query_id, label = wrong.select("query_id", "label").row(0)
        raise InputError(f"{path}: label {label} of query {query_id!r} is outside (0, 1); grade again")
    query_ids = [last, *block["query_id"].rle().struct.field("value")]
    if query_ids != sorted(set(query_ids)):  # a query in two parts would lose some of its candidates
        raise InputError(f"{path}: candidates must be in the order of query ids, those of a query in one row group")


def rule_out(
    candidates: pl.DataFrame, groups: pl.DataFrame, classes: pl.DataFrame, by: str = "query_id"
) -> pl.DataFrame:
    """`candidates` with a column `ruled_out`: which of REASONS keeps one from being a negative of its query, or null.

    Rows with equal `by` are candidates of the same query.
    """
    is_other, is_duplicate, is_of_class, _ = REASONS
    in_group, in_class = (share_with_a_positive(candidates, members, by) for members in (groups, classes))
    reason = pl.when("is_positive").then(pl.lit(is_other)).when(in_group).then(pl.lit(is_duplicate))
    return candidates.with_columns(ruled_out=reason.when(in_class).then(pl.lit(is_of_class)))


def share_with_a_positive(candidates: pl.DataFrame, members: pl.DataFrame, by: str = "query_id") -> pl.Expr:
    """Whether a candidate is in a group or class (`members`: document_id, its name) of a positive of its query."""
    group = members.columns[1]
    named = candidates.with_row_index("place").join(members, on="document_id")
    positives = named.filter("is_positive").select(by, group)
    return pl.int_range(pl.len()).is_in(named.join(positives, on=[by, group], how="semi")["place"].implode())


def relabelled(block: pl.DataFrame, groups: pl.DataFrame, classes: pl.DataFrame, relabel: str) -> pl.DataFrame:
    """`rule_out`, after what `Mining.relabel` makes of candidates that are graded above all of a query's positives."""
    block = rule_out(block, groups, classes)
    if relabel == "none":
        return block
    highest = pl.col("label").filter(pl.col("is_positive")).max().over("query_id")
    is_above = pl.col("ruled_out").is_null() & (pl.col("label") > highest)
    if relabel == "promote":
        return rule_out(block.with_columns(is_positive=pl.col("is_positive") | is_above), groups, classes)
    return block.with_columns(ruled_out=pl.when(is_above).then(pl.lit(REASONS[-1])).otherwise("ruled_out"))


def mine_block(block: pl.DataFrame, mining: Mining, by: str = "query_id") -> tuple[np.ndarray, np.ndarray]:
    """How many candidates qualify for each labelled positive, in order, and the rows of those with enough of them.

    A row holds 1 + num_negatives places in the block: the positive, then its negatives, highest label first. Rows of
    the block with equal `by` are candidates of the same query. A random draw is decided by the seed and the row's ids,
    so other rows do not change it.
    """
    labels, is_positive = block["label"].to_numpy(), block["is_positive"].to_numpy()
    allowed, is_random = block["ruled_out"].is_null().to_numpy(), mining.strategy == "random"
    qualifying, rows = [], []
    for start, stop in pairwise([0, *block[by].rle().struct.field("len").cum_sum()]):
        for place in start + np.flatnonzero(is_positive[start:stop]):
            found = start + _qualifying(labels[start:stop], labels[place], allowed[start:stop], mining)
            qualifying.append(len(found))
            if len(found) >= mining.num_negatives:
                ids = block["query_id"][int(place)], block["document_id"][int(place)]
                rng = np.random.default_rng(stable_hash(mining.seed, *ids)) if is_random else None
                rows.append([place, *_choose(found, labels, mining, rng)])
    return np.array(qualifying, np.int64), np.array(rows, np.int64).reshape(-1, 1 + mining.num_negatives)


def mine(graded: Graded, mining: Mining, tally: Tally) -> Iterator[pa.Table]:
    """Rows of `mined_schema`, at most ROWS at a time.

    Raises InputError when no row is left, and for candidates that are not as `Graded` says.
    """
    for block in graded.blocks(mining.relabel):
        qualifying, rows = mine_block(block, mining)
        tally.add(block, qualifying, rows)
        for start in range(0, len(rows), ROWS):
            yield _with_texts(block, rows[start : start + ROWS], graded)
    if not tally.counts["rows"]:
        raise InputError(
            f"{graded.scores[0].parent}: none of {len(tally.qualifying)} rows has {mining.num_negatives} negatives "
            f"below margin {mining.margin}{f' after the first {mining.skip}' if mining.skip else ''}; raise --margin, "
            "lower --num_negatives or raise the retrievers' top_k"
        )


def _with_texts(block: pl.DataFrame, rows: np.ndarray, graded: Graded) -> pa.Table:
    """`mined_schema` rows from their (rows, 1 + num_negatives) places in the block."""
    query_ids = block["query_id"].gather(rows[:, 0])
    documents = [block["document_id"].gather(places) for places in rows.T]  # positives, first negatives, ...
    table = [
        query_ids.to_arrow(),
        documents[0].to_arrow(),
        _lists(block["document_id"], rows[:, 1:]),
        texts_of(graded.queries, query_ids),
        *(texts_of(graded.documents, ids) for ids in documents),
        _lists(block["label"], rows),
    ]
    schema = mined_schema(rows.shape[1] - 1)
    return pa.table(table, names=schema.names).cast(schema)


def _lists(column: pl.Series, places: np.ndarray) -> pa.Array:
    return column.gather(places.ravel()).reshape(places.shape).arr.to_list().to_arrow()


def texts_of(table: pa.Table, ids: pl.Series) -> pa.Array:
    """The texts of `ids` in a table of ids, in order, and texts. Raises InputError for an id that is not there."""
    return take(table["text"], positions_of(ids.to_arrow().cast(pa.string()), table[0], "graded candidates"))


def known_positives(graded: Graded, qrels: pl.DataFrame, relabelled: Sequence[pl.DataFrame]) -> pa.Table:
    """POSITIVES: of the queries that have two or more, labelled in `qrels` or `relabelled` (see `positives_of`)."""
    found = [qrels.filter(pl.col("score") > 0).select("query_id", "document_id"), *relabelled]
    several = pl.concat(found).unique().filter(pl.len().over("query_id") > 1).sort("query_id", "document_id")
    texts = texts_of(graded.queries, several["query_id"]), texts_of(graded.documents, several["document_id"])
    return pa.table(texts, schema=POSITIVES)


def positives_of(block: pl.DataFrame) -> pl.DataFrame:
    """query_id, document_id of what is a positive in a block of `Graded.blocks`, or as good as one."""
    is_positive = pl.col("is_positive") | (pl.col("ruled_out") == REASONS[-1]).fill_null(False)
    return block.filter(is_positive).select("query_id", "document_id")


class Tally:
    """What became of the rows (a query and one of its positives) and of their candidates, block by block."""

    def __init__(self) -> None:
        self.counts: Counter[str | None] = Counter()
        self.label_sums = np.zeros(2)  # of positives, of negatives
        self.qualifying: list[int] = []  # of each row, kept or dropped
        self.rows_per_query: list[int] = []
        self.relabelled: list[pl.DataFrame] = []  # of `positives_of`

    def add(self, block: pl.DataFrame, qualifying: np.ndarray, rows: np.ndarray) -> None:
        self.qualifying += qualifying.tolist()
        self.relabelled.append(positives_of(block))
        with_rows = block["query_id"].gather(rows[:, 0]).value_counts()["count"].to_list()
        self.rows_per_query += with_rows + [0] * (block["query_id"].n_unique() - len(with_rows))
        # a candidate stands in as many rows as its query has positives other than itself
        stands_in = pl.col("is_positive").sum().over("query_id") - pl.col("is_positive").cast(pl.UInt32)
        self.counts.update(dict(block.select("ruled_out", rows=stands_in).group_by("ruled_out").sum().iter_rows()))
        if len(rows):
            labels = block["label"].to_numpy()[rows]
            self.counts.update(rows=len(rows), negatives=labels[:, 1:].size)
            self.label_sums += labels[:, 0].sum(dtype=np.float64), labels[:, 1:].sum(dtype=np.float64)
            self.counts.update(count_flat_and_one_hot(labels.ravel(), np.arange(len(rows)) * labels.shape[1]))

    def facts(self) -> dict[str, Any]:
        """For the manifest. `candidates` counts those of every row, each under the first name that holds."""
        rows, negatives = self.counts["rows"], self.counts["negatives"]
        qualifies, none = sum(self.qualifying), self.qualifying.count(0)
        dropped = {"too_few_negatives": len(self.qualifying) - none - rows, "no_qualifying_candidate": none}
        candidates = {name: self.counts[name] for name in REASONS}
        candidates |= {"fails_margin": self.counts[None] - qualifies, "qualifies": qualifies}
        means = self.label_sums / (rows, negatives)
        return {
            "rows": rows,
            "negatives": negatives,
            "rows_dropped": dropped,
            "candidates": candidates,
            "yield": {
                "qualifying_per_row": quantiles(self.qualifying),
                "rows_per_query": quantiles(self.rows_per_query),
            },
            "mean_label": dict(zip(("positive", "negative"), means.round(4).tolist(), strict=True)),
            **{name: self.counts[name] for name in ("flat_rows", "one_hot_rows")},
        }


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """
    >>> quantiles([0, 5, 5, 5, 5, 5, 5, 5, 5, 90])
    {'min': 0, 'p10': 0, 'median': 5, 'p90': 5, 'max': 90}
    """
    found = np.quantile(values, list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, found.tolist(), strict=True))
