"""Calibration: Platt scaling, reliability, and what is warned of and refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from common.cli import InputError
from dataset_builders.calibration import calibrate, calibration_error, count_flat_and_one_hot, reliability, warnings_of
from dataset_builders.schema import LABEL_FLOOR

rng = np.random.default_rng(0)
POSITIVES, OTHERS = rng.normal(0.6, 0.1, 500), rng.normal(0.4, 0.15, 20_000)


def test_calibration_is_platt_scaling_of_balanced_classes():
    calibration, facts = calibrate(POSITIVES, OTHERS)
    scores, truth = np.concatenate([POSITIVES, OTHERS]), np.r_[np.ones(500), np.zeros(20_000)]
    # the same by repeating positives 40 times instead of weighting, without a penalty
    repeated = np.concatenate([np.repeat(POSITIVES, 40), OTHERS])[:, None]
    reference = LogisticRegression(C=np.inf).fit(repeated, np.r_[np.ones(20_000), np.zeros(20_000)])
    expected = reference.predict_proba(scores[:, None])[:, 1]
    np.testing.assert_allclose(calibration(scores), np.clip(expected, LABEL_FLOOR, 1 - LABEL_FLOOR), atol=2e-3)
    np.testing.assert_allclose(calibration(scores[:9]), expit(facts["a"] * scores[:9] + facts["b"]), rtol=1e-6)
    assert facts["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
    assert (facts["positives"], facts["others"]) == (500, 20_000)


def test_labels_stay_inside_the_interval_and_a_faultless_teacher_stays_finite():
    calibration, facts = calibrate(np.full(50, 9.0) + rng.random(50), np.full(50, -9.0) + rng.random(50))
    assert np.isfinite(facts["a"]) and facts["auc"] == 1
    labels = calibration(np.array([-1e9, -9, 9, 1e9]))
    assert labels.dtype == np.float32 and labels.min() >= np.float32(LABEL_FLOOR) and labels.max() < 1


@pytest.mark.parametrize(
    ("positives", "others", "message"),
    [
        ([0.9, np.nan], [0.1, 0.2], "NaN"),
        ([0.9, np.inf], [0.1, 0.2], "infinite"),
        ([0.5, 0.5], [0.5, 0.5], "cannot tell documents apart"),
        ([0.0, 0.0], [0.0, 0.0], "all 0: this model"),
        ([0.1, 0.2], [0.8, 0.9], "run against the labels"),
        ([], [0.8, 0.9], "calibration needs both"),
        ([0.8], [], "calibration needs both"),
    ],
)
def test_teachers_that_cannot_be_calibrated_are_refused(positives, others, message):
    with pytest.raises(InputError, match=message):
        calibrate(np.array(positives), np.array(others))


def test_where_labels_are_the_true_odds_the_reliability_table_is_its_own_diagonal():
    # two normal distributions one deviation apart: P(positive | score) at even odds is exactly expit(score)
    draw = np.random.default_rng(1)
    scores = np.concatenate([draw.normal(0.5, 1, 40_000), draw.normal(-0.5, 1, 400_000)])
    table = reliability(expit(scores), np.arange(len(scores)) < 40_000)
    assert len(table) == 10 and sum(row["positives"] for row in table) == 40_000
    for row in table:
        assert row["observed"] == pytest.approx(row["label"], abs=0.02)
    assert calibration_error(table) < 0.01
    assert calibrate(scores[:40_000], scores[40_000:])[1]["expected_calibration_error"] < 0.01
    assert calibration_error(reliability(expit(3 * scores), np.arange(len(scores)) < 40_000)) > 0.1  # too sure


@given(st.lists(st.tuples(st.floats(1e-4, 1 - 1e-4), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_a_reliability_table_holds_every_label_once_in_its_bin(rows, bins):
    labels, truth = np.array([label for label, _ in rows]), np.array([positive for _, positive in rows])
    table = reliability(labels, truth, bins)
    assert sum(row["positives"] for row in table) == truth.sum()
    assert sum(row["others"] for row in table) == (~truth).sum()
    assert [row["label"] for row in table] == sorted(row["label"] for row in table)
    assert all(row["positives"] + row["others"] > 0 and 0 <= row["observed"] <= 1 for row in table)
    assert 0 <= calibration_error(table) <= 1


def test_flat_and_one_hot_rows_of_unequal_length():
    labels = np.array([0.5, 0.52, 0.9999, 0.01, 0.01, 0.9, 0.5, 0.7], np.float32)
    found = count_flat_and_one_hot(labels, np.array([0, 2, 5, 7]))
    assert found == {"flat_rows": 1, "one_hot_rows": 1}  # the last row has one document: neither


def test_a_teacher_that_teaches_little_is_warned_of():
    counts = {"queries": 100, "graded": 900, "flat_rows": 30, "one_hot_rows": 10}
    sound = {"auc": 0.9, "positives": 50, "positives_not_retrieved": 40, "expected_calibration_error": 0.05}
    assert [line.split(" of ")[0] for line in warnings_of(counts, sound)] == ["30%"]
    found = warnings_of({**counts, "flat_rows": 20, "one_hot_rows": 21}, {**sound, "auc": 0.6})
    assert ["one-hot" in line or "AUC 0.600" in line for line in found] == [True, True]
    found = warnings_of({**counts, "flat_rows": 0, "pairs_cut": 451, "pairs_without_document": 7}, sound)
    assert [line.split(" pairs")[0] for line in found] == ["7 of 900", "451 of 900"]
    off = {**sound, "positives_not_retrieved": 60, "expected_calibration_error": 0.24}
    found += (few := warnings_of({**counts, "flat_rows": 0}, off))
    assert ["60 of 110 positives" in line or "error 0.24" in line for line in few] == [True, True]
    assert all("\n" not in line for line in found)
