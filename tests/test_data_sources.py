from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_data import SHARED_DATA, write_encoder, write_table

from dataset_builders import pydocs, sources
from dataset_builders.build import load_recipe, main
from dataset_builders.cli import InputError
from dataset_builders.folders import read_manifest
from dataset_builders.sources import HubSource, LocalStsSource, PydocsSource, find_folder, read_rows, read_sts

RECIPES = sorted((Path(__file__).parents[1] / "recipes").rglob("*.yaml"))
DATA_RECIPES = [path for path in RECIPES if path.parent.name == "data" or path.name == "data.yaml"]


@pytest.mark.parametrize("path", DATA_RECIPES, ids=lambda path: path.name)
def test_every_recipe_that_ships_is_read(path):
    recipe = load_recipe(str(path), [])
    assert recipe.source.kind in ("pydocs", "local", "hub") and recipe.data_root is None
    assert ".." not in str(recipe.source) and recipe.instruction


def test_the_recipes_were_found():
    assert len(DATA_RECIPES) >= 3


@pytest.fixture
def docstrings(monkeypatch):
    pairs = [pydocs.DocstringPair(f"module.name{row}", f"Summary number {row}", f"Body {row}") for row in range(200)]
    monkeypatch.setattr(pydocs, "docstring_pairs", lambda: pairs)


def test_a_larger_subset_contains_a_smaller_one(docstrings):
    small, large, other = (
        set(read_rows(PydocsSource(kind="pydocs", num_pairs=number, seed=seed), None).documents)
        for number, seed in ((20, 0), (50, 0), (20, 1))
    )
    assert len(small) == 20 and small < large and small != other
    assert read_rows(PydocsSource(kind="pydocs"), None).seen == 200


def test_hub_rows_come_from_load_dataset_with_their_columns_renamed(tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    columns = {"question": ["who", "what", "who"], "answer": ["he", "it", "she"]}
    write_table(folder / "train-00000-of-00001.parquet", **columns, other=[1, 2, 3])
    source = HubSource(kind="hub", dataset=str(folder), columns={"query": "question", "positive": "answer"})
    rows = read_rows(source, None)
    assert sorted(rows.queries.values()) == ["what", "who"] and sorted(rows.documents.values()) == ["he", "it", "she"]
    pairs = {(rows.queries[query], rows.documents[document], split) for query, document, _, split in rows.qrels}
    assert pairs == {("who", "he", "train"), ("what", "it", "train"), ("who", "she", "train")}
    with pytest.raises(InputError, match="no column 'query'"):
        read_rows(HubSource(kind="hub", dataset=str(folder)), None)
    with pytest.raises(InputError, match="dev"):
        read_rows(source.model_copy(update={"split": "dev"}), None)


def test_local_folders_are_found_under_data_root_then_the_variable_then_here(tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name / "set").mkdir(parents=True)
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "two"))
    assert find_folder("set", str(tmp_path / "one")) == tmp_path / "one" / "set"
    assert find_folder("set", None) == tmp_path / "two" / "set"
    monkeypatch.delenv("DATA_ROOT")
    monkeypatch.chdir(tmp_path / "one")
    assert find_folder("set", None) == Path("set")
    with pytest.raises(InputError, match="data_root"):
        find_folder("nothing", None)


def test_sts_scores_are_moved_into_the_open_interval(tmp_path):
    source = LocalStsSource(kind="local", path=str(tmp_path), score_range=(1, 5))
    write_table(tmp_path / "train.parquet", sentence1=list("abc"), sentence2=list("def"), score=[1.0, 2.0, 5.0])
    np.testing.assert_allclose(read_sts(source, None)["label"].to_numpy(), [1e-4, 0.25, 1 - 1e-4], atol=1e-6)
    for scores in ([0.5, 2.0, 5.0], [float("nan"), 2.0, 5.0]):
        write_table(tmp_path / "train.parquet", sentence1=list("abc"), sentence2=list("def"), score=scores)
        with pytest.raises(InputError, match="row 0 is outside score_range"):
            read_sts(source, None)


@pytest.mark.skipif(not (SHARED_DATA / "stsb").is_dir(), reason="the STS benchmark is not on this machine")
def test_the_sts_recipe_builds(tmp_path, capsys):
    recipe = next(path for path in DATA_RECIPES if path.name == "stsb.yaml")
    main(["--config", str(recipe), "--data_root", str(SHARED_DATA), "--output_dir", str(tmp_path / "data")])
    assert pq.read_metadata(next((tmp_path / "data" / "hub" / "sts").iterdir())).num_rows == 5749
    assert read_manifest(tmp_path / "data" / "hub")["rows"] == {"sts": 5749}
    assert "config_name: sts" in (tmp_path / "data" / "hub" / "README.md").read_text()


def test_a_pydocs_build_knows_what_its_pairs_depend_on(docstrings, monkeypatch):
    source = PydocsSource(kind="pydocs", num_pairs=20)
    described = sources.describe_source(source, None)
    assert "numpy" in described["packages"] and described["num_pairs"] == 20
    monkeypatch.setattr(sources.platform, "python_version", lambda: "4.0")
    assert sources.describe_source(source, None) != described


def test_a_source_from_the_hub_builds_end_to_end(tmp_path):
    from tiny_data import write_recipe, write_set

    tiny = write_set(tmp_path / "set")
    corpus = {row["_id"]: row["text"] for row in pq.read_table(tiny / "corpus.parquet").to_pylist()}
    queries = {row["_id"]: row["text"] for row in pq.read_table(tiny / "queries.parquet").to_pylist()}
    qrels = pq.read_table(tiny / "qrels.parquet").to_pylist()
    (tmp_path / "pairs").mkdir()
    for split in ("train", "test"):
        rows = [row for row in qrels if row["split"] == split]
        write_table(
            tmp_path / "pairs" / f"{split}.parquet",
            query=[queries[row["query_id"]] for row in rows],
            positive=[corpus[row["corpus_id"]] for row in rows],
        )
    source = {"kind": "hub", "dataset": str(tmp_path / "pairs"), "eval_splits": ["test"], "num_pairs": 30}
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny, write_encoder(tmp_path / "encoder"), source=source)
    main(["--config", str(recipe), "--output_dir", str(tmp_path / "data")])
    manifest = read_manifest(tmp_path / "data" / "corpus")
    assert manifest["queries"] == {"test": 20, "train": 30} and manifest["pairs_seen"] == 60
