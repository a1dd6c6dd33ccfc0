"""scores/, mined/ -> audit/: what the graded data are like, measured before anything is trained on them.

The blocks of mining (see mine.py) are read once more, and each figure keeps a small table of sums of every block, so
memory does not grow with the number of queries. What a figure means, and what it does not, is said where it is
computed; dataset_card.md shows them all.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from common.steps import read_manifest
from dataset_builders.audit_page import write_audit_page
from dataset_builders.audit_plots import draw
from dataset_builders.columns import positions_of
from dataset_builders.mine import REASONS, Mining, mine_block, read_graded, rule_out
from dataset_builders.schema import SCORES

if TYPE_CHECKING:
    from dataset_builders.build_record import Build

MARGINS = (0.90, 0.95, 0.98, 1.0)
LABEL_BINS = 20  # equal-width bins of the label
CUTOFF = 10  # of nDCG
TEMPERATURE = 0.05  # of the cosines: sentence-transformers' scale of 20
VECTORS = 16_384  # read at a time
PAIRS = 1_000_000  # of a known positive and a candidate, held in memory together
RETRIEVERS = {"bm25_only": (True, False), "dense_only": (False, True), "both": (True, True), "neither": (False, False)}
RANKINGS = {
    "bm25": pl.col("bm25_rank"),
    "dense": pl.col("dense_rank"),
    "rrf": pl.col("rrf_rank"),
    "convex": pl.col("convex_rank"),
    "graded": pl.when(pl.col("rrf_rank").is_not_null()).then(-pl.col("teacher_score")),
}


def write_audit(build: Build, folder: Path) -> dict[str, Any]:
    """Write the plots into `folder`; returns the figures for the manifest."""
    graded, mining = read_graded(build.corpus, build.scores), build.recipe.mining
    plain = {"margin_type": "ratio", "skip": 0}
    changed = [{"strategy": "random" if mining.strategy == "top" else "top"}, {"margin": 1.0, "margin_type": "ratio"}]
    others = [mining.model_copy(update=update) for update in changed]
    strategies = [mining, *(other for other in others if other != mining)]
    own = mining.margin if mining.margin_type == "ratio" else None  # other types' margins are no such shares
    margins = sorted({*MARGINS, own} - {None})
    margins = [mining.model_copy(update={**plain, "margin": margin}) for margin in margins]
    mined = pl.scan_parquet(build.mined / "mined.parquet", glob=False)
    qrels = pl.scan_parquet(build.corpus / "qrels.parquet", glob=False).filter(pl.col("split") == build.splits.split)
    sums: dict[str, list[pl.DataFrame]] = defaultdict(list)
    queries = 0
    for block in graded.blocks(mining.relabel, SCORES.names, "audit"):
        first, last = (pl.lit(query_id) for query_id in (block["query_id"].first(), block["query_id"].last()))
        in_block = pl.col("query_id").is_between(first, last)
        negatives = negatives_of(mined.filter(in_block).collect(), block)
        sums["rules"].append(count_broken_rules(negatives, mining))
        uses = negatives.group_by("query_id", "document_id").len("uses")
        block = block.join(uses, on=["query_id", "document_id"], how="left", maintain_order="left")
        queries += block["query_id"].n_unique()
        sums["labels"].append(count_labels(block))
        sums["found_by"].append(count_found_by(block))
        sums["ndcg"].append(sum_ndcg(block, qrels.filter(in_block).collect()))
        for number, strategy in enumerate(strategies):
            sums["quality"].append(sum_gradient_shares(build, block, mine_block(block, strategy)[1], number))
        if not len(graded.classes):
            for pretended in hide_positives(block, graded.groups):
                sums["hidden"] += [leave_one_out(pretended, margin) for margin in margins]
    figures = {
        "mined_rows": mined_rows(mined, queries, _total(sums["rules"])),
        "labels": label_figures(_total(sums["labels"], "bin")),
        "false_negatives": false_negatives(_total(sums["hidden"], "margin"), len(graded.classes) > 0),
        "found_by": found_by_figures(_total(sums["found_by"], "bm25", "dense")),
        "negative_quality": quality_figures(strategies, _total(sums["quality"], "strategy")),
        "ndcg_at_10": ndcg_figures(queries, _total(sums["ndcg"], "ranking")),
        "cut_texts": cut_texts(read_manifest(build.candidates), read_manifest(build.scores)),
    }
    plots = draw(figures, own, build.calibration.get("reliability"))
    for name, plot in plots.items():
        # without the writing library's name and version the same figures give the same bytes
        plot.savefig(folder / name, metadata={"Software": None})
    write_audit_page(build, folder, queries)
    return {**figures, "plots": list(plots)}


def _total(tables: list[pl.DataFrame], *by: str) -> pl.DataFrame | None:
    if not tables:
        return None
    table = pl.concat(tables)
    return table.group_by(by).sum().sort(by) if by else table.sum()


# ---- the rows that were mined ------------------------------------------------------------------------------------


def negatives_of(mined: pl.DataFrame, block: pl.DataFrame) -> pl.DataFrame:
    """One row for each negative of mined rows, as the file holds them, with its columns of the block."""
    rows = mined.select("query_id", "positive_id", "negative_ids", positive_label=pl.col("label").list.first())
    negatives = rows.with_row_index("row").explode("negative_ids").rename({"negative_ids": "document_id"})
    return negatives.join(block, on=["query_id", "document_id"], how="left", maintain_order="left")


def count_broken_rules(negatives: pl.DataFrame, mining: Mining) -> pl.DataFrame:
    """Negatives that break a rule of mining: every count should be 0. One that was not graded is above any margin."""
    below = (pl.col("label") < mining.threshold(pl.col("positive_label"))).fill_null(False)
    is_right = {"flipped_control": ~below, "none": pl.col("label").is_not_null()}.get(mining.margin_type, below)
    other, duplicate, of_class, above_positive = ((pl.col("ruled_out") == name).sum() for name in REASONS)
    return negatives.select(
        above_margin=(~is_right).sum(),
        labelled_positive=other,
        near_duplicate=duplicate,
        same_class=of_class,
        graded_above_positive=above_positive,
        repeated_in_row=(~pl.struct("row", "document_id").is_first_distinct()).sum(),
    )


def mined_rows(mined: pl.LazyFrame, queries: int, rules: pl.DataFrame) -> dict[str, Any]:
    """Queries without a row, broken rules, and reuse: a few documents that are negatives in most rows teach little."""
    rows, with_rows = mined.select(pl.len(), pl.col("query_id").n_unique().alias("queries")).collect().row(0)
    documents = mined.select(pl.col("negative_ids").explode()).group_by("negative_ids").len("uses")
    uses = documents.collect(engine="streaming")["uses"].sort(descending=True)
    negatives = uses.sum()
    return {
        "queries": queries,
        "queries_without_rows": queries - with_rows,
        "rows": rows,
        "violations": rules.row(0, named=True),
        "negatives": negatives,
        "distinct_negatives": len(uses),
        "share_distinct": _ratio(len(uses), negatives),
        "median_uses": int(uses.median()),
        "most_uses": uses.max(),
        # of all negatives, by the hundredth of these documents that serves most often
        "share_of_top_percent": _ratio(uses.head(-(-len(uses) // 100)).sum(), negatives),
    }


# ---- labels and retrievers ---------------------------------------------------------------------------------------


def count_labels(block: pl.DataFrame) -> pl.DataFrame:
    """By bin of the soft label: labelled positives, negatives chosen and unlabelled candidates, and their labels."""
    label, is_positive = pl.col("label").cast(pl.Float64), pl.col("is_positive")
    counts = {"positives": is_positive, "negatives": pl.col("uses"), "candidates": ~is_positive}
    return block.group_by(bin=(label * LABEL_BINS).floor().clip(0, LABEL_BINS - 1).cast(pl.Int64)).agg(
        *(count.sum().alias(name) for name, count in counts.items()),
        *((count * label).sum().alias(f"{name}_label") for name, count in counts.items()),
    )


def label_figures(bins: pl.DataFrame) -> dict[str, Any]:
    every = pl.DataFrame({"bin": range(LABEL_BINS)}).join(bins, on="bin", how="left").fill_null(0).sort("bin")
    return {
        name: {
            "count": every[name].sum(),
            "mean": _ratio(every[f"{name}_label"].sum(), every[name].sum()),
            "bins": every[name].to_list(),
        }
        for name in ("positives", "negatives", "candidates")
    }


def count_found_by(block: pl.DataFrame) -> pl.DataFrame:
    """By which retriever found them: candidates, labelled positives and negatives chosen."""
    found_by = {name: pl.col(f"{name}_rank").is_not_null() for name in ("bm25", "dense")}
    return block.group_by(**found_by).agg(
        candidates=pl.col("rrf_rank").count(), positives=pl.col("is_positive").sum(), negatives=pl.col("uses").sum()
    )


def found_by_figures(counts: pl.DataFrame) -> dict[str, Any]:
    figures = {}
    for name in ("candidates", "positives", "negatives"):
        of = {(bm25, dense): count for bm25, dense, count in counts.select("bm25", "dense", name).iter_rows()}
        total = sum(of.values())
        figures[name] = {"count": total} | {who: _ratio(of.get(by, 0), total) for who, by in RETRIEVERS.items()}
    return figures


# ---- false negatives ---------------------------------------------------------------------------------------------


def hide_positives(block: pl.DataFrame, groups: pl.DataFrame) -> Iterator[pl.DataFrame]:
    """Each query with several labelled positives once for every one of them, as if it alone were labelled.

    `known` numbers these; the other positives are `hidden` among the candidates where a retriever found them, as a
    relevant document that nobody labelled would be. Some queries at a time: a block may hold many positives of each.
    """
    is_positive, retrieved = pl.col("is_positive"), pl.col("rrf_rank").is_not_null()
    several = block.filter((is_positive.sum() > 1).over("query_id") & (is_positive & retrieved).any().over("query_id"))
    pairs = is_positive.sum().over("query_id").cum_sum()
    several = several.with_columns(part=(pairs // PAIRS).first().over("query_id"))
    is_known = pl.col("document_id") == pl.col("known_id")
    for part in several.partition_by("part", maintain_order=True):
        known = part.filter("is_positive").select("query_id", known_id="document_id", known_label="label")
        pretended = known.with_row_index("known").join(part, on="query_id", maintain_order="left_right")
        pretended = pretended.filter(is_known | ~is_positive | retrieved)
        pretended = pretended.with_columns(hidden=is_positive & ~is_known, is_positive=is_known)
        yield rule_out(pretended, groups, groups.clear(), by="known")


def leave_one_out(pretended: pl.DataFrame, mining: Mining) -> pl.DataFrame:
    """How many hidden positives the margin admits as negatives, and how many are among the negatives then chosen."""
    admitted = pl.col("hidden") & (pl.col("label") < pl.lit(mining.margin, pl.Float32) * pl.col("known_label"))
    _, rows = mine_block(pretended, mining, by="known")
    return pretended.select(
        margin=pl.lit(mining.margin),
        queries=pl.col("query_id").n_unique(),
        hidden=pl.col("hidden").sum(),
        admitted=admitted.sum(),
        rows=pl.lit(len(rows)),
        negatives=pl.lit(rows[:, 1:].size),
        false=pl.col("hidden").gather(rows[:, 1:].ravel()).sum(),
        queries_with_rows=pl.col("query_id").gather(rows[:, 0]).n_unique(),
    )


def false_negatives(counts: pl.DataFrame | None, has_classes: bool) -> dict[str, Any]:
    """How many negatives would be false, from queries with several labelled positives: all but one are hidden.

    Hidden positives are what false negatives look like where annotators stopped after the first; whether those of
    other queries look the same, no file can tell.
    """
    if has_classes:
        return {"reason": "documents of one class are never each other's negatives", "by_margin": []}
    queries, hidden = (0, 0) if counts is None else counts.select("queries", "hidden").row(0)
    if not hidden:
        return {"reason": "no query has two labelled positives of which one was retrieved", "by_margin": []}
    by_margin = [
        {
            "margin": row["margin"],
            "admitted": wilson(row["admitted"], hidden, queries),
            "rows": row["rows"],
            "negatives": row["negatives"],
            "among_negatives": wilson(row["false"], row["negatives"], row["queries_with_rows"]),
        }
        for row in counts.iter_rows(named=True)
    ]
    return {"reason": None, "queries": queries, "hidden": hidden, "by_margin": by_margin}


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
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    low, high = max(centre - half, 0.0), min(centre + half, 1.0)
    return {"share": round(share, 4), "low": round(low, 4), "high": round(high, 4)}


# ---- quality of negatives ----------------------------------------------------------------------------------------


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
    from scipy.special import softmax  # slow to import: --help needs none

    weights = softmax(cosines.astype(np.float64) / temperature, axis=1)[:, 1:]
    return weights.sum(axis=1), (weights * (1 - labels[:, 1:].astype(np.float64))).sum(axis=1)


def sum_gradient_shares(build: Build, block: pl.DataFrame, rows: np.ndarray, strategy: int) -> pl.DataFrame:
    """`gradient_shares` of rows mined from the block, by the dense model's cosines."""
    query_ids, labels = pa.chunked_array([list(build.queries)], pa.string()), block["label"].to_numpy()
    sums, step = np.zeros(3), VECTORS // rows.shape[1] + 1
    for part in (rows[start : start + step] for start in range(0, len(rows), step)):
        asked, found = block["query_id"].gather(part[:, 0]), block["document_id"].gather(part.ravel())
        queries = _unit_vectors(build.query_vectors, asked, query_ids)
        documents = _unit_vectors(build.document_vectors, found, build.document_ids)
        cosines = np.einsum("rd,rnd->rn", queries, documents.reshape(*part.shape, -1))
        hardness, useful = gradient_shares(cosines, labels[part], TEMPERATURE)
        sums += len(part), hardness.sum(), useful.sum()
    return pl.DataFrame([[strategy, *sums]], schema=["strategy", "rows", "hardness", "useful"], orient="row")


def _unit_vectors(vectors: Any, ids: pl.Series, known: pa.ChunkedArray) -> np.ndarray:
    """Rows of unit length; a row of zeros stays one."""
    found = vectors[positions_of(ids.to_arrow().cast(pa.string()), known, "mined rows")]
    return found / np.maximum(np.linalg.norm(found, axis=-1, keepdims=True), 1e-12)


def quality_figures(strategies: list[Mining], sums: pl.DataFrame) -> dict[str, Any]:
    """`gradient_shares` of the mined rows, and of what other strategies would have taken from the same candidates."""
    found = [
        {
            "strategy": mining.strategy,
            "margin": {"ratio": mining.margin, "none": "none"}.get(
                mining.margin_type, f"{mining.margin:g} {mining.margin_type}"
            ),
            "rows": int(rows),
            "hardness": _ratio(hardness, rows),
            "useful": _ratio(useful, rows),
            "safety": _ratio(useful, hardness),
        }
        for mining, (_, rows, hardness, useful) in zip(strategies, sums.iter_rows(), strict=True)
    ]
    return {"temperature": TEMPERATURE, "strategies": found}


# ---- order -------------------------------------------------------------------------------------------------------


def sum_ndcg(block: pl.DataFrame, qrels: pl.DataFrame) -> pl.DataFrame:
    """By ranking: nDCG@10 summed over the block's queries, and in how many of them the list is cut.

    Only retrieved candidates are ranked, and unlabelled ones count as irrelevant, unless they share the positive's
    class. A retriever's list is cut where fusion dropped some of its first ten.
    """
    ids = ["query_id", "document_id"]
    of_class = block.filter(pl.col("ruled_out") == "shares_class").select(*ids, gain=pl.lit(1, pl.Int32))
    judged = pl.concat([qrels.select(*ids, gain=pl.col("score").clip(0)), of_class]).group_by(ids).max()
    ideal = _first_places(judged, -pl.col("gain")).group_by("query_id").agg(ideal=_discounted_gain())
    sums = []
    for name, key in RANKINGS.items():
        first = _first_places(block.filter(key.is_not_null()), key, "rrf_rank")
        is_cut = pl.lit(False) if name == "graded" else (key != pl.col("place")).any()
        found = first.join(judged, on=ids, how="left").group_by("query_id").agg(_discounted_gain(), cut=is_cut)
        share = (pl.col("gain") / pl.col("ideal")).sum()
        sums.append(found.join(ideal, on="query_id").select(ranking=pl.lit(name), ndcg=share, cut=pl.col("cut").sum()))
    return pl.concat(sums)


def _first_places(table: pl.DataFrame, *order: pl.Expr | str) -> pl.DataFrame:
    """Each query's first CUTOFF rows by rising `order`, with their `place` from 1."""
    place = (pl.int_range(pl.len()).over("query_id") + 1).alias("place")
    return table.sort("query_id", *order).with_columns(place).filter(pl.col("place") <= CUTOFF)


def _discounted_gain() -> pl.Expr:
    return (pl.col("gain").fill_null(0) / (pl.col("place") + 1).log(2)).sum()


def ndcg_figures(queries: int, sums: pl.DataFrame) -> dict[str, Any]:
    """nDCG@10 by ranking: what fusion adds to the retrievers, and the teacher to both. Null for a list that is cut."""
    totals = {name: None if cut else _ratio(ndcg, queries) for name, ndcg, cut in sums.iter_rows()}
    return {"queries": queries, **{name: totals[name] for name in RANKINGS}}


def cut_texts(candidates: Mapping[str, Any], scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From the manifests: how many texts were longer than a model reads, so that it never saw their end."""
    counted = {
        "queries_cut": ("queries", candidates["queries"]),
        "documents_cut": ("documents", candidates["documents"]),
        "pairs_cut": ("pairs", scores["graded"]),
        "pairs_without_document": ("pairs, no word of the document left", scores["graded"]),
    }
    return [
        {"model": model, "texts": texts, "cut": manifest[key], "of": total}
        for model, manifest in (("dense", candidates), ("teacher", scores))
        for key, (texts, total) in counted.items()
        if key in manifest
    ]


def _ratio(part: float, whole: float) -> float | None:
    return round(float(part) / float(whole), 4) if whole else None
