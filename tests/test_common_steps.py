"""Finished folders: made once, resumed after a crash, and marked with the commit of the code that made them."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import common.steps
from common.cli import InputError
from common.steps import code_commit, fingerprint, folder_step, read_manifest, row_groups, write_parquet


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
    assert make(folder, {"x": 1}) and not make(folder, {"x": 1})
    assert read_manifest(folder)["rows"] == 1
    assert make(folder, {"x": 2}), "other inputs"
    rows = folder / "rows.parquet"
    whole = rows.read_bytes()
    for damaged in (whole[:20], whole[:-30] + b"?" + whole[-29:], None):
        rows.write_bytes(damaged) if damaged else rows.unlink()
        assert make(folder, {"x": 2}), "a truncated, altered or deleted file"
    (folder.parent / "step.outdated").mkdir()  # a kill right after the new folder got its name
    assert not make(folder, {"x": 2})
    assert [path.name for path in folder.parent.iterdir()] == ["step"]
    (folder / "manifest.json").unlink()
    assert make(folder, {"x": 2}), "no manifest: not known to be whole"
    assert (folder.parent / "step.unknown" / "rows.parquet").is_file(), "nor known to be ours to delete"


def crash(folder: Path, inputs: dict, error: type[BaseException]) -> None:
    with pytest.raises(error), folder_step(folder, inputs) as step:
        (step.path / "shard").write_text(str(inputs))
        raise error


def test_bad_input_leaves_nothing_and_a_crash_leaves_its_shards(tmp_path, monkeypatch):
    crash(tmp_path / "new" / "step", {}, InputError)
    assert list(tmp_path.iterdir()) == []
    crash(tmp_path / "step", {"x": 1}, ZeroDivisionError)
    with folder_step(tmp_path / "step", {"x": 1}) as step:
        assert (step.path / "shard").exists(), "resumed"
        step.finish()
    crash(tmp_path / "step", {"x": 2}, ZeroDivisionError)
    with folder_step(tmp_path / "step", {"x": 3}) as step:
        assert not (step.path / "shard").exists(), "shards of other inputs are no use"
        step.finish()
    # killed while the shards of other inputs were deleted: what is left of them is not resumed
    crash(tmp_path / "step", {"x": 4}, ZeroDivisionError)
    with monkeypatch.context() as patch:
        patch.setattr(common.steps.shutil, "rmtree", lambda folder: sys.exit())
        with pytest.raises(SystemExit), folder_step(tmp_path / "step", {"x": 5}):
            pass
    with folder_step(tmp_path / "step", {"x": 4}) as step:
        assert not (step.path / "shard").exists()
        step.finish()


@given(st.dictionaries(st.text(), st.one_of(st.integers(), st.text(), st.none())))
def test_fingerprints_do_not_depend_on_order(values):
    assert fingerprint(values) == fingerprint(dict(reversed(values.items())))
    assert fingerprint(values) != fingerprint({**values, "another": json.dumps(values)})


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def commit(folder: Path) -> str:
    for arguments in (["init"], ["add", "."], ["commit", "-m", "x"], ["tag", "-m", "v1", "v1"]):
        git(folder, *arguments)
    return git(folder, "rev-parse", "HEAD")


def test_manifests_hold_the_commit_of_this_code_at_the_start_of_the_step(tmp_path, monkeypatch):
    file = tmp_path / "code" / "common" / "steps.py"
    file.parent.mkdir(parents=True)
    file.write_text("1\n")
    monkeypatch.setattr(common.steps, "__file__", str(file))
    assert code_commit() is None
    commit(tmp_path)  # of whoever copied the code into a repository
    assert code_commit() is None
    head = commit(tmp_path / "code")
    assert len(head) == 40 and code_commit() == head
    with folder_step(tmp_path / "made", {"a": 1}) as step:
        file.write_text("2\n")
        step.finish()
    assert read_manifest(tmp_path / "made")["commit"] == head and code_commit() == f"{head}-dirty"
    assert not make(tmp_path / "made", {"a": 1})  # another commit is no other input
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent))  # without git
    assert code_commit() is None


def test_a_table_is_one_row_group_however_long(tmp_path):
    """A query's candidates stay together: parquet's own limit is a million rows."""
    table = pa.table({"row": pa.array(np.zeros(1_100_000, bool))})
    write_parquet(tmp_path / "long.parquet", table)
    assert [len(group) for group in row_groups(tmp_path / "long.parquet")] == [1_100_000]
