"""A cross-encoder that is trained on a build's candidates to grade them: what it reads, and what it must not grade."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from sentence_transformers import CrossEncoder
from tiny_data import write_encoder, write_recipe, write_set
from tiny_rerankers import save_classifier

from common.cli import InputError
from common.steps import read_manifest
from dataset_builders import build, train_teacher
from dataset_builders.teachers import fold_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """`data` as built with another teacher, `base` to start from, `teacher` as trained, and the pairs of each fold."""
    folder = tmp_path_factory.mktemp("teacher")
    recipe = write_recipe(folder / "data.yaml", write_set(folder / "set"), write_encoder(folder / "encoder"))
    build.main(["--config", str(recipe), "--output_dir", str(folder / "data")])
    save_classifier(folder / "base")
    (folder / "teacher.yaml").write_text(
        f"data: {folder}/data\noutput_dir: {folder}/teacher\nmodel: {folder}/base\nmax_seq_length: 32\n"
        "num_negatives: 3\nbf16: true\nper_device_train_batch_size: 8\nlearning_rate: 0.01\n"
    )
    seen, train = [], train_teacher.train
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_teacher, "train", lambda recipe, rows, path: seen.append(rows) or train(recipe, rows, path)
        )
        train_teacher.main(["--config", str(folder / "teacher.yaml")])
    for fold, rows in enumerate(seen):
        rows.write_parquet(folder / f"seen-{fold}.parquet")
    return folder


def test_pairs_are_the_labelled_positives_and_other_candidates(folder):
    pairs = train_teacher.labelled_pairs(folder / "data", 3, 0)
    corpus = pl.read_parquet(folder / "set" / "corpus.parquet")["text"].to_list()
    asked = {" ".join(text.split()[:5]): text for text in corpus[:40]}  # as write_set makes them; the rest is tested
    assert pairs["query"].n_unique() == 40 and set(pairs["query"]) == set(asked)
    for query, document, label in pairs.iter_rows():
        is_near = document.lower().removesuffix(" end") == asked[query]
        assert is_near == (label == 1), "neither a positive nor a copy of one is a negative"
    assert pairs.group_by("query").agg(pl.col("label").sum(), pl.len())[["label", "len"]].unique().rows() == [(1.0, 4)]
    assert pairs.equals(train_teacher.labelled_pairs(folder / "data", 3, 0))
    assert not pairs.equals(train_teacher.labelled_pairs(folder / "data", 3, 1))


def test_no_query_is_graded_by_a_model_that_was_trained_on_it(folder):
    sections = ["--teacher.model", str(folder / "teacher" / "without-{fold}"), "--teacher.max_seq_length", "32"]
    graded = ["--config", str(folder / "data.yaml"), "--output_dir", str(folder / "data"), *sections]
    build.main([*graded, "--teacher.kind", "cross_encoder"])
    texts = dict(pl.read_parquet(folder / "set" / "corpus.parquet").select("_id", "text").iter_rows())
    queries = dict(pl.read_parquet(folder / "set" / "queries.parquet").iter_rows())
    models = [CrossEncoder(str(folder / "teacher" / f"without-{fold}"), max_length=32) for fold in (0, 1)]
    seen = [set(pl.read_parquet(folder / f"seen-{fold}.parquet")["query"]) for fold in (0, 1)]
    assert len(seen[0] | seen[1]) == 40 and not seen[0] & seen[1] and min(map(len, seen)) > 5
    scores = pl.read_parquet(folder / "data" / "scores" / "scores.parquet").sample(60, seed=0)
    assert scores["query_id"].n_unique() > 20
    for query_id, document_id, score in scores.select("query_id", "document_id", "teacher_score").iter_rows():
        query = queries[query_id]
        (model,) = (model for model, known in zip(models, seen, strict=True) if query not in known)
        alone = model.predict([(query, texts[document_id])], activation_fn=torch.nn.Identity())[0]
        assert score == pytest.approx(alone, abs=1e-4)
    spread = [model.predict([("bala", "bala core")], activation_fn=torch.nn.Identity())[0] for model in models]
    assert abs(np.diff(spread)[0]) > 1e-3, "two models"


def test_a_hybrid_takes_a_cross_fitted_teacher_as_a_feature(folder):
    teacher = f"{{kind: cross_encoder, model: '{folder}/teacher/without-{{fold}}', max_seq_length: 32}}"
    recipe = write_recipe(folder / "hybrid.yaml", folder / "set", folder / "encoder", teacher={"kind": "hybrid"})
    asked = ["--config", str(recipe), "--output_dir", str(folder / "data"), "--teacher.teachers", f"[{teacher}]"]
    build.main(asked)
    assert "teacher_1" in read_manifest(folder / "data" / "scores")["calibration"]["weights"]


def test_models_are_plain_folders_that_were_trained_and_are_not_trained_again(folder, capsys):
    base = CrossEncoder(str(folder / "base")).model.state_dict()
    for fold in (0, 1):
        trained = CrossEncoder(str(folder / "teacher" / f"without-{fold}"))
        assert trained.num_labels == 1
        assert not torch.equal(trained.model.state_dict()["classifier.weight"], base["classifier.weight"])
    before = read_manifest(folder / "teacher" / "without-0")
    train_teacher.main(["--config", str(folder / "teacher.yaml")])
    assert read_manifest(folder / "teacher" / "without-0") == before
    assert f"{before['pairs']:,} pairs, {before['positives']:,} positive" in capsys.readouterr().out


def test_a_fold_is_decided_by_the_words_of_a_query():
    queries = [f"query {number}" for number in range(200)]
    folds = [fold_of(query, 2) for query in queries]
    assert folds == [fold_of(f" {query.upper()} ", 2) for query in queries] and 70 < sum(folds) < 130


def test_what_no_teacher_can_learn_from_is_told_in_one_line(folder, tmp_path):
    asked = ["--config", str(folder / "teacher.yaml"), "--output_dir", str(tmp_path / "out")]
    for flags, message in [
        (["--data", str(tmp_path)], "corpus: not a finished folder"),
        (["--folds", "40"], "too few queries for 40 folds"),
        (["--model", str(tmp_path)], "no model in this folder"),
        (["--fold", "2"], "unknown option --fold; did you mean 'folds'"),
    ]:
        with pytest.raises(InputError, match=message):
            train_teacher.main([*asked, *flags])
        assert not (tmp_path / "out").exists()
    data = tmp_path / "data"
    for name, files in (("corpus", ("groups.parquet", "queries.parquet", "documents.arrow")), ("candidates", ())):
        (data / name).mkdir(parents=True)
        for file in (*files, "manifest.json"):
            (data / name / file).write_bytes((folder / "data" / name / file).read_bytes())
    source = folder / "data" / "candidates" / "candidates.parquet"
    qrels = pl.read_parquet(folder / "data" / "corpus" / "qrels.parquet")
    for judged, candidates, what in [
        (qrels.with_columns(score=pl.lit(0, pl.Int32)), pl.read_parquet(source), "no labelled positive"),
        (qrels, pl.read_parquet(source).clear(), "no candidate beside the positives"),
    ]:
        judged.write_parquet(data / "corpus" / "qrels.parquet")
        candidates.write_parquet(data / "candidates" / "candidates.parquet")
        with pytest.raises(InputError, match=f"split 'train' has {what}"):
            train_teacher.main([*asked, "--data", str(data)])
    with pytest.raises(InputError, match="1 such folders; a cross-fitted teacher has 2 or more"):
        (tmp_path / "t-0").mkdir()
        recipe = ["--config", str(folder / "data.yaml"), "--output_dir", str(tmp_path / "built")]
        build.main([*recipe, "--teacher.kind", "cross_encoder", "--teacher.model", str(tmp_path / "t-{fold}")])
    with pytest.raises(InputError, match=r"\{fold\} stands in the name of a cross_encoder"):
        build.main([*recipe, "--teacher.model", "t-{fold}"])
