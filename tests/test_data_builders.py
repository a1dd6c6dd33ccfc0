"""What is published: every config by stock `datasets`, other margins from the published grades, shards and caches."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from datasets import List, Value
from hypothesis import given
from hypothesis import strategies as st
from test_data_mine import table_of, write_graded
from tiny_data import tiny_build

from common.cli import InputError
from common.steps import files_of, folder_step, write_parquet
from dataset_builders import builders
from dataset_builders.builders import GradedConfig, GradedDataset, write_hub
from dataset_builders.card import card_metadata
from dataset_builders.mine import Mining, write_mined
from dataset_builders.schema import STS

MINING = Mining(num_negatives=3)
STEPS = ("corpus", "candidates", "scores", "mined", "audit", "sts")
PUBLISH = (Mining(num_negatives=5), Mining(num_negatives=4, margin=0.9, strategy="random", seed=2))
PUBLISH += (Mining(num_negatives=3, relabel="exclude"),)


def write_build(folder: Path, mining: Mining = MINING, **keys) -> Path:
    """The step folders of a build, with manifests."""
    write_graded(folder / "made", row_groups=((0, 5), (5, 12)), **keys)
    for name in ("corpus", "scores", "mined", "audit", "sts"):
        with folder_step(folder / name, {}) as step:
            if name in ("corpus", "scores"):
                shutil.copytree(folder / "made" / name, step.path, dirs_exist_ok=True)
            if name == "mined":
                write_mined(tiny_build(folder, mining=mining), step.path)
            if name == "audit":
                (step.path / "labels.png").write_bytes(b"a picture")
            if name == "sts":
                write_parquet(step.path / "sts.parquet", table_of([("one", "two", 0.5)], STS))
            step.finish(counts=[])
    return folder


def plain_card(configs, facts):
    """The YAML that the card starts with, without the page below it, which asks for every step's facts."""
    recipe = {"task_type": "retrieval", "source": {"path": "set"}}
    return f"---\n{card_metadata(configs, recipe, None, None).to_yaml()}\n---\n"


@pytest.fixture(autouse=True)
def _plain_card(monkeypatch):
    monkeypatch.setattr(builders, "render_card", plain_card)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A build and what is published of it, only to be read."""
    build = write_build(tmp_path_factory.mktemp("made") / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builders, "render_card", plain_card)
        return build, publish(build, build / "hub")


@pytest.fixture
def build(made, tmp_path) -> Path:
    return Path(shutil.copytree(made[0], tmp_path / "data"))


@pytest.fixture
def hub(build) -> Path:
    return build / "hub"


def publish(build: Path, folder: Path, sets=PUBLISH, size="500MB") -> Path:
    folder.mkdir(exist_ok=True)
    write_hub(build, STEPS, {}, folder, size, sets)
    return folder


def published_rows(hub: Path, name: str) -> int:
    return sum(pq.read_metadata(path).num_rows for path in (hub / name).glob("*.parquet"))


def mined_anew(build: Path, mining: Mining) -> pa.Table:
    """What the build itself mines, as published: without the ids."""
    folder = build.parent / mining.config_name()
    folder.mkdir(exist_ok=True)
    write_mined(tiny_build(build, mining=mining), folder)
    return pq.read_table(folder / "mined.parquet").drop_columns(["query_id", "positive_id", "negative_ids"])


def rows_of(folder: Path, cache: Path, **arguments) -> pa.Table:
    builder = GradedDataset(data_dir=str(folder), cache_dir=str(cache), **arguments)
    builder.download_and_prepare()
    return builder.as_dataset(split="train").with_format("arrow")[:].combine_chunks()


def columns(text):
    """Column -> type, of `column type, column type`."""
    return dict(column.split() for column in text.split(", "))


def train_columns(count):
    return dict.fromkeys(["query", "positive", *(f"negative_{rank}" for rank in range(1, count + 1))], "string")


COLUMNS = {
    "train": train_columns(3),
    "train-n5": train_columns(5),
    "train-n4-m90-random-s2": train_columns(4),
    "train-n3-exclude": train_columns(3),
    "positives-none": columns("query string, positive string"),
    "positives-exclude": columns("query string, positive string"),
    "positives": columns("query string, positive string"),
    "candidates": columns(
        "query_id string, document_id string, bm25_rank int32, bm25_score float32, dense_rank int32, "
        "dense_score float32, rrf_score float64, rrf_rank int32, convex_score float64, convex_rank int32, "
        "teacher_score float32, label float32, is_positive bool"
    ),
    "documents": columns("document_id string, text string, group string"),
    "queries": columns("query_id string, text string, split string"),
    "qrels": columns("query_id string, document_id string, score int32, split string"),
    "classes": columns("document_id string, class string"),
    "sts": columns("sentence1 string, sentence2 string, label float32"),
}


def test_every_config_loads_without_our_code(hub, tmp_path):
    script = f"""
import json, os, sys
os.environ["HF_DATASETS_CACHE"], os.environ["HF_HUB_OFFLINE"] = {str(tmp_path / "cache")!r}, "1"
from datasets import get_dataset_config_names, load_dataset
folder = {str(hub)!r}
found = {{}}
for name in get_dataset_config_names(folder):
    rows = load_dataset(folder, name, split="train")
    streamed = load_dataset(folder, name, split="train", streaming=True)
    assert streamed.features == rows.features and list(streamed) == rows.to_list(), name
    found[name] = [rows.features.to_dict(), rows.to_list()]
print(json.dumps(found))
assert not any(module.startswith(("common", "dataset_builders")) for module in sys.modules)
"""
    answer = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    found = yaml.safe_load(answer.stdout.splitlines()[-1])
    assert set(found) == set(COLUMNS)
    for name, columns in COLUMNS.items():
        features, rows = found[name]
        expected = datasets.Features({column: Value(kind) for column, kind in columns.items()})
        if name.startswith("train"):
            expected["label"] = List(Value("float32"))
            assert all(len(row["label"]) == len(columns) - 1 for row in rows)
        assert list(features) == list(expected) and datasets.Features.from_dict(features) == expected
        assert rows
    built = pq.read_table(hub.parent / "scores" / "scores.parquet").to_pylist()
    assert found["candidates"][1] == built and len(built) == 240
    texts = {row["document_id"]: (row["text"], row["group"]) for row in found["documents"][1]}
    assert len(texts) == 60 and texts["d08"] == ("text of 8", "d08") and texts["d09"] == ("text of 9", "d08")
    assert texts["d10"] == ("text of 10", None)


def test_the_recipes_rows_come_first_and_all_sets_are_as_asked_for(made, tmp_path):
    build, hub = made
    assert list(pq.read_schema(next((hub / "train").iterdir())).names) == [*COLUMNS["train"], "label"]
    assert list(builders._files_by_config(hub)) == list(COLUMNS)
    assert (hub / "assets" / "labels.png").read_bytes() == b"a picture"
    names = {path.relative_to(hub).parts[0] for path in hub.rglob("*") if path.is_file()}
    assert names == {*COLUMNS, "assets", "README.md"}
    for mining in (MINING, *PUBLISH):
        name = "train" if mining == MINING else mining.config_name()
        published = rows_of(hub, tmp_path / "cache", config_name=name)
        stored = pa.concat_tables(map(pq.read_table, sorted((hub / name).glob("*.parquet"))))
        assert published.equals(stored.replace_schema_metadata()) and published.equals(mined_anew(build, mining))
        # what training never takes for a negative goes along
        beside = pq.read_table(build.parent / mining.config_name() / "positives.parquet")
        assert rows_of(hub, tmp_path / "cache", config_name=f"positives-{mining.relabel}").equals(beside)
        assert len(beside) == published_rows(hub, f"positives-{mining.relabel}")
    assert published_rows(hub, "positives-exclude") > published_rows(hub, "positives")


@pytest.mark.parametrize(
    "mining",
    [Mining(margin=0.9, num_negatives=5), Mining(margin=1.0), Mining(num_negatives=4, strategy="random", seed=7)],
    ids=str,
)
def test_other_margins_need_neither_the_teacher_nor_the_build(build, hub, tmp_path, mining):
    stranger = tmp_path / "downloaded"
    for name in ("README.md", "candidates", "documents", "queries", "classes"):
        copy = shutil.copytree if (hub / name).is_dir() else shutil.copy
        stranger.mkdir(exist_ok=True)
        copy(hub / name, stranger / name)
    expected = mined_anew(build, mining)
    assert len(expected) > 5 and not expected.equals(mined_anew(build, MINING))
    for folder in (build, stranger):
        assert rows_of(folder, tmp_path / folder.name, **mining.model_dump()).equals(expected)
    # the others at their defaults
    changed = mining.model_dump(exclude_defaults=True)
    assert rows_of(stranger, tmp_path / "short", config_name="train", **changed).equals(expected)
    assert rows_of(stranger, tmp_path / "named", config_name=mining.config_name()).equals(expected)


def test_sets_without_classes_or_near_duplicates(tmp_path):
    """A retrieval set has no classes; one without near duplicates has no groups."""
    mining = Mining(num_negatives=9)
    build = write_build(tmp_path / "data", mining)
    before = mined_anew(build, mining)
    with folder_step(build / "corpus", {"again": True}) as step:
        for name in ("documents.arrow", "queries.parquet", "qrels.parquet"):
            shutil.copy(build / "corpus" / name, step.path)
        groups = pq.read_table(build / "corpus" / "groups.parquet").slice(0, 0)
        write_parquet(step.path / "groups.parquet", groups)
        step.finish(counts=[])
    hub = publish(build, tmp_path / "hub", ())
    assert not (hub / "classes").exists()
    shutil.rmtree(tmp_path / mining.config_name())
    expected = mined_anew(build, mining)
    assert rows_of(hub, tmp_path / "cache", num_negatives=9).equals(expected)
    assert len(expected) >= len(before) and not expected.equals(before), "the case this test is about"


def test_shards_keep_a_querys_candidates_together_and_a_missing_one_is_named(build, tmp_path, monkeypatch):
    monkeypatch.setattr(builders, "TEXT_ROWS", 5)
    hub = publish(build, tmp_path / "hub", size="1KB")
    first, second = shards = sorted((hub / "candidates").glob("*.parquet"))
    assert [path.name[:20] for path in shards] == ["train-00000-of-00002", "train-00001-of-00002"]
    queries = [set(pq.read_table(path)["query_id"].to_pylist()) for path in shards]
    assert [len(part) for part in queries] == [5, 7] and not queries[0] & queries[1]
    assert rows_of(hub, tmp_path / "cache", num_negatives=3).equals(mined_anew(build, MINING))
    # a reader of documents holds a row group at a time, and so does the builder
    files = [pq.read_metadata(path) for path in (hub / "documents").iterdir()]
    groups = [file.row_group(number).num_rows for file in files for number in range(file.num_row_groups)]
    assert sum(groups) == 60 and max(groups) == 5
    for path in (second, first):
        path.unlink()
        with pytest.raises(InputError, match="no such file; download config 'candidates' whole"):
            rows_of(hub, tmp_path / "cache", margin=0.9)


@pytest.mark.parametrize("pattern", ["/etc/*", "../*/train-*-00000000.parquet", "train/*"])
def test_a_card_that_names_files_elsewhere_is_refused(hub, tmp_path, pattern):
    card = (hub / "README.md").read_text()
    (hub / "README.md").write_text(re.sub(r"path: train/\S+", f"path: {pattern}", card))
    with pytest.raises(InputError, match="are none that graded-embedder published"):
        rows_of(hub, tmp_path / "cache")


def test_a_killed_run_leaves_nothing_in_what_is_published(build, tmp_path):
    whole = publish(build, tmp_path / "whole")
    killed = tmp_path / "killed"
    (killed / "scratch" / "files.incomplete").mkdir(parents=True)
    (killed / "scratch" / "files.incomplete" / "graded-train-00000-00003-of-NNNNN.parquet").write_bytes(b"cut off")
    shutil.copytree(whole / "train", killed / "train")
    publish(build, killed)
    assert files_of(killed) == files_of(whole) and len(files_of(whole)) == len(COLUMNS) + 2


def test_changed_data_are_not_answered_from_the_cache(build, tmp_path):
    """`datasets` keys a builder's cache by its arguments; here the path stays and the data behind it change."""
    first = rows_of(build, tmp_path / "cache", num_negatives=3)
    shutil.rmtree(build)
    write_build(build, seed=1)
    second = rows_of(build, tmp_path / "cache", num_negatives=3)
    assert not first.equals(second) and second.equals(mined_anew(build, MINING))


@given(st.integers(1, 1000), st.integers(1, 30), st.sampled_from(["top", "random"]), st.integers(0, 5))
def test_a_name_says_how_the_set_was_mined(thousandths, num_negatives, strategy, seed):
    seed = seed if strategy == "random" else 0  # it decides nothing else
    mining = Mining(margin=thousandths / 1000, num_negatives=num_negatives, strategy=strategy, seed=seed)
    assert GradedConfig(name=mining.config_name()).mining == mining


BAD_ARGUMENTS = {
    "unknown config": ({"config_name": "train-nine"}, "there are train, positives.* names like train-n7-m90"),
    "name and argument": ({"config_name": "train-n7", "margin": 0.9}, "takes no margin"),
    "margin above one by name": ({"config_name": "train-n7-m150"}, "margin: Input should be less"),
    "more negatives than there are": ({"num_negatives": 60}, "lower --num_negatives"),
}


@pytest.mark.parametrize("case", BAD_ARGUMENTS)
def test_bad_arguments_are_refused(case, made, tmp_path):
    arguments, message = BAD_ARGUMENTS[case]
    with pytest.raises(InputError, match=message):
        rows_of(made[0], tmp_path / "cache", **arguments)


def test_folders_without_the_data_are_refused(build, hub, tmp_path):
    cache = tmp_path / "cache"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither a build nor a published data set"):
        rows_of(tmp_path / "empty", cache)
    (build / "scores" / "scores.parquet").unlink()
    with pytest.raises(InputError, match=r"scores\.parquet: not a readable Parquet file"):
        rows_of(build, cache, margin=0.9)
    shutil.rmtree(hub / "classes")  # without them, documents of the positive's class would become negatives
    with pytest.raises(InputError, match="download config 'classes' whole"):
        rows_of(hub, cache, margin=0.9)
    (hub / "README.md").write_text("a page without configs")
    with pytest.raises(InputError, match="no config 'train'"):
        rows_of(hub, cache)
