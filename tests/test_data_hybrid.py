"""The hybrid teacher: its features by hand, no query that grades itself, and what it does with few labels."""

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from tiny_data import write_encoder, write_recipe, write_set

from common.cli import InputError
from dataset_builders.build import main
from dataset_builders.hybrid import FEATURES, FOLDS, cross_fit, features, folds_of

NULL = None


def test_features_by_hand():
    block = pl.DataFrame(
        {
            "query_id": ["a", "a", "a", "b", "b"],
            "bm25_rank": [1, 2, NULL, 1, NULL],
            "bm25_score": [9.0, 4.0, NULL, 7.0, NULL],
            "dense_rank": [2, NULL, 1, NULL, 1],
            "rrf_score": [0.5, 0.25, 0.75, 0.25, NULL],
        },
        schema_overrides={"bm25_score": pl.Float32},
    )
    cosines, teacher = np.array([0.6, 0.1, 0.8, 0.2, 0.9]), np.array([3.0, -1.0, 2.0, 0.0, 5.0])
    found = features(block, [cosines, teacher], (2, 5))
    assert found.shape == (5, len(FEATURES) + 2)
    # query a's list is full at depth 2: what is not in it scores at most 4; b's holds all that share a word
    bm25 = [9, 4, 4, 7, 0]
    log_ranks = [np.log([1, 2, 3, 1, 3]), np.log([2, 6, 1, 6, 1])]
    expected = [bm25, [0, 5, 5, 0, 7], cosines, [0.2, 0.7, 0, 0.7, 0], *log_ranks, [0.5, 0.25, 0.75, 0.25, 0]]
    expected += [teacher, [0, 4, 1, 5, 0]]
    np.testing.assert_allclose(found, np.array(expected, float).T, atol=1e-12)


def test_no_query_grades_itself():
    """Logits of a fold are those of a model fitted by plain scikit-learn on the other folds."""
    rng = np.random.default_rng(0)
    folds = folds_of(pl.Series([f"q{row // 10}" for row in range(600)]))
    assert set(folds) == set(range(FOLDS)) and all(len(set(folds[row : row + 10])) == 1 for row in range(0, 600, 10))
    is_positive = rng.random(600) < 0.2
    rows = rng.normal(size=(600, 3)) * [1, 100, 0.01] + is_positive[:, None] * [1, 100, 0]
    logits = cross_fit(rows, is_positive, folds).logits(rows, folds)
    for fold in range(FOLDS):
        known = folds != fold
        mean, spread = rows[known].mean(axis=0), rows[known].std(axis=0)
        model = LogisticRegression(class_weight="balanced").fit((rows[known] - mean) / spread, is_positive[known])
        expected = model.decision_function((rows[~known] - mean) / spread)
        np.testing.assert_allclose(logits[~known], expected, atol=1e-3)
    assert roc_auc_score(is_positive, logits) > 0.7


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hybrid")
    write_set(folder / "set")
    return folder, write_encoder(folder / "encoder")


def built(source, name, **keys):
    folder, encoder = source
    recipe = write_recipe(folder / f"{name}.yaml", folder / "set", encoder, **keys)
    main(["--config", str(recipe), "--output_dir", str(folder / name)])
    return pq.read_table(folder / name / "scores" / "scores.parquet")


def test_without_a_teacher_the_hybrid_grades(source, capsys):
    """Its labels are the logistic function of its scores, and no second calibration."""
    import json

    found = built(source, "plain", teacher={"kind": "hybrid"})
    folder, _ = source
    facts = json.loads((folder / "plain" / "scores" / "manifest.json").read_text())["calibration"]
    assert (facts["a"], facts["b"]) == (1, 0) and set(facts["weights"]) == set(FEATURES)
    labels = np.clip(expit(found["teacher_score"].to_numpy().astype(float)), 1e-4, 1 - 1e-4)
    np.testing.assert_allclose(found["label"].to_numpy(), labels, rtol=1e-4)
    retrieved = found["rrf_rank"].is_valid().to_numpy(zero_copy_only=False)
    is_positive = found["is_positive"].to_numpy(zero_copy_only=False)
    assert facts["auc"] == pytest.approx(roc_auc_score(is_positive[retrieved], labels[retrieved]), abs=1e-3)
    assert facts["auc"] > 0.6
    named = {"kind": "hybrid", "teachers": [{"kind": "bi_encoder", "model": str(folder / "encoder")}]}
    assert not built(source, "named", teacher=named)["label"].equals(found["label"])
    # the default: a recipe that names no teacher
    text = (folder / "plain.yaml").read_text().replace("teacher:\n  kind: hybrid\n", "")
    assert "teacher" not in text
    (folder / "default.yaml").write_text(text)
    main(["--config", str(folder / "default.yaml"), "--output_dir", str(folder / "default")])
    assert pq.read_table(folder / "default" / "scores" / "scores.parquet").equals(found)


def test_with_few_labels_the_convex_sum_grades(source, capsys, monkeypatch):
    from dataset_builders import candidates, scores

    for module in (candidates, scores):
        monkeypatch.setattr(module, "FEW", 10_000)
    found = built(source, "few", teacher={"kind": "hybrid"})
    assert "too few to fit on: labels come from the convex sum of BM25 (weight 0.35)" in capsys.readouterr().err
    convex = found["convex_score"].fill_null(0.0).to_numpy()
    np.testing.assert_allclose(found["teacher_score"].to_numpy(), convex, rtol=1e-6)
    order = np.argsort(convex, kind="stable")
    assert np.all(np.diff(found["label"].to_numpy()[order]) >= 0) and len(set(convex)) > 20


@pytest.mark.parametrize("ranking", ["bm25", "rrf", "convex"])
def test_a_ranking_grades_by_its_own_scores(source, ranking):
    found = built(source, ranking, teacher={"kind": "retriever", "by": ranking})
    own = found[f"{ranking}_score"]
    np.testing.assert_allclose(found["teacher_score"].to_numpy(), own.fill_null(0.0).to_numpy(), rtol=1e-6)
    assert (own.null_count > 0) == (ranking == "bm25")  # what the dense model alone found
    order = np.argsort(found["teacher_score"].to_numpy(), kind="stable")
    assert np.all(np.diff(found["label"].to_numpy()[order]) >= 0) and len(found["label"].unique()) > 20


def test_a_hybrid_teacher_cannot_be_checked(source):
    with pytest.raises(InputError, match="no reference scorer"):
        built_with = write_recipe(source[0] / "c.yaml", source[0] / "set", source[1], teacher={"kind": "hybrid"})
        main(["--config", str(built_with), "--output_dir", str(source[0] / "c"), "--check_teacher", "5"])
    assert not (source[0] / "c").exists(), "it is told before anything is made"
