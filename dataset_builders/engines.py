"""Where the heavy work of a step is done: shard by shard, in this process (`local`) or by Ray workers (`ray`).

The steps do not know which. A shard is one array, computed by a pure function of its number and kept in a file
named by its content: a killed build goes on after the last finished shard, and one that was cut or altered since is
made again.
"""

from __future__ import annotations

import os
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeAlias

import numpy as np
from pydantic import Field
from tqdm import tqdm

from common.cli import InputError, Unfinished
from common.recipes import Section
from common.steps import file_sha256

# Computes shard number i. It must not depend on other shards, and an engine may pickle it: it holds paths, recipe
# sections and small arrays, and opens models and tables when it is first called.
Work: TypeAlias = Callable[[int], np.ndarray]


class Shards(Sequence[np.ndarray]):
    """The arrays of finished shards, memory-mapped when they are asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, number: int) -> np.ndarray:
        return np.load(self._paths[number], mmap_mode="r")

    @cached_property
    def starts(self) -> np.ndarray:
        """Where each shard's rows start in all of them together; and their number."""
        return np.cumsum([0, *(len(shard) for shard in self)])

    def rows(self, start: int, stop: int) -> np.ndarray:
        numbers = np.flatnonzero((self.starts[:-1] < stop) & (self.starts[1:] > start))
        return np.concatenate([self[n][max(start - self.starts[n], 0) : stop - self.starts[n]] for n in numbers])


class Engine(ABC):
    @abstractmethod
    def run(self, work: Work, numbers: Sequence[int], folder: Path) -> Iterator[int]:
        """Compute the shards of `numbers` into `folder`; yield each number when its shard is there, in any order."""


class LocalEngine(Engine):
    """One shard after another, in this process."""

    def run(self, work: Work, numbers: Sequence[int], folder: Path) -> Iterator[int]:
        for number in numbers:
            _write_shard(folder, number, work(number))
            yield number


LOCAL = LocalEngine()


class Ray(Section):
    """The Ray cluster of `--engine ray`. Its machines see the output folder under the same path."""

    address: str | None = None  # of a running cluster ("auto": the one this machine belongs to); null: start one here
    workers: int = Field(2, ge=1)  # processes that each load the model once
    cpus_per_worker: float = Field(1, gt=0)  # that Ray reserves
    gpus_per_worker: float = Field(0, ge=0)  # that Ray reserves


@dataclass(frozen=True)
class RayEngine(Engine):
    """The same shards by Ray Data: a lost worker's shards are handed to another by Ray."""

    ray: Ray

    def connect(self) -> None:
        """Join the cluster, or start one here. Raises InputError when there is no Ray, or none answers."""
        try:
            import ray
        except ImportError:
            raise InputError("--engine ray needs Ray: pip install '.[ray]'") from None
        if ray.is_initialized():
            return
        try:
            _check_answers(self.ray.address)
            ray.init(address=self.ray.address, log_to_driver=False, logging_level="error")
        except (ConnectionError, TimeoutError, socket.gaierror) as error:
            raise InputError(f"ray.address {self.ray.address!r}: no Ray cluster answers there: {error}") from None

    def run(self, work: Work, numbers: Sequence[int], folder: Path) -> Iterator[int]:
        self.connect()
        import ray

        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = ray.data.from_items([{"number": number} for number in numbers], override_num_blocks=len(numbers))
        done = rows.map_batches(
            _RayWorker,
            fn_constructor_args=(work, str(folder.resolve())),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(self.ray.workers, len(numbers))),
            num_cpus=self.ray.cpus_per_worker,
            num_gpus=self.ray.gpus_per_worker,
        )
        for row in done.iter_rows():
            if row["refusal"]:
                raise (Unfinished if row["unfinished"] else InputError)(row["refusal"])
            yield row["number"]


def _check_answers(address: str | None) -> None:
    """Raises ConnectionError unless somebody answers at host:port: Ray itself would try for minutes, then exit."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


class _RayWorker:
    def __init__(self, work: Work, folder: str) -> None:
        self._work, self._folder = work, Path(folder)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list]:
        [number] = batch["number"].tolist()
        refusal, unfinished = "", False
        try:
            _write_shard(self._folder, number, self._work(number))
        except InputError as error:  # an exception would reach the driver without its type
            refusal, unfinished = str(error), isinstance(error, Unfinished)
        return {"number": [number], "refusal": [refusal], "unfinished": [unfinished]}


def compute_shards(
    work: Work, sizes: Sequence[int], folder: Path, engine: Engine, *, description: str, unit: str
) -> Shards:
    """The arrays `work(0)` ... `work(len(sizes) - 1)`, from files in `folder` where those are there and whole.

    `sizes[i]` is what shard i counts for in the progress bar, in `unit`s.
    """
    folder.mkdir(parents=True, exist_ok=True)
    done = _shards_in(folder, len(sizes), verify=True)
    todo = [number for number in range(len(sizes)) if number not in done]
    total, before = sum(sizes), sum(sizes[number] for number in done)
    if todo:
        with tqdm(
            total=total, initial=before, desc=description, unit=f" {unit}", unit_scale=True, smoothing=0
        ) as progress:
            try:
                for number in engine.run(work, todo, folder):
                    progress.update(sizes[number])
            except Unfinished:
                raise
            except InputError:
                shutil.rmtree(folder)  # bad input leaves nothing behind
                raise
        done = _shards_in(folder, len(sizes), verify=False)  # who wrote the others has just read them for their names
    missing = [number for number in range(len(sizes)) if number not in done]
    if missing:
        raise InputError(
            f"{folder}: {len(missing)} of {len(sizes)} shards are not there although every worker finished; "
            "do all machines see this folder under the same path?"
        )
    for leftover in folder.glob("*.tmp"):  # of a process that was killed while it wrote
        leftover.unlink()
    return Shards([done[number] for number in range(len(sizes))])


def _write_shard(folder: Path, number: int, values: np.ndarray) -> None:
    temporary = folder / f"{number:06d}.{os.getpid()}.tmp"  # two workers may be given the same shard
    with temporary.open("wb") as stream:
        np.save(stream, values)
    temporary.rename(folder / f"{number:06d}-{file_sha256(temporary)[:16]}.npy")


def _shards_in(folder: Path, count: int, verify: bool) -> dict[int, Path]:
    """Number -> file of the shards; those whose content is not what their name says (if `verify`) are deleted."""
    found: dict[int, Path] = {}
    for path in sorted(folder.glob("*.npy")):
        number, _, digest = path.stem.partition("-")
        is_ours = number.isdecimal() and int(number) < count
        if is_ours and (not verify or file_sha256(path).startswith(digest or "none")):
            found.setdefault(int(number), path)
        else:
            path.unlink()
    return found
