"""The commit of the code that trained: of our own repository alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import modeling.ledger
from modeling.ledger import code_commit


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """This code as it lies in somebody's folder."""
    file = tmp_path / "code" / "modeling" / "ledger.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    monkeypatch.setattr(modeling.ledger, "__file__", str(file))
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "x")
    git(folder, "tag", "-m", "v1", "v1")  # describes the commit, too
    return git(folder, "rev-parse", "HEAD")


def test_a_commit_and_what_differs_from_it(copied):
    head = commit(copied / "code")
    assert len(head) == 40 and code_commit() == head
    (copied / "code" / "modeling" / "ledger.py").write_text("2\n")
    assert code_commit() == f"{head}-dirty"


def test_no_commit_outside_a_repository_of_ours(copied, monkeypatch):
    assert code_commit() is None
    commit(copied)  # that of whoever copied the code into a repository
    assert code_commit() is None
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # without git
    assert code_commit() is None
