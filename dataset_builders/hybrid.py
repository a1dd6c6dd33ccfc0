"""The hybrid teacher: graded relevance from what a build knows of a candidate already, and from models it may name.

A logistic regression on the scores of BM25 and of the dense model, their distances to the query's best, log ranks, the
fused score, and each named teacher's score and distance to the best. It is fitted on the training split, labelled
positives against other candidates with the two weighing the same, and cross-fitted: the model that grades a query
was fitted without it. So its probabilities need no second calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from dataset_builders.sources import stable_hash

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

FOLDS = 5
FEATURES = ("bm25", "bm25_below_best", "dense", "dense_below_best", "log_bm25_rank", "log_dense_rank", "rrf")


def features(block: pl.DataFrame, scores: Sequence[np.ndarray], depths: tuple[int, int]) -> np.ndarray:
    """(rows, 7 + 2 * teachers) FEATURES of graded pairs, then each teacher's score and its distance to the best.

    Args:
        block: `query_id` and the columns of CANDIDATES; all pairs of a query, null where nothing was retrieved.
        scores: (rows,) of the dense model for every pair, then of each further teacher.
        depths: how many documents BM25 and the dense model return. A document that BM25 did not return has the lowest
            score it gave, or 0 where it found fewer, and comes after its last.
    """
    bm25_depth, dense_depth = depths
    found = pl.col("bm25_score")
    is_full = (pl.col("bm25_rank").max() >= bm25_depth).over("query_id").fill_null(False)
    bm25 = found.fill_null(pl.when(is_full).then(found.min().over("query_id")).otherwise(0.0)).cast(pl.Float64)
    table = block.select("query_id", bm25.alias("bm25"), "bm25_rank", "dense_rank", "rrf_score")
    names = ["dense", *(f"teacher_{number}" for number in range(1, len(scores)))]
    table = table.with_columns(pl.Series(name, column, pl.Float64) for name, column in zip(names, scores, strict=True))

    def below_best(name: str) -> pl.Expr:
        return pl.col(name).max().over("query_id") - pl.col(name)

    def both(*names: str) -> list[pl.Expr]:
        return [column for name in names for column in (pl.col(name), below_best(name).alias(f"{name}_below_best"))]

    columns = [
        *both("bm25", "dense"),
        pl.col("bm25_rank").fill_null(bm25_depth + 1).log(),
        pl.col("dense_rank").fill_null(dense_depth + 1).log(),
        pl.col("rrf_score").fill_null(0.0),
        *both(*names[1:]),
    ]
    return table.select(columns).to_numpy()


def folds_of(query_ids: pl.Series) -> np.ndarray:
    """(rows,) the fold of each row's query, decided by its id alone; rows of a query are together."""
    runs = query_ids.rle().struct.unnest()
    folds = [stable_hash("fold", query_id) % FOLDS for query_id in runs["value"]]
    return np.repeat(folds, runs["len"])


@dataclass(frozen=True)
class CrossFitted:
    """A model for each fold, fitted on all the others."""

    models: Sequence[Pipeline]

    def logits(self, rows: np.ndarray, folds: np.ndarray) -> np.ndarray:
        """(rows,) log odds of relevance, each by the model that has not seen its query."""
        logits = np.empty(len(rows))
        for fold, model in enumerate(self.models):
            if len(here := np.flatnonzero(folds == fold)):
                logits[here] = model.decision_function(rows[here])
        return logits

    def weights(self, teachers: int) -> dict[str, float]:
        """Feature -> its mean weight over the folds, of features at unit variance."""
        further = [f"teacher_{n}{part}" for n in range(1, teachers + 1) for part in ("", "_below_best")]
        means = np.mean([model[-1].coef_[0] for model in self.models], axis=0)
        return {name: round(float(value), 4) for name, value in zip([*FEATURES, *further], means, strict=True)}


def cross_fit(rows: np.ndarray, is_positive: np.ndarray, folds: np.ndarray) -> CrossFitted:
    """Fit on (rows, features), of which each fold holds, and leaves, positives and others."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    models: list[Any] = []
    for fold in range(FOLDS):
        model = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
        models.append(model.fit(rows[folds != fold], is_positive[folds != fold]))
    return CrossFitted(models)
