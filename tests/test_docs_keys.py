"""docs/keys.md is what --list_keys prints: every key, with its default and meaning; no page has a dead link."""

import contextlib
import dataclasses
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sentence_transformers import SentenceTransformerTrainingArguments
from test_release_model_card import anchors, links
from trl import ModelConfig

import train_st
from dataset_builders import build
from eval import ablate
from modeling.keys import DEFAULTS, REFUSED

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "keys.md"
COMMANDS = {"train_st": train_st, "dataset_builders.build": build, "eval.ablate": ablate}


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    texts = {}
    for name, command in COMMANDS.items():
        with contextlib.redirect_stdout(io.StringIO()) as out:
            command.main(["--list_keys"])
        texts[name] = out.getvalue()
    return texts


def test_the_page_is_what_the_commands_print(printed):
    page = PAGE.read_text(encoding="utf-8")
    for name, text in printed.items():
        assert f"## python -m {name} --list_keys\n\n{text}" in page, "run `make docs`"


def test_every_key_has_a_meaning_and_those_of_libraries_their_default(printed):
    lines = {name: re.findall(r"^- `([\w.]+)` \((.*?)\): (.*)$", text, re.MULTILINE) for name, text in printed.items()}
    assert all(len(found) > 9 for found in lines.values())
    assert [name for found in lines.values() for name, _, meaning in found if not meaning] == []
    shown = {name: default for name, default, _ in lines["train_st"]}
    fields = {
        field.name: field
        for kind in (SentenceTransformerTrainingArguments, ModelConfig)
        for field in dataclasses.fields(kind)
    }
    assert {name for name, field in fields.items() if field.init} - set(REFUSED) <= set(shown)
    for name, field in fields.items():
        if name in shown and isinstance(field.default, int | float) and name not in DEFAULTS:
            assert float(shown[name].replace("true", "1").replace("false", "0")) == field.default, name


TYPOS = {
    "train_st": ["--config", "recipes/demo/train.yaml", "--learning_rat", "1"],
    "dataset_builders.build": ["--config", "recipes/demo/data.yaml", "--output_dir", "none", "--margn", "1"],
    "eval.ablate": ["--config", "recipes/ablations/labels.yaml", "--output_dir", "none", "--sed", "1"],
}


@pytest.mark.parametrize("module", [*COMMANDS, "push_to_hub", "eval.retrieval", "eval.run_mteb", "eval.report"])
def test_help_and_a_wrong_key_wait_for_no_library(module):
    """Importing torch and its like takes some seven seconds."""
    slow = {"torch", "transformers", "sentence_transformers", "datasets", "peft", "trl", "mteb"}
    for flags in [["--help"], *([TYPOS[module]] if module in TYPOS else [])]:
        program = f"""
import atexit, importlib, sys
atexit.register(lambda: print("imported:", sorted({slow!r} & {{*sys.modules}})))
sys.argv[0] = "{module}"
command = importlib.import_module("{module}")
command.run(command.main, {flags!r})
"""
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.endswith("imported: []\n")
        assert done.returncode == (0 if flags == ["--help"] else 2), done.stderr
        assert flags == ["--help"] or "did you mean" in done.stderr


def test_no_dead_link_in_readme_and_docs():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    assert len(pages) >= 3
    for page in pages:
        text = page.read_text()
        for link in links(text):
            if not link.startswith(("http://", "https://")):
                name, _, anchor = link.partition("#")
                assert not name or (page.parent / name).exists(), f"{page.name}: {link}"
                assert not anchor or name or anchor in anchors(text), f"{page.name}: {link}"
