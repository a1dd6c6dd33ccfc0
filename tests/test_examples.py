"""Examples in docstrings hold, wherever they stand."""

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("common", "dataset_builders", "modeling", "eval", "release", "benchmarks")
FILES = [*ROOT.glob("*.py"), *(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))]
MODULES = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for file in FILES
    if any(">>> " in line and "+SKIP" not in line for line in file.read_text("utf-8").splitlines())
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    assert len(MODULES) > 40
    found = doctest.testmod(importlib.import_module(name))
    assert found.attempted > 0 and found.failed == 0
