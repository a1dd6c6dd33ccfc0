"""What is published is found sound, read over HTTP as it was written, and refused with one line when it is not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from local_hub import LocalHub
from test_data_builders import PUBLISH, STEPS, rows_of, write_build

from common.cli import InputError
from common.steps import MANIFEST, files_of, folder_step, read_manifest, write_json
from dataset_builders import builders
from dataset_builders.builders import write_hub
from dataset_builders.card import REPO_ID, card_for, card_metadata
from dataset_builders.verify import (
    check_configs,
    check_files,
    check_places,
    check_rows,
    describe_dataset,
    in_clean_process,
    verify_dataset,
)

PAGE = f'# A set\n\n```python\nload_dataset("{REPO_ID}", "train")\n```\n'


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A published folder with shards of a kilobyte, as a build leaves it; its card is the YAML and a few lines."""
    folder = tmp_path_factory.mktemp("build")
    write_build(folder)
    recipe = {"task_type": "classification", "source": {"path": "set"}}
    with pytest.MonkeyPatch.context() as patched, folder_step(folder / "hub", {}) as step:
        patched.setattr(
            builders,
            "render_card",
            lambda configs, facts: f"---\n{card_metadata(configs, recipe, 'CC BY 4.0', None).to_yaml()}\n---\n{PAGE}",
        )
        step.finish(counts=["rows"], **write_hub(folder, STEPS, {}, step.path, "1KB", PUBLISH))
    return folder / "hub"


@pytest.fixture
def copy(hub, tmp_path) -> Path:
    return shutil.copytree(hub, tmp_path / "hub")


def paths_of(folder: Path) -> dict[str, list[Path]]:
    return {name: sorted((folder / name).glob("*.parquet")) for name in read_manifest(folder)["rows"]}


def rewrite(folder: Path, config: str, column: str, change) -> None:
    """Change a column of the config's first shard, and the manifest with it: as a defect in the build would."""
    path = paths_of(folder)[config][0]
    table = pq.read_table(path)
    values = change(table[column].to_pylist())
    place = table.column_names.index(column)
    pq.write_table(table.set_column(place, table.schema.field(place), pa.array(values, table[column].type)), path)
    sign(folder)


def sign(folder: Path) -> None:
    write_json(folder / MANIFEST, {**read_manifest(folder), "files": files_of(folder)})


def test_a_sound_folder_gives_its_facts(hub):
    facts = verify_dataset(hub)
    rows = read_manifest(hub)["rows"]
    assert len(rows) == 10 and {name: config["rows"] for name, config in facts["configs"].items()} == rows
    assert facts["rows"] == sum(rows.values()) and facts["configs"]["sts"]["features"]["label"]["dtype"] == "float32"
    on_disk = {path.relative_to(hub).as_posix() for path in hub.rglob("*") if path.is_file()}
    assert set(facts["files"]) == on_disk - {MANIFEST} and len(on_disk) > 11
    sizes = [path.stat().st_size for path in (hub / "candidates").glob("*.parquet")]
    assert facts["configs"]["candidates"]["bytes"] == sum(sizes) and len(sizes) == 2


def test_everything_that_is_wrong_is_told_in_one_line(copy):
    rewrite(copy, "sts", "label", lambda labels: [1.5])
    rewrite(copy, "documents", "document_id", lambda ids: [ids[1], *ids[1:]])
    card = (copy / "README.md").read_text()
    rows = read_manifest(copy)["rows"]["candidates"]
    (copy / "README.md").write_text(card.replace(f"num_examples: {rows}", f"num_examples: {rows + 1}") + "/home/me/x")
    sign(copy)
    with pytest.raises(InputError) as caught:
        verify_dataset(copy)  # `datasets` itself finds the card wrong, so the rest is not looked at
    assert "NonMatchingSplitsSizes" in str(caught.value) and "\n" not in str(caught.value)
    (copy / "README.md").write_text(card + " /home/me/x")
    sign(copy)
    with pytest.raises(InputError) as caught:
        verify_dataset(copy)
    message = str(caught.value)
    for words in (
        "sts: label is outside (0, 1) (1 rows)",
        "documents: document_id that another row has (1 rows)",
        "candidates: document_id is in no row of documents",
        "README.md names a folder of this machine",
    ):
        assert words in message
    assert message.startswith(f"{copy}: not to be published: ") and "\n" not in message


def add_shard_of_another_version(folder):
    shutil.copy(paths_of(folder)["sts"][0], folder / "sts" / "train-00000-of-00001-00000000.parquet")


def link_away(folder):
    path = paths_of(folder)["sts"][0]
    path.rename(folder.parent / "elsewhere")
    path.symlink_to(folder.parent / "elsewhere")


FILES = {
    "a shard is gone": (lambda folder: paths_of(folder)["train"][0].unlink(), "is missing"),
    "a shard was cut": (lambda folder: paths_of(folder)["train"][0].write_bytes(b"PAR1"), "was altered"),
    "an old shard was left": (add_shard_of_another_version, "00000000.parquet was not made by the build"),
    "code": (lambda folder: (folder / "data.py").write_text("1"), "data.py was not made by the build"),
    "a pickle that is signed": (
        lambda folder: ((folder / "train" / "x.pkl").write_bytes(b"\x80"), sign(folder)),
        "train/x.pkl is neither Parquet nor the card nor a plot",
    ),
    "code that is signed": (
        lambda folder: ((folder / "hub.py").write_text("1"), sign(folder)),
        "hub.py is neither Parquet",
    ),
    "a link": (link_away, "is a link"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "not a finished folder"),
    "another step's manifest": (lambda folder: write_json(folder / MANIFEST, {"files": {}}), "is not that of a pub"),
    "a manifest that is no JSON": (lambda folder: (folder / MANIFEST).write_text("{"), "not readable as JSON"),
}


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_not_as_they_were_made_are_refused(case, copy):
    change, message = FILES[case]
    change(copy)
    with pytest.raises(InputError, match=message) as caught:
        verify_dataset(copy)
    assert "\n" not in str(caught.value)


def test_many_problems_stay_one_line(copy):
    for number in range(300):
        (copy / f"{number}.txt").write_text("")
    with pytest.raises(InputError, match="and 290 more; build it again") as caught:
        verify_dataset(copy)
    assert len(str(caught.value)) < 1000 and len(check_files(copy, read_manifest(copy))) == 300


def with_first(value):
    return lambda values: [value, *values[1:]]


ROWS = {
    "label of 1": ("candidates", "label", with_first(1.0), "candidates: label is outside (0, 1)"),
    "label of NaN": ("candidates", "label", with_first(float("nan")), "candidates: label is outside (0, 1)"),
    "label of null": ("candidates", "label", with_first(None), "candidates: label is null"),
    "score of NaN": ("candidates", "teacher_score", with_first(float("nan")), "teacher_score is not finite"),
    "sts label of 0": ("sts", "label", with_first(0.0), "sts: label is outside (0, 1)"),
    "a label too few": ("train", "label", lambda rows: [rows[0][1:], *rows[1:]], "train: label has not 4 values"),
    "a label too many": ("train-n5", "label", lambda rows: [[*rows[0], 0.5], *rows[1:]], "label has not 6 values"),
    "a label of a row is 2": (
        "train",
        "label",
        lambda rows: [[2, *rows[0][1:]], *rows[1:]],
        "train: label is outside",
    ),
    "an id twice": ("queries", "query_id", lambda ids: [ids[1], *ids[1:]], "queries: query_id that another row has"),
    "no id": ("documents", "document_id", with_first(None), "documents: document_id is null"),
    "no text": ("documents", "text", with_first(None), "documents: text is null"),
    "unknown query": ("candidates", "query_id", with_first("x"), "candidates: query_id is in no row of queries"),
    "unknown document": ("qrels", "document_id", with_first("x"), "qrels: document_id is in no row of documents"),
    "class of nothing": ("classes", "document_id", with_first("x"), "classes: document_id is in no row of documents"),
    "unknown query text": ("train", "query", with_first("x"), "train: query is in no row of queries"),
    "unknown positive": ("train", "positive", with_first("x"), "train: positive is in no row of documents"),
    "unknown negative": ("train-n5", "negative_5", with_first("x"), "negative_5 is in no row of documents"),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_that_would_train_wrongly_are_told(case, copy):
    config, column, change, message = ROWS[case]
    assert check_rows(paths_of(copy)) == []
    rewrite(copy, config, column, change)
    assert any(message in problem and "(1 rows)" in problem for problem in check_rows(paths_of(copy)))


def test_what_datasets_read_is_compared_with_card_and_manifest(hub):
    found = in_clean_process(describe_dataset, hub, library="datasets")
    rows = read_manifest(hub)["rows"]
    assert check_configs(hub, rows, found) == []

    def changed(name, **facts):
        return {**found, name: {**found[name], **facts}}

    other = {"query": {"dtype": "int64", "_type": "Value"}}
    for facts, message in (
        (changed("sts", rows=7), "config 'sts' has 7 rows, and 1 in the manifest"),
        (changed("sts", rows_in_card=None), "config 'sts' has 1 rows, and None in the card"),
        (changed("train", features=other), "has other columns than the card"),
        (changed("train", features_in_card=None), "has other columns than the card"),
        (changed("qrels", splits=["train", "test"]), "config 'qrels' has splits train, test"),
        (changed("qrels", streams_the_same=False), "config 'qrels' gives other rows when it is streamed"),
    ):
        assert any(message in problem for problem in check_configs(hub, rows, facts))
    assert "the card has configs" in check_configs(hub, {**rows, "more": 1}, found)[0]


@pytest.mark.parametrize("where", ["card", "plot", "notes in Parquet", "ids", "somebody's home"])
def test_places_of_the_publisher_are_not_told(where, copy):
    assert check_places(copy, paths_of(copy)) == []
    path = {"plot": copy / "assets" / "labels.png", "notes in Parquet": paths_of(copy)["sts"][0]}.get(where)
    if where == "card":
        (copy / "README.md").write_text(f"made in {copy.parent}")
    elif where == "somebody's home":
        (copy / "README.md").write_text("path: '/Users/me/set'")
    elif where == "plot":
        path.write_bytes(b"\x89PNG tEXt" + str(copy).encode() + b"\xff")
    elif where == "ids":
        rewrite(copy, "documents", "document_id", with_first(f"{copy}/1.txt"))
    else:
        table = pq.read_table(path)
        pq.write_table(table.replace_schema_metadata({"source": str(Path.cwd() / "x")}), path)
    problems = check_places(copy, paths_of(copy))
    assert len(problems) == 1 and problems[0].endswith("names a folder of this machine")


def test_an_id_may_look_like_a_path_and_a_card_may_name_a_page(copy):
    rewrite(copy, "documents", "document_id", with_first("/home/about.html"))
    (copy / "README.md").write_text("see https://example.org/home/about")
    assert check_places(copy, paths_of(copy)) == []


def test_a_process_that_ends_badly_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"plain datasets cannot use it: .*") as caught:
        in_clean_process(describe_dataset, tmp_path, library="datasets")
    assert "\n" not in str(caught.value)


PUSH = """
import sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("org/data", repo_type="dataset", private=True)
api.upload_folder(folder_path=sys.argv[1], repo_id="org/data", repo_type="dataset", ignore_patterns=["manifest.json"])
"""
READ = """
import json
from datasets import get_dataset_config_names, load_dataset
found = {}
for name in get_dataset_config_names("org/data"):
    rows = load_dataset("org/data", name)["train"]
    streamed = load_dataset("org/data", name, split="train", streaming=True)
    assert streamed.features == rows.features and list(streamed) == rows.to_list(), name
    found[name] = rows.to_list()
assert load_dataset("org/data")["train"].to_list() == found["train"]
print(json.dumps(found))
"""
MINE = """
from huggingface_hub import snapshot_download
from dataset_builders.builders import GradedDataset
folder = snapshot_download("org/data", repo_type="dataset")
builder = GradedDataset(config_name="train", data_dir=folder, margin=0.9, num_negatives=5)
builder.download_and_prepare()
builder.as_dataset(split="train").to_parquet("MINED")
"""


def test_what_is_pushed_is_what_a_stranger_reads(copy, tmp_path):
    (copy / "README.md").write_text(card_for(copy, "org/data"))
    with LocalHub(tokens={"hf_write": "write", "hf_read": "read"}) as server:

        def run(code: str, home: str, token: str, *arguments: str) -> str:
            command = [sys.executable, "-c", code, *arguments]
            environment = {"PATH": "/usr/bin:/bin", **server.environment(tmp_path / home, token)}
            environment["PYTHONPATH"] = str(Path(__file__).parents[1]) if code == MINE else ""
            (tmp_path / home).mkdir(exist_ok=True)
            done = subprocess.run(
                command, cwd=tmp_path / home, env=environment, capture_output=True, text=True, timeout=120
            )
            assert done.returncode == 0, done.stderr
            return done.stdout

        run(PUSH, "publisher", "hf_write", str(copy))
        pushed = server.files("org/data", "dataset")
        assert MANIFEST not in pushed and b'load_dataset("org/data", "train")' in pushed["README.md"]
        found = json.loads(run(READ, "stranger", "hf_read").splitlines()[-1])
        assert list(found) == list(read_manifest(copy)["rows"]) and len(paths_of(copy)["candidates"]) == 2
        for name, paths in paths_of(copy).items():
            assert found[name] == pa.concat_tables(map(pq.read_table, paths)).to_pylist() and found[name]
        run(MINE, "other", "hf_read")
    mined = pq.read_table(tmp_path / "other" / "MINED").replace_schema_metadata()
    assert mined.equals(rows_of(copy, tmp_path / "cache", margin=0.9, num_negatives=5)) and len(mined) > 5
    label = np.array(mined["label"].to_pylist())
    assert (label[:, 1:] < 0.9 * label[:, :1]).all()
