"""STS pairs of a build: which are paired, graded by whom, and how evenly their labels are spread."""

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_data import TOPICS, WORDS, tiny_build, write_encoder, write_recipe

from common.cli import InputError
from common.steps import write_json, write_parquet
from dataset_builders import build
from dataset_builders.calibration import calibrate
from dataset_builders.schema import QUERIES
from dataset_builders.sts import Sts, count_by_bin, pairs_to_grade, spread_over_bins, teacher_of_pairs, write_sts


def test_bins_are_filled_evenly_and_short_ones_run_out():
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.uniform(0, 0.1, 1000), rng.uniform(0.1, 1, 500), [0.95] * 50])
    labels = np.sort(labels)[: -np.count_nonzero((labels > 0.5) & (labels < 0.6)) or None]
    chosen = spread_over_bins(labels, 300, np.random.default_rng(1))
    available, taken = count_by_bin(labels), count_by_bin(labels[chosen])
    assert len(chosen) == len(set(chosen)) == 300
    full = [taken[number] for number in range(10) if taken[number] < available[number]]
    assert len(full) >= 5 and max(full) - min(full) <= 1
    assert all(taken[number] <= max(full) for number in range(10))


@pytest.mark.parametrize("count", [2, 3, 40, 300])
def test_the_pool_holds_neighbours_and_random_pairs(count):
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sts = Sts(num_rows=20, seed=3)  # 100 near pairs wanted: of 300 queries, 100 are anchors
    pool = pairs_to_grade(vectors, sts)
    assert len(pool) == len({tuple(pair) for pair in pool.tolist()}) and (pool[:, 0] < pool[:, 1]).all()
    assert pool.max() < count and len(pool) <= 400
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest = {tuple(sorted((row, int(similarity[row].argmax())))) for row in range(count)}
    shared = nearest & {tuple(pair) for pair in pool.tolist()}
    assert shared == nearest if count < 100 else len(shared) >= 60
    assert pool.tolist() == pairs_to_grade(vectors, sts).tolist()


def test_sts_pairs_are_graded_by_the_teacher_and_hold_no_test_query(tmp_path):
    from sentence_transformers import SentenceTransformer

    rng = np.random.default_rng(0)
    queries = [
        (f"q{row:02d}", " ".join(rng.choice(WORDS, 5)), "test" if row % 3 == 0 else "train") for row in range(TOPICS)
    ]
    for name in ("corpus", "scores"):
        (tmp_path / name).mkdir()
    write_parquet(
        tmp_path / "corpus" / "queries.parquet", pa.table(list(map(list, zip(*queries, strict=True))), schema=QUERIES)
    )
    model = write_encoder(tmp_path / "encoder")
    (tmp_path / "sts").mkdir()
    write_json(tmp_path / "scores" / "manifest.json", {"calibration": {"a": 4.0, "b": -1.0}})
    sections = {"dense": {"model": str(model)}, "teacher": {"kind": "bi_encoder", "model": str(model)}}
    facts = write_sts(
        tiny_build(tmp_path, splits=("train", "test"), sts=Sts(num_rows=50), **sections), tmp_path / "sts"
    )
    rows = pq.read_table(tmp_path / "sts" / "sts.parquet").to_pylist()
    train = {text for _, text, split in queries if split == "train"}
    assert len(rows) == facts["rows"] == 50
    assert all({row["sentence1"], row["sentence2"]} <= train and row["sentence1"] != row["sentence2"] for row in rows)
    encoder = SentenceTransformer(str(model))
    one, other = (
        encoder.encode([row[name] for row in rows], normalize_embeddings=True) for name in ("sentence1", "sentence2")
    )
    expected = 1 / (1 + np.exp(-(4 * (one * other).sum(axis=1) - 1)))
    np.testing.assert_allclose([row["label"] for row in rows], expected, atol=2e-3)  # vectors are kept as float16
    assert sum(count > 0 for count in facts["rows_by_label_bin"]) >= 5


def test_the_dense_model_is_calibrated_on_whole_classes(tmp_path):
    """A text of the positive's class is relevant, too: among the others it would say that near texts mean nothing."""
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS[6 * (row % 4) :][:9], 6)) for row in range(TOPICS)]
    rows = pa.table({"text": texts, "label": [f"class {row % 4}" for row in range(TOPICS)]})
    pq.write_table(rows, tmp_path / "texts.parquet")
    model = write_encoder(tmp_path / "encoder")
    source = {"kind": "local", "path": str(tmp_path / "texts.parquet")}
    keys = {"source": source, "task_type": "classification", "teacher": {"kind": "hybrid"}, "sts": {"num_rows": 20}}
    recipe = write_recipe(tmp_path / "data.yaml", tmp_path, model, **keys)
    build.main(["--config", str(recipe), "--output_dir", str(tmp_path / "data")])
    folder = tmp_path / "data"
    graded = pl.read_parquet(folder / "scores" / "scores.parquet")
    class_of = dict(pl.read_parquet(folder / "corpus" / "classes.parquet").iter_rows())
    of_query = {query: class_of[document] for query, document in graded.filter("is_positive")[:, :2].iter_rows()}
    found = graded.drop_nulls("dense_score")
    is_relevant = np.array([class_of[document] == of_query[query] for query, document in found[:, :2].iter_rows()])
    scores = found["dense_score"].to_numpy()
    expected = calibrate(scores[is_relevant], scores[~is_relevant])[0]
    sections = {"dense": {"model": str(model)}, "teacher": {"kind": "hybrid"}}
    _, calibration = teacher_of_pairs(tiny_build(folder, task_type="classification", **sections))
    assert (calibration.a, calibration.b) == pytest.approx((expected.a, expected.b)) and is_relevant.mean() > 0.2


def test_sts_of_one_query_is_refused(tmp_path):
    for name in ("corpus", "scores"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "corpus" / "queries.parquet", pa.table([["q"], ["text"], ["train"]], schema=QUERIES))
    write_json(tmp_path / "scores" / "manifest.json", {"calibration": {}})
    with pytest.raises(InputError, match="a pair needs two"):
        write_sts(tiny_build(tmp_path, sts=Sts()), tmp_path)
