"""docs/quickstart.ipynb runs from its first cell to its last, offline, and stores nothing of the machine it ran on."""

import re
import shlex
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from push_to_hub import main as push

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "quickstart.ipynb"
# What makes it quick here: fewer questions and steps.
SHORTER = {"runs/quickstart": "{folder}", "os pathlib shutil": "shutil", "statistics random datetime": "random"}
SHORTER |= {"max_steps: 12": "max_steps: 2"}


def texts(cell) -> str:
    return "".join(output.get("text", "") or str(output.get("data", "")) for output in cell.outputs)


def test_the_notebook_runs_as_it_is_but_shorter(tmp_path, monkeypatch):
    notebook = nbformat.read(PAGE, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) == 8 and not any(cell.outputs or cell.execution_count for cell in code), "no output is stored"
    for old, new in SHORTER.items():
        assert sum(old in cell.source for cell in code) == 1, old
        for cell in code:
            cell.source = cell.source.replace(old, new.format(folder=tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("JUPYTER_CONFIG_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    resources = {"metadata": {"path": str(ROOT / "docs")}}
    NotebookClient(notebook, timeout=None, kernel_name="python3", resources=resources).execute()
    said = [texts(cell) for cell in code]
    assert "questions, such as" in said[1] and "holdout: 0.1" in said[2]
    assert "mined: done" in said[3] and "stage retrieval" in said[4]
    assert "| BM25 |" in said[5] and "| untrained |" in said[5] and "| after retrieval (final) |" in said[5]
    assert "1. 0." in said[6] and "tensor" in said[7]
    assert (tmp_path / "data" / "audit" / "index.html").is_file() and (tmp_path / "results" / "metrics.json").is_file()
    [command] = re.findall(r"push_to_hub.py (.*?)`", "".join(cell.source for cell in notebook.cells))
    push(shlex.split(command.replace("runs/quickstart", str(tmp_path))))


@pytest.mark.parametrize("words", ["/home/", "/tmp/", "/work/", "/Users/"])
def test_it_names_no_folder_of_a_machine(words):
    assert words not in PAGE.read_text()
