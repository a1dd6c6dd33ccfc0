"""A teacher's scores -> soft labels in (0, 1): label = sigmoid(a * score + b), Platt scaling.

A logistic regression with balanced classes, retrieved positives against the other candidates. It is fitted for
each build, that is for each teacher and source, on standardised scores with scikit-learn's default penalty, so labels
do not depend on the teacher's unit, and a teacher that never errs does not push a to infinity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from common.cli import InputError
from dataset_builders.schema import LABEL_FLOOR, check_finite

BINS = 10  # of the reliability table
FLAT = 0.05  # a query whose labels differ by less has nothing to teach
ONE_HOT = 0.99  # share of the odds label / (1 - label) that one document holds: a hard label in disguise
WARN_SHARE = 0.2  # of queries that are flat, or one-hot
WARN_ERROR = 0.15  # expected calibration error; 0.02 to 0.06 is usual
WARN_AUC = 0.65  # below, a teacher hardly tells positives from others; 0.5 is chance


@dataclass(frozen=True)
class Calibration:
    """label = sigmoid(a * score + b), kept LABEL_FLOOR away from 0 and 1."""

    a: float
    b: float

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        labels = expit(self.a * np.asarray(scores, np.float64) + self.b)
        return np.clip(labels, LABEL_FLOOR, 1 - LABEL_FLOOR).astype(np.float32)


def calibrate(positives: np.ndarray, others: np.ndarray) -> tuple[Calibration, dict[str, Any]]:
    """Platt scaling of a teacher's scores for positives and for other documents, both of them retrieved.

    Also returns a, b and what `describe_labels` tells. Raises InputError when the scores cannot be calibrated: NaN,
    all equal, one side missing, or positives scored below the others.
    """
    from sklearn.linear_model import LogisticRegression

    scores = np.concatenate([positives, others]).astype(np.float64)
    check_both_sides(len(positives), len(others))
    check_finite(scores, "teacher scores")
    check_spread(scores, "teacher scores")
    mean, deviation = scores.mean(), scores.std()
    is_positive = np.arange(len(scores)) < len(positives)
    fit = LogisticRegression(class_weight="balanced").fit(((scores - mean) / deviation)[:, None], is_positive)
    a = float(fit.coef_[0, 0] / deviation)
    calibration = Calibration(a, float(fit.intercept_[0] - a * mean))
    facts = describe_labels(calibration(scores), is_positive)
    if a <= 0:
        raise InputError(
            f"teacher scores run against the labels (AUC {1 - facts['auc']:.3f}): positives score below other "
            "candidates; use another teacher, or check its prompts"
        )
    return calibration, {"a": a, "b": calibration.b, **facts}


def check_both_sides(positives: int, others: int) -> None:
    """Raises InputError where retrieval found no positive, or nothing else."""
    if not positives or not others:
        raise InputError(
            f"teacher scores: the retrievers found {positives} positives and {others} other candidates; "
            "calibration needs both, retrieve more with a higher bm25.top_k and dense.top_k"
        )


def describe_labels(labels: np.ndarray, is_positive: np.ndarray) -> dict[str, Any]:
    """AUC, counts, the reliability table and its expected calibration error."""
    from sklearn.metrics import roc_auc_score

    table = reliability(labels, is_positive)
    return {
        "auc": round(float(roc_auc_score(is_positive, labels)), 4),
        "positives": int(is_positive.sum()),
        "others": int((~is_positive).sum()),
        "expected_calibration_error": round(calibration_error(table), 4),
        "reliability": table,
    }


def check_spread(scores: np.ndarray, what: str) -> None:
    """Raises InputError for scores that are all the same, up to rounding."""
    mean, deviation = float(np.mean(scores)), float(np.std(scores))
    if deviation <= 1e-6 * max(1.0, abs(mean)):
        raise InputError(f"{what} are all {mean:.6g}: this model cannot tell documents apart; use another")


def reliability(labels: np.ndarray, is_positive: np.ndarray, bins: int = BINS) -> list[dict[str, Any]]:
    """For each equal-width bin of labels that is not empty: mean label, observed share of positives, counts.

    Both are weighted as the fit is, all positives together as much as all others: where labels mean what they say,
    `observed` equals `label`.

    >>> reliability(np.array([0.1, 0.9, 0.9]), np.array([False, False, True]), bins=2)
    [{'label': 0.1, 'observed': 0.0, 'positives': 0, 'others': 1}, {'label': 0.9, 'observed': 0.6667, \
'positives': 1, 'others': 1}]
    """
    rows = pl.DataFrame({"label": np.asarray(labels, np.float64), "is_positive": np.asarray(is_positive, bool)})
    number = (pl.col("label") * bins).floor().clip(0, bins - 1)
    rows = rows.with_columns(bin=number, weight=1 / pl.len().over("is_positive"))
    weight, positive = pl.col("weight"), pl.col("is_positive")
    table = rows.group_by("bin").agg(
        label=((pl.col("label") * weight).sum() / weight.sum()).round(4),
        observed=(weight.filter(positive).sum() / weight.sum()).round(4),
        positives=positive.sum(),
        others=(~positive).sum(),
    )
    return table.sort("bin").drop("bin").to_dicts()


def calibration_error(table: Sequence[dict[str, Any]]) -> float:
    """Expected calibration error: the mean over bins of |label - observed|, by their balanced weight; 0 is best.

    >>> calibration_error([{"label": 0.25, "observed": 0.0, "positives": 0, "others": 4},
    ...                    {"label": 0.75, "observed": 1.0, "positives": 4, "others": 0}])
    0.25
    """
    positives, others = (max(sum(row[name] for row in table), 1) for name in ("positives", "others"))
    weights = np.array([row["positives"] / positives + row["others"] / others for row in table])
    return float(np.average([abs(row["label"] - row["observed"]) for row in table], weights=weights))


def count_flat_and_one_hot(labels: np.ndarray, starts: np.ndarray) -> dict[str, int]:
    """How many rows of labels teach nothing by their grades. Row i runs from starts[i] to starts[i + 1].

    >>> count_flat_and_one_hot(np.array([0.5, 0.5, 0.999, 0.001, 0.7, 0.4]), np.array([0, 2, 4]))
    {'flat_rows': 1, 'one_hot_rows': 1}
    """
    odds = labels.astype(np.float64) / (1 - labels.astype(np.float64))
    share = np.maximum.reduceat(odds, starts) / np.add.reduceat(odds, starts)
    several = np.diff(starts, append=len(labels)) > 1
    flat = np.maximum.reduceat(labels, starts) - np.minimum.reduceat(labels, starts) < FLAT
    return {"flat_rows": int((flat & several).sum()), "one_hot_rows": int(((share > ONE_HOT) & several).sum())}


def warnings_of(counts: Mapping[str, int], calibration: Mapping[str, Any]) -> list[str]:
    """What to know about a teacher before training on its grades: one line each."""
    found = []
    flat, one_hot = (counts[name] / counts["queries"] for name in ("flat_rows", "one_hot_rows"))
    if flat > WARN_SHARE:
        found.append(f"{flat:.0%} of queries are flat (labels within {FLAT}): retrieve deeper, or use another teacher")
    if one_hot > WARN_SHARE:
        found.append(
            f"{one_hot:.0%} of queries are one-hot (a document with {ONE_HOT:.0%} of the odds), as good as hard "
            "labels: train with a higher target_temperature, or use another teacher"
        )
    if counts.get("pairs_without_document"):
        found.append(
            f"{counts['pairs_without_document']:,} of {counts['graded']:,} pairs hold no word of their document, for "
            "the query fills max_seq_length, so all its documents get one score: raise teacher.max_seq_length"
        )
    if 2 * counts.get("pairs_cut", 0) > counts["graded"]:
        found.append(
            f"{counts['pairs_cut']:,} of {counts['graded']:,} pairs are cut to its max_seq_length: raise it, or split "
            "the documents"
        )
    missed, error = calibration["positives_not_retrieved"], calibration["expected_calibration_error"]
    if missed > calibration["positives"]:
        found.append(
            f"{missed:,} of {missed + calibration['positives']:,} positives were found by no retriever; labels are "
            "fitted on the rest: retrieve deeper"
        )
    if error > WARN_ERROR:
        found.append(
            f"expected calibration error {error:.2f}: a label is no probability here; margins between labels mean "
            "less than they seem"
        )
    auc = calibration["auc"]
    if auc < WARN_AUC:
        found.append(
            f"AUC {auc:.3f}: the teacher hardly tells positives from other candidates; check its prompt, compare it "
            "with --check_teacher, or use another"
        )
    return found
