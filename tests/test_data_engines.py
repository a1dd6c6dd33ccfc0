import itertools
import multiprocessing
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from dataset_builders.cli import InputError
from dataset_builders.engines import LOCAL, Ray, RayEngine, compute_shards

SIZES = [3, 1, 4, 1, 5, 9, 2, 6]


@dataclass(frozen=True)
class Squares:
    """Shard i: SIZES[i] squares. Leaves a trace of every call, and does as `fault` says in shard 5."""

    trace: Path
    fault: str | None = None
    seconds: float = 0.0

    def __call__(self, number: int) -> np.ndarray:
        time.sleep(self.seconds)
        with (self.trace / f"{number}").open("a") as stream:
            stream.write(f"{os.getpid()}\n")
        if number == 5 and self.fault == "input":
            raise InputError("shard 5 is bad")
        if number == 5 and self.fault == "kill once" and len((self.trace / "5").read_text().split()) == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.full(SIZES[number], number**2, np.float32)


EXPECTED = [[float(number**2)] * size for number, size in enumerate(SIZES)]


def computed(work, folder, engine=LOCAL) -> list[list[float]]:
    shards = compute_shards(work, SIZES, folder, engine, description="square", unit="rows")
    assert len(shards) == len(SIZES)
    return [shard.tolist() for shard in shards]


def calls(trace: Path) -> dict[int, int]:
    return {int(path.name): len(path.read_text().split()) for path in trace.iterdir()}


@pytest.fixture
def trace(tmp_path):
    (tmp_path / "trace").mkdir()
    return tmp_path / "trace"


def test_finished_shards_are_not_computed_again(tmp_path, trace):
    assert computed(Squares(trace), tmp_path / "x") == EXPECTED
    assert computed(Squares(trace), tmp_path / "x") == EXPECTED
    assert calls(trace) == dict.fromkeys(range(8), 1)


SPOILS = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "one bit altered": lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])),
    "emptied": lambda path: path.write_bytes(b""),
    "of another shard": lambda path: path.write_bytes(next(path.parent.glob("000007-*")).read_bytes()),
    "renamed": lambda path: path.rename(path.with_name("000002.npy")),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("case", SPOILS)
def test_a_spoilt_shard_is_found_and_made_again_alone(case, tmp_path, trace):
    computed(Squares(trace), tmp_path / "x")
    before = {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()}
    SPOILS[case](next((tmp_path / "x").glob("000002-*.npy")))
    assert computed(Squares(trace), tmp_path / "x") == EXPECTED
    assert calls(trace) == {**dict.fromkeys(range(8), 1), 2: 2}
    assert {path.name: path.read_bytes() for path in (tmp_path / "x").iterdir()} == before


def test_what_an_earlier_build_left_does_not_count(tmp_path, trace):
    computed(Squares(trace), tmp_path / "x")
    shards = compute_shards(Squares(trace), SIZES[:3], tmp_path / "x", LOCAL, description="", unit="")
    assert [shard.tolist() for shard in shards] == EXPECTED[:3] and len(list((tmp_path / "x").iterdir())) == 3


def test_bad_input_leaves_nothing(tmp_path, trace):
    with pytest.raises(InputError, match="shard 5 is bad"):
        computed(Squares(trace, fault="input"), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_twenty_kills_at_random_moments_change_nothing(tmp_path, trace):
    computed(Squares(trace), tmp_path / "whole")
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    chance, context = random.Random(0), multiprocessing.get_context("fork")
    done, kills = [], 0
    for attempt in itertools.count():
        process = context.Process(target=computed, args=(Squares(trace, seconds=0.02), tmp_path / "killed"))
        process.start()
        time.sleep(chance.uniform(0.0, 0.06))
        if process.is_alive() and kills < 20:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
        done.append(len(list((tmp_path / "killed").glob("*.npy"))) if (tmp_path / "killed").exists() else 0)
        if process.exitcode == 0:
            if kills == 20:
                break
            next((tmp_path / "killed").glob("*.npy")).unlink()  # finished too soon: give the next one work
        assert attempt < 100
    assert kills == 20 and 0 < min(filter(None, done)) < len(SIZES) == done[-1]
    found = {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.npy")}
    assert found == whole


@pytest.fixture(scope="module")
def ray_engine():
    ray = pytest.importorskip("ray", reason="Ray is not installed")
    # the workers import this file, as they import the project
    ray.init(num_cpus=2, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}})
    yield RayEngine(Ray(workers=2))
    ray.shutdown()


def test_ray_workers_compute_the_same_files(tmp_path, trace, ray_engine):
    assert computed(Squares(trace, seconds=0.05), tmp_path / "ray", ray_engine) == EXPECTED
    workers = {pid for path in trace.iterdir() for pid in path.read_text().split()}
    assert len(workers) == 2 and str(os.getpid()) not in workers
    computed(Squares(trace), tmp_path / "local")
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("ray", "local")]
    assert files[0] == files[1]


def test_a_ray_worker_that_is_killed_changes_nothing(tmp_path, trace, ray_engine):
    assert computed(Squares(trace, fault="kill once"), tmp_path / "x", ray_engine) == EXPECTED
    assert calls(trace)[5] == 2  # it was killed, and another worker was given the shard


def test_ray_tells_of_bad_input_as_the_local_engine_does(tmp_path, trace, ray_engine):
    with pytest.raises(InputError, match=r"^shard 5 is bad$"):
        computed(Squares(trace, fault="input"), tmp_path / "x", ray_engine)
    assert not (tmp_path / "x").exists()
