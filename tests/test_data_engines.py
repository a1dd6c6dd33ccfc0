import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kills import changes

from common.cli import InputError
from common.steps import file_sha256
from dataset_builders import engines
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


def test_a_shard_is_read_once_by_a_call_that_wrote_it_and_once_by_one_that_found_it(tmp_path, trace, monkeypatch):
    read = []
    monkeypatch.setattr(engines, "file_sha256", lambda path: read.append(path) or file_sha256(path))
    assert computed(Squares(trace), tmp_path / "x") == EXPECTED and len(read) == len(SIZES)
    assert computed(Squares(trace), tmp_path / "x") == EXPECTED and len(read) == 2 * len(SIZES)


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


def killed_twenty_times(folder: Path) -> list[int]:
    """Compute shards, killed at random moments; how many shards stood after each of them.

    In a process of its own: what is forked must not have threads, which a progress bar has.
    """
    trace = folder / "trace"
    trace.mkdir(parents=True)
    chance, kills, done = random.Random(0), 0, []
    for attempt in itertools.count():
        moment = chance.randrange(1, 30) if kills < 20 else None
        killed = changes(lambda: computed(Squares(trace), folder / "shards"), folder, moment) is None
        kills += killed
        done.append(len(list((folder / "shards").glob("*.npy"))))
        if not killed and kills == 20:
            return done
        if done[-1] == len(SIZES):  # too soon: give the next one work
            for path in sorted((folder / "shards").glob("*.npy"))[1:]:
                path.unlink()
        assert attempt < 100


def in_process_of_its_own(function: str, folder: Path) -> Any:
    """What a function of this file returns for `folder`."""
    script = (
        "import json, pathlib, sys, test_data_engines as tests\n"
        "print('found', json.dumps(getattr(tests, sys.argv[1])(pathlib.Path(sys.argv[2]))), flush=True)"
    )
    paths = os.pathsep.join(map(str, (Path(__file__).parent, Path(__file__).parents[1])))
    answer = subprocess.run(
        [sys.executable, "-c", script, function, str(folder)],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
    )
    lines = [line for line in answer.stdout.splitlines() if line.startswith("found ")]
    assert lines, answer.stderr[-3000:]
    return json.loads(lines[0].removeprefix("found "))


def test_twenty_kills_at_random_moments_change_nothing(tmp_path, trace):
    done = in_process_of_its_own("killed_twenty_times", tmp_path / "killed")
    assert len(done) > 20 and 0 < min(filter(None, done)) < len(SIZES) == done[-1]
    computed(Squares(trace), tmp_path / "whole")
    found, whole = (
        {path.name: path.read_bytes() for path in folder.glob("*.npy")}
        for folder in (tmp_path / "killed" / "shards", tmp_path / "whole")
    )
    assert found == whole


def ray_scenarios(folder: Path) -> dict:
    """What becomes of the shards on a local cluster of two workers, in a process that starts no other threads."""
    import ray

    # the workers import this file, as they import the project
    ray.init(num_cpus=2, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(Path(__file__).parent)}})
    engine, found = RayEngine(Ray(workers=2)), {}
    for name, work in {
        "plain": Squares(folder / "plain", seconds=0.05),
        "killed": Squares(folder / "killed", fault="kill once"),
        "refused": Squares(folder / "refused", fault="input"),
    }.items():
        work.trace.mkdir()
        try:
            found[name] = computed(work, folder / f"{name}-shards", engine)
        except InputError as error:
            found[name] = str(error)
    return {**found, "driver": os.getpid()}


@pytest.fixture(scope="module")
def ray_found(tmp_path_factory):
    pytest.importorskip("ray", reason="Ray is not installed")
    folder = tmp_path_factory.mktemp("ray")
    return folder, in_process_of_its_own("ray_scenarios", folder)


def test_ray_workers_compute_the_same_files(tmp_path, trace, ray_found):
    folder, found = ray_found
    assert found["plain"] == EXPECTED
    workers = {pid for path in (folder / "plain").iterdir() for pid in path.read_text().split()}
    # on a busy machine one worker may have done it all before the other has started
    assert 1 <= len(workers) <= 2 and str(found["driver"]) not in workers
    computed(Squares(trace), tmp_path / "local")
    files = [
        {path.name: path.read_bytes() for path in place.iterdir()}
        for place in (folder / "plain-shards", tmp_path / "local")
    ]
    assert files[0] == files[1]


def test_a_ray_worker_that_is_killed_changes_nothing(ray_found):
    folder, found = ray_found
    assert found["killed"] == EXPECTED
    assert calls(folder / "killed")[5] == 2  # it was killed, and another worker was given the shard


def test_ray_tells_of_bad_input_as_the_local_engine_does(ray_found):
    folder, found = ray_found
    assert found["refused"] == "shard 5 is bad" and not (folder / "refused-shards").exists()
