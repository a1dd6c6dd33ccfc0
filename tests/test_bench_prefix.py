"""The benchmark of the shared prefix runs, and its figures add up."""

import pytest
import torch

from benchmarks import bench_prefix
from benchmarks.measure import live_tensors
from common.cli import InputError


@pytest.mark.parametrize(
    ("part", "dtypes", "sides"), [("encode", ["float32", "bfloat16"], 4), ("train", ["float32"], 7)]
)
def test_a_few_texts(capsys, part, dtypes, sides):
    sizes = ["--texts", "6", "--batch_size", "3", "--mini_batch_size", "3", "--rounds", "1", "--architecture", "tiny"]
    bench_prefix.main([part, "--prompts", "64", "--dtypes", *dtypes, *sizes])
    tables = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables.splitlines() if "| 64 " in line]
    assert len(rows) == sides
    plain = float(rows[0][4])  # tokens that go through the layers, by those needed
    assert plain > 1.2
    for row in rows:
        assert float(row[2]) >= 0
        assert float(row[7]) < (1e-5 if "float32" in row[1] else 0.5) and float(row[8]) > 0.9
        assert 0.5 <= float(row[4]) < plain if "share_prefix" in row[1] else float(row[4]) > 1.2
    if part == "train":
        none, quarter, one, half, every = (float(row[4]) for row in rows[2:])
        assert every == pytest.approx(none / 2, abs=0.01) and every < half <= one < none <= quarter


def test_live_tensors_counts_what_is_alive_together():
    weights = torch.zeros(1000)  # from before: not counted
    with live_tensors() as live:
        for _ in range(5):
            made = weights.view(10, 100) + 1  # 4,000 bytes; the one before it is alive until it is there
        del made
    assert (live.now, live.peak) == (0, 8000)


def test_unknown_part():
    with pytest.raises(InputError, match="the parts are"):
        bench_prefix.main(["mining"])
