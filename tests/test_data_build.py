import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hub_client import run_python
from local_hub import LocalHub
from tiny_data import write_encoder, write_recipe, write_set, write_table

from common.cli import run
from common.steps import BUILD_FOLDERS, files_of, read_manifest
from dataset_builders.build import main
from dataset_builders.card import card_for
from dataset_builders.sources import HubSource, read_rows
from release.verify import verify_dataset


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    return write_set(folder / "set"), write_encoder(folder / "encoder"), folder


@pytest.fixture(scope="module")
def recipe(inputs):
    source, model, folder = inputs
    return write_recipe(folder / "recipe.yaml", source, model, sts={"num_rows": 50})


@pytest.fixture(scope="module")
def built(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp("built") / "data"
    main(["--config", str(recipe), "--output_dir", str(output)])
    return output


def rows_of(path: Path) -> list[dict]:
    return pq.read_table(path).to_pylist()


def test_mined_rows_keep_contract_3(built):
    labels = {
        (row["query_id"], row["document_id"]): row["label"] for row in rows_of(built / "scores" / "scores.parquet")
    }
    rows = rows_of(built / "mined" / "mined.parquet")
    manifest = read_manifest(built / "mined")
    assert len(rows) >= 30 and len(rows) + sum(manifest["rows_dropped"].values()) == 40
    for row in rows:
        ids = [row["positive_id"], *row["negative_ids"]]
        assert row["label"] == [labels[row["query_id"], document_id] for document_id in ids]
        assert len(set(ids)) == 4 and all(0 < label < 0.95 * row["label"][0] for label in row["label"][1:])
    first = next(row for row in rows if row["query_id"] == "q00")
    retrieved = {document_id for query_id, document_id in labels if query_id == "q00"}
    # the positive's near duplicate was retrieved, and would be the hardest negative of all
    assert "z-near" in retrieved and "z-near" not in first["negative_ids"]
    assert read_manifest(built / "corpus")["exact_duplicate_documents_merged"] == 1  # z-copy
    assert manifest["candidates"]["is_duplicate_of_positive"] >= 1


def test_what_was_built_is_fit_to_publish_and_the_lines_in_its_card_run(built, tmp_path):
    hub = built / "hub"
    facts = verify_dataset(hub)
    files = {name: (hub / name).read_bytes() for name in facts["files"]}
    card = card_for(hub, "org/data")
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", card)
    assert len(links) >= 2 and set(links) <= set(files)
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    shown = ["len(rows)", "len(queries), len(corpus), sum(map(len, relevant_docs.values()))", "rows.column_names[-2:]"]
    script = "\n".join(f"{block}\nprint({values})" for block, values in zip(blocks, shown, strict=True))
    with LocalHub() as server:
        server.create("datasets/org/data", {**files, "README.md": card.encode()})
        answer = run_python(script, server, tmp_path)
    assert answer.returncode == 0, answer.stderr
    rows = facts["configs"]["train"]
    assert answer.stdout.splitlines() == [str(rows), "20 61 20", "['negative_5', 'label']"]


def test_what_was_published_is_a_source_again_with_its_splits(built):
    """Its qrels name each judgement's split in a column: no test query is trained on."""
    source = HubSource(kind="hub", dataset=str(built / "hub"), layout="corpus", eval_splits=("test",))
    judged = read_rows(source, None).qrels.rows()
    known = [tuple(row.values()) for row in rows_of(built / "corpus" / "qrels.parquet")]
    assert sorted(judged) == sorted(known) and {row[3] for row in known} == {"train", "test"}


def states(command, capsys) -> dict[str, str]:
    main(command)
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    return {line.partition(":")[0]: "before" if "done before" in line else "made" for line in lines}


# Builds the recipe once whole, and once killed thrice, with two shards spoilt after each kill. Small shards, so that
# there are some at any moment. Each build is a fork, made before any work: loading the libraries takes longer.
KILLS = """
import sys
import datasets, matplotlib.pyplot, scipy.special, sentence_transformers, sklearn.linear_model, sklearn.metrics, torch
from pathlib import Path
from dataset_builders import audit, builders, candidates, embeddings, mine, teachers
from dataset_builders.build import main
from kills import changes
embeddings.SHARD, candidates.PART, teachers.SHARD_PAIRS = 8, 16, 64
candidates.SEARCH_BLOCK, candidates.QUERY_BLOCK = 16, 8
recipe, output = sys.argv[1], Path(sys.argv[2])

def build(folder, moment=None):
    return changes(lambda: main(["--config", recipe, "--output_dir", str(folder)]), folder, moment)

made = build(output / "whole")
for moment in (made // 6, made // 3, made // 4):
    assert build(output / "killed", moment) is None
    print("state", *sorted(path.name for path in (output / "killed").glob("*")))
    # vectors once the search is done may be read by nobody, and so stay as they are
    shards = [path for path in sorted((output / "killed").rglob("*-*.npy"))
              if ".partial" in str(path) or not (output / "killed" / "candidates").exists()]
    for path, spoilt in zip(shards, (lambda content: content[:9], lambda content: content[:-1] + b"?")):
        path.write_bytes(spoilt(path.read_bytes()))
        print("spoilt")
build(output / "killed")
"""


def test_a_build_killed_thrice_with_spoilt_shards_comes_to_the_same_bytes(recipe, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parent)
    command = [sys.executable, "-c", KILLS, str(recipe), str(tmp_path / "out")]
    root = Path(__file__).parents[1]
    answer = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    whole = files_without_manifests(tmp_path / "out" / "whole")
    assert len(whole) > 20 and files_without_manifests(tmp_path / "out" / "killed") == whole
    lines = [line for line in answer.stdout.splitlines() if line.startswith(("state", "spoilt"))]
    assert len({*lines}) >= 3 and "spoilt" in lines  # killed in different steps, and resumed from spoilt shards


def test_a_damaged_step_alone_is_made_again(recipe, built, tmp_path, capsys):
    """It makes what it made, so the steps that read it find their inputs as they were."""
    shutil.copytree(built, tmp_path / "data")
    (tmp_path / "data" / "candidates" / "candidates.parquet").unlink()
    redone = states(["--config", str(recipe), "--output_dir", str(tmp_path / "data")], capsys)
    assert [step for step, state in redone.items() if state != "before"] == ["candidates"]


def test_one_document_the_teachers_weights_or_an_option_redo_exactly_what_depends_on_it(inputs, tmp_path, capsys):
    source, model, _ = inputs
    shutil.copytree(source, tmp_path / "set")
    shutil.copytree(model, tmp_path / "teacher")
    teacher = {"kind": "bi_encoder", "model": str(tmp_path / "teacher")}
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "set", model, sts={"num_rows": 50}, teacher=teacher)
    command = ["--config", str(recipe), "--output_dir", str(tmp_path / "data")]

    def redone(*flags: str) -> list[str]:
        return [name for name, state in states([*command, *flags], capsys).items() if state != "before"]

    assert redone() == list(BUILD_FOLDERS) and redone() == []
    assert redone("--margin", "0.5") == ["mined", "audit", "hub"] and redone() == ["mined", "audit", "hub"]
    assert redone("--from_step", "scores") == ["scores", "mined", "audit", "sts", "hub"]
    write_encoder(tmp_path / "other", seed=3)
    weights = next(tmp_path.glob("teacher/**/*.safetensors")).relative_to(tmp_path / "teacher")
    shutil.copyfile(tmp_path / "other" / weights, tmp_path / "teacher" / weights)
    assert redone() == ["scores", "mined", "audit", "sts", "hub"]
    assert redone("--rrf_k", "10") == ["candidates", "scores", "mined", "audit", "sts", "hub"]
    assert redone() == ["candidates", "scores", "mined", "audit", "sts", "hub"]  # and back again
    assert redone("--sts.seed", "1") == ["sts", "hub"]
    assert redone("--dense.batch_tokens", "64", "--teacher.batch_tokens", "64") == ["sts", "hub"]  # the seed, back
    shards = {path.parent.name for path in tmp_path.glob("data/embeddings/*/*.npy")}
    change("corpus.parquet", text=lambda texts: [*texts[:-1], texts[-1] + " end"])(tmp_path / "set")
    assert redone() == list(BUILD_FOLDERS)
    new = {path.parent.name for path in tmp_path.glob("data/embeddings/*/*.npy")} - shards
    assert len(new) == 2  # the documents by two models; the queries' vectors were there


def another_duplicate(folder: Path) -> None:
    """One more document that says what another does: the corpus stays as it was, and what its card counts does not."""
    table = pq.read_table(folder / "corpus.parquet").to_pydict()
    more = {"_id": "z-more", "title": "", "text": table["text"][0]}
    write_table(folder / "corpus.parquet", **{name: [*values, more[name]] for name, values in table.items()})


@pytest.mark.parametrize(
    ("keys", "flags", "edit"),
    [
        # deeper than the corpus: the same candidates, but what the hybrid reads of those not found lies deeper
        ({"teacher": {"kind": "hybrid"}, "fusion": {"top_k": None}}, ["--bm25.top_k", "200"], None),
        ({}, [], another_duplicate),
    ],
)
def test_a_build_that_is_changed_comes_to_what_a_fresh_one_makes(inputs, tmp_path, capsys, keys, flags, edit):
    shutil.copytree(inputs[0], tmp_path / "set")
    recipe = write_recipe(tmp_path / "recipe.yaml", tmp_path / "set", inputs[1], **keys)
    command = ["--config", str(recipe), "--bm25.top_k", "100", "--output_dir"]
    main([*command, str(tmp_path / "changed")])
    before = files_without_manifests(tmp_path / "changed")
    if edit:
        edit(tmp_path / "set")
    redone = states([*command, str(tmp_path / "changed"), *flags], capsys)
    assert redone["candidates"] == ("before" if edit else "made")
    main([*command, str(tmp_path / "fresh"), *flags])
    made = files_without_manifests(tmp_path / "fresh")
    assert files_without_manifests(tmp_path / "changed") == made
    alike = {name for name in made if before.get(name) == made[name]}
    assert "candidates/candidates.parquet" in alike and "hub/README.md" not in alike, "the case this test is about"


def test_ray_builds_the_same_bytes_as_local(recipe, built, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed")
    flags = ["--config", str(recipe), "--output_dir", str(tmp_path / "ray"), "--engine", "ray", "--ray.workers", "1"]
    command = [sys.executable, "-m", "dataset_builders.build", *flags]
    answer = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert files_without_manifests(tmp_path / "ray") == files_without_manifests(built)


def files_without_manifests(folder: Path) -> dict[str, str]:
    return {name: digest for name, digest in files_of(folder).items() if not name.endswith("manifest.json")}


def change(name, **columns):
    """A case that replaces columns of a file of the set (None: leaves the column out)."""

    def apply(folder: Path) -> None:
        table = pq.read_table(folder / name).to_pydict()
        for column, value in columns.items():
            table[column] = value(table[column]) if value else None
        write_table(folder / name, **{column: values for column, values in table.items() if values is not None})

    return apply


def refusal(arguments, capsys) -> str:
    """The one line with which a command refuses its input."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(main, arguments)
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error:" in line]
    assert stop.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


def test_a_teacher_of_nan_is_refused_and_leaves_no_scores(inputs, tmp_path, capsys):
    from safetensors.numpy import load_file, save_file

    shutil.copytree(inputs[1], tmp_path / "teacher")
    weights = next((tmp_path / "teacher").rglob("*.safetensors"))
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(weights).items()}, weights)
    recipe = write_recipe(tmp_path / "recipe.yaml", inputs[0], inputs[1])
    command = ["--config", str(recipe), "--output_dir", str(tmp_path / "data"), "--teacher.model"]
    assert "NaN" in refusal([*command, str(tmp_path / "teacher")], capsys)
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == ["candidates", "corpus", "embeddings"]
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="this system has no /proc")
def test_a_place_without_room_for_folders_is_refused(recipe, capsys):
    assert "no folder can be made here" in refusal(["--config", str(recipe), "--output_dir", "/proc/data"], capsys)


def test_a_bad_model_does_not_cost_the_finished_folders(recipe, built, tmp_path, capsys):
    shutil.copytree(built, tmp_path / "data")
    command = ["--config", str(recipe), "--output_dir", str(tmp_path / "data"), "--from_step", "corpus"]
    refusal([*command, "--dense.model", "./nowhere"], capsys)
    assert (tmp_path / "data" / "mined" / "mined.parquet").is_file()


def test_a_rebuilt_folder_is_not_answered_from_the_cache_of_the_first(recipe, tmp_path):
    """`datasets` 5.2 keys its cache of a folder by name and README alone: equal counts, other rows, same card."""
    from datasets import load_dataset

    found = []
    for seed in (0, 1):
        output = tmp_path / str(seed)
        flags = ["--config", str(recipe), "--output_dir", str(output), "--sts.seed", str(seed)]
        main(flags)
        rows = load_dataset(str(output / "hub"), "sts", split="train", cache_dir=str(tmp_path / "cache")).to_list()
        assert rows == rows_of(output / "sts" / "sts.parquet")
        found.append(rows)
    assert len(found[0]) == len(found[1])
    assert found[0] != found[1], "the case this test is about"
