"""The commit of the code that made a folder: of our own repository alone."""

import subprocess
import sys
from pathlib import Path

import pytest

import common.steps
from common.steps import code_commit, folder_step, read_manifest


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """This code as it lies in somebody's folder."""
    file = tmp_path / "code" / "common" / "steps.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    monkeypatch.setattr(common.steps, "__file__", str(file))
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
    (copied / "code" / "common" / "steps.py").write_text("2\n")
    assert code_commit() == f"{head}-dirty"


def test_no_commit_outside_a_repository_of_ours(copied, monkeypatch):
    assert code_commit() is None
    commit(copied)  # that of whoever copied the code into a repository
    assert code_commit() is None
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # without git
    assert code_commit() is None


def test_manifests_tell_the_commit_that_steps_began_with(copied, tmp_path):
    head = commit(copied / "code")
    with folder_step(tmp_path / "made", {"a": 1}) as step:
        (copied / "code" / "common" / "steps.py").write_text("2\n")
        step.finish(rows=3)
    manifest = read_manifest(tmp_path / "made")
    assert (manifest["commit"], manifest["rows"]) == (head, 3)
    with folder_step(tmp_path / "made", {"a": 1}) as step:
        assert step.done  # another commit is no other input


def test_what_a_kill_leaves_beside_a_finished_step_goes(tmp_path):
    """The folder that the finished one took the place of, and one that was being discarded."""
    for value in (1, 2):
        with folder_step(tmp_path / "made", {"a": value}) as step:
            step.finish()
    (tmp_path / "made.outdated").mkdir()
    with folder_step(tmp_path / "made", {"a": 2}) as step:
        assert step.done
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_step_killed_while_it_was_discarded_is_not_gone_on_with(tmp_path, monkeypatch):
    def killed(folder):
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError), folder_step(tmp_path / "made", {"a": 1}) as step:
        (step.path / "half").write_text("of recipe 1")
        raise RuntimeError
    monkeypatch.setattr(common.steps.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt), folder_step(tmp_path / "made", {"a": 2}):
        pass
    monkeypatch.undo()
    with folder_step(tmp_path / "made", {"a": 1}) as step:
        assert not (step.path / "half").exists()
        step.finish()
