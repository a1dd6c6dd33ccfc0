"""A step's result is a folder: written under a temporary name, renamed when whole, its manifest last.

    with folder_step(output / "scores", inputs={...}) as step:
        if not step.done:
            ... write files into step.path ...
            step.finish(rows=len(table))

A folder whose manifest has the same inputs and lists the files that are there is kept, and the step skipped. A killed
step leaves `NAME.partial`, which is resumed if the inputs are still the same and deleted otherwise. A folder of
that name without a manifest is moved to `NAME.unknown`.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from common.cli import InputError, Unfinished

MANIFEST = "manifest.json"
INPUTS = "inputs.json"
# What a build of graded data makes, in order; training, reports and cards read their manifests.
GENERATED = "generated"  # before the others, where a model writes the queries
BUILD_FOLDERS = ("corpus", "candidates", "scores", "mined", "audit", "sts", "hub")
_STACK = ("torch", "transformers", "sentence-transformers", "peft", "datasets", "bm25s", "rank_bm25", "trl", "mteb")


def fingerprint(value: Any) -> str:
    """A short stable hash of anything JSON can hold."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def file_sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_of(folder: Path) -> dict[str, str]:
    """Relative name -> sha256 of every file under `folder` but the manifest and INPUTS."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {name: file_sha256(folder / name) for name in names if name not in (MANIFEST, INPUTS)}


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A temporary path to write to, renamed to `path` when the block ends: a file of that name is complete."""
    temporary = path.with_name(path.name + ".tmp")
    yield temporary
    os.replace(temporary, path)


def write_json(path: Path, value: Any) -> None:
    with written_whole(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: Path, written_by: str = "the step that writes it") -> Any:
    """The content of a JSON file. Raises InputError when it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file; run {written_by}") from None
    except ValueError:
        raise InputError(f"{path}: not readable as JSON; delete it and run {written_by}") from None


def write_parquet(path: Path, table: pa.Table) -> None:
    with parquet_writer(path, table.schema) as writer:
        writer.write(table)


class _RowGroups(pq.ParquetWriter):
    def write(self, table: pa.Table) -> None:
        """As a row group, whatever its length; the default is a million rows."""
        self.write_table(table, row_group_size=max(len(table), 1))


@contextmanager
def parquet_writer(path: Path, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """Writes a Parquet file, whole or not at all: each `writer.write(table)` is a row group."""
    with written_whole(path) as temporary, _RowGroups(temporary, schema, compression="zstd") as writer:
        yield writer


def write_arrow(path: Path, batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> None:
    """Write an Arrow file: larger than Parquet, and mapped into memory instead of read (see `read_arrow`)."""
    with written_whole(path) as temporary, pa.ipc.new_file(temporary, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def read_arrow(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of an Arrow file, memory-mapped: nothing is read before it is used. Raises as `read_parquet` does."""
    return _read(path, columns, lambda: pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def read_parquet(path: Path, columns: list[str] | None = None) -> pa.Table:
    """The rows of a Parquet file. Raises InputError when it is missing, unreadable or lacks a column."""
    return _read(path, columns, lambda: pq.read_table(path, memory_map=True))


def _read(path: Path, columns: list[str] | None, read: Callable[[], pa.Table]) -> pa.Table:
    try:
        table = read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise InputError(f"{path}: not a readable {path.suffix[1:].capitalize()} file: {error}") from None
    for name in columns or ():
        if name not in table.column_names:
            raise InputError(f"{path}: no column {name!r}; it has {', '.join(table.column_names)}")
    return table.select(columns) if columns else table


def row_groups(path: Path, columns: list[str] | None = None) -> Iterator[pa.Table]:
    """A Parquet file, one row group at a time: memory does not grow with the file."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            yield file.read_row_group(number, columns)


def read_manifest(folder: Path) -> dict[str, Any]:
    """A finished folder's manifest. Raises InputError when the folder is missing or was not finished."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{folder}: not a finished folder ({MANIFEST} is missing); run the step that makes it"
        ) from None
    except ValueError:
        manifest = None
    if not isinstance(manifest, dict):
        raise InputError(f"{folder / MANIFEST}: not a manifest; delete the folder and make it again")
    return manifest


class Step:
    """One step: `path` is where to write, `done` is true when there is nothing to do."""

    def __init__(self, folder: Path, inputs: Mapping[str, Any]) -> None:
        self.folder = folder
        self.inputs = dict(inputs)
        self.key = fingerprint(self.inputs)
        self.path = folder.with_name(folder.name + ".partial")
        self.outdated = folder.with_name(folder.name + ".outdated")
        self.done = self._is_finished()
        self._start = time.monotonic()

    def _is_finished(self) -> bool:
        try:
            manifest = read_manifest(self.folder)
        except InputError:
            return False
        return manifest.get("key") == self.key and manifest.get("files") == files_of(self.folder)

    def open(self) -> None:
        inputs = self.path / INPUTS
        if self.path.exists() and (not inputs.is_file() or inputs.read_text(encoding="utf-8") != self.key):
            self.discard()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except FileNotFoundError as error:  # as file systems such as /proc answer
            raise InputError(f"{error.filename}: no folder can be made here; choose another") from None
        inputs.write_text(self.key, encoding="utf-8")
        self.commit = code_commit()  # now: the code may be edited while the step runs

    def discard(self) -> None:
        """Delete the unfinished step, INPUTS first: what a kill leaves of it is not resumed."""
        (self.path / INPUTS).unlink(missing_ok=True)
        shutil.rmtree(self.path)

    def finish(self, **facts: Any) -> None:
        """Write the manifest (with `facts`: counts, constants, ...) and give the folder its final name."""
        (self.path / INPUTS).unlink()
        for leftover in self.path.rglob("*.tmp"):
            leftover.unlink()
        for shards in self.path.rglob("*.shards"):
            shutil.rmtree(shards)
        manifest = {
            "key": self.key,
            "inputs": self.inputs,
            "peak_memory_bytes": peak_memory_bytes(),
            **facts,
            "seconds": round(time.monotonic() - self._start, 2),
            "versions": stack_versions(),
            "commit": self.commit,
            "files": files_of(self.path),
        }
        write_json(self.path / MANIFEST, manifest)
        # a folder without a manifest was not made by a step, and is not deleted
        is_ours = (self.folder / MANIFEST).is_file()
        aside = self.outdated if is_ours else self.folder.with_name(self.folder.name + ".unknown")
        if self.folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(self.folder, aside)
        os.replace(self.path, self.folder)
        if is_ours:
            shutil.rmtree(aside)
        self.done = True


@contextmanager
def folder_step(folder: str | Path, inputs: Mapping[str, Any]) -> Iterator[Step]:
    """Make `folder` from `inputs` (anything JSON can hold), unless it was already made from the same inputs."""
    step = Step(Path(folder), inputs)
    if step.done:
        shutil.rmtree(step.outdated, ignore_errors=True)  # of a kill right after the new folder got its name
        yield step
        return
    created = [parent for parent in step.path.parents if not parent.exists()]
    step.open()
    try:
        yield step
    except Unfinished:
        raise
    except InputError:
        # bad input leaves nothing behind; a crash or a kill leaves finished shards for the next run
        step.discard()
        for parent in created:
            parent.rmdir()
        raise
    if not step.done:
        raise RuntimeError(f"step {step.folder} ended without finish()")


def link_files(source: Path, target: Path, without: Sequence[str] = ()) -> None:
    """A copy of a folder, by hard links where the file system has them: a 7B model is 14 GB."""

    def link(file: str, copy: str) -> None:
        Path(copy).unlink(missing_ok=True)
        try:
            os.link(file, copy)
        except OSError:
            shutil.copyfile(file, copy)

    shutil.copytree(source, target, copy_function=link, ignore=shutil.ignore_patterns(*without), dirs_exist_ok=True)


def peak_memory_bytes() -> int:
    """Peak resident memory of this process."""
    high_water = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high_water if sys.platform == "darwin" else high_water * 1024


def stack_versions() -> dict[str, str]:
    """Versions of the libraries whose behaviour decides results."""
    return {name: importlib.metadata.version(name) for name in _STACK}


def code_commit() -> str | None:
    """The git commit of this code, with -dirty appended where files differ; None outside a repository."""
    root = Path(__file__).parents[1]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        # of this repository, not of one that the folder was copied into
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)}
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
