"""Seconds and memory of a build as the corpus grows, and as the number of queries does.

    python -m benchmarks.bench_scale [--documents 10000 100000] [--queries 10000] [--last_step candidates]

For every number of documents and of queries: a synthetic set, and a build of it in a process of its own, with a static
embedding model of 384 dimensions, until --last_step is done. Seconds are the manifests'. Memory is what the kernel
says of the process, twenty times a second, at its highest: what is no file (RssAnon), by step; and all that is
resident, mapped documents and vectors too, which the kernel may drop at any time.
"""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
import yaml

from benchmarks.measure import environment, in_child, status_mib
from benchmarks.synthetic import write_encoder, write_set
from common.cli import ArgumentParser, InputError, at_least_1, run
from common.steps import MANIFEST, read_manifest
from common.tables import markdown_table

STEPS = ("corpus", "candidates", "scores", "mined", "audit", "hub")
INTERVAL = 0.05  # seconds between two samples


@dataclass
class Measured:
    documents: int
    queries: int
    seconds: dict[str, float] = field(default_factory=dict)  # of each step
    anonymous: dict[str, float] = field(default_factory=dict)  # peak MiB in each step
    resident: float = 0.0  # peak MiB
    disk: float = 0.0  # MiB that the build left


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bench_scale", description=__doc__)
    parser.add_argument("--documents", type=at_least_1, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--queries", type=at_least_1, nargs="+", default=[10_000])
    parser.add_argument("--last_step", choices=STEPS, default="candidates")
    args = parser.parse_args(argv)
    print(environment("bm25s", "sentence-transformers", "torch", "pyarrow", "polars"), flush=True)
    runs = [measured(*counts, args) for counts in itertools.product(args.documents, args.queries)]
    print(f"\n{format_table(runs)}")


def measured(documents: int, queries: int, args: Namespace) -> Measured:
    with tempfile.TemporaryDirectory() as folder:
        in_child(prepare, Path(folder), documents, queries)
        found = Measured(documents, queries)
        build(Path(folder), args.last_step, found)
        return found


def prepare(folder: Path, documents: int, queries: int) -> None:
    """A set, an encoder and a recipe."""
    write_set(folder / "set", documents, queries)
    with pq.ParquetFile(folder / "set" / "corpus.parquet") as corpus:
        sample = next(corpus.iter_batches(10_000, columns=["text"]))["text"].to_pylist()
    encoder = str(write_encoder(folder / "encoder", sample))
    recipe = {
        "source": {"kind": "local", "path": str(folder / "set"), "split": "train", "eval_splits": ["test"]},
        "task_type": "retrieval",
        "instruction": "Find the text that the words are out of",
        "dense": {"model": encoder, "batch_tokens": 65_536},
        "teacher": {"kind": "bi_encoder", "model": encoder},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")


def build(folder: Path, last_step: str, found: Measured) -> None:
    """Run the build until `last_step` is done, and sample its memory."""
    output = folder / "build"
    command = [sys.executable, "-m", "dataset_builders.build", "--config", str(folder / "recipe.yaml")]
    with subprocess.Popen([*command, "--output_dir", str(output)]) as process:
        while process.poll() is None and not (output / last_step / MANIFEST).exists():
            step = next((name for name in STEPS if not (output / name / MANIFEST).exists()), last_step)
            sample_memory(process.pid, step, found)
            time.sleep(INTERVAL)
        process.terminate()  # the build would go on with the next step
    steps = STEPS[: STEPS.index(last_step) + 1]
    if not (output / last_step / MANIFEST).exists():
        raise InputError(
            f"{found.documents:,} documents: the build ended before step {last_step!r} was done; see above"
        )
    found.seconds = {step: read_manifest(output / step)["seconds"] for step in steps}
    found.disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20


def sample_memory(process: int, step: str, found: Measured) -> None:
    try:
        found.resident = max(found.resident, status_mib(process, "VmHWM"))
        found.anonymous[step] = max(found.anonymous.get(step, 0.0), status_mib(process, "RssAnon"))
    except (FileNotFoundError, StopIteration, ProcessLookupError):
        pass  # it has just ended


def format_table(runs: Sequence[Measured]) -> str:
    """The last two columns: what 1,000 more documents (or queries) cost, from the row above to this one."""
    steps = list(runs[0].seconds)
    rows = []
    for above, one in zip([None, *runs], runs, strict=False):
        rows.append(
            [
                f"{one.documents:,}",
                f"{one.queries:,}",
                *(f"{one.seconds[step]:,.0f}" for step in steps),
                *(f"{one.anonymous[step]:,.0f}" for step in steps),
                f"{one.resident:,.0f}",
                f"{one.disk:,.0f}",
                *(["", ""] if above is None else slopes(above, one)),
            ]
        )
    header = ["documents", "queries", *(f"{step}, s" for step in steps), *(f"{step}, MiB" for step in steps)]
    return markdown_table(
        [*header, "with mapped files, MiB", "disk, MiB", "s for 1,000 more", "MiB for 1,000 more"], rows
    )


def slopes(above: Measured, one: Measured) -> list[str]:
    """
    >>> above = Measured(1000, 5, seconds={"corpus": 2.0}, anonymous={"corpus": 90.0})
    >>> slopes(above, Measured(5000, 5, seconds={"corpus": 3.0}, anonymous={"corpus": 92.0}))
    ['0.25', '0.50']
    """
    thousands = max(one.documents - above.documents, one.queries - above.queries) / 1000
    seconds = sum(one.seconds.values()) - sum(above.seconds.values())
    memory = max(one.anonymous.values()) - max(above.anonymous.values())
    return [f"{seconds / thousands:.2f}", f"{memory / thousands:.2f}"]


if __name__ == "__main__":
    run(main)
