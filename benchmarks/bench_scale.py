"""Seconds and memory of a build as the corpus grows, and as the number of queries does; of another commit's too.

    python -m benchmarks.bench_scale [--documents 10000 100000] [--queries 10000] [--last_step candidates]
                                     [--against COMMIT]

For every number of documents and of queries: a synthetic set, and a build of it in a process of its own, with a static
embedding model of 384 dimensions, until --last_step is done. Processor seconds and memory are what the kernel says of
the process, twenty times a second: memory at its highest, what is no file (RssAnon) by step, and all that is resident,
mapped documents and vectors too, which the kernel may drop at any time. Seconds of the clock are the manifests'.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import yaml

from benchmarks.measure import environment, in_child, status_mib
from benchmarks.synthetic import write_encoder, write_set
from common.cli import ArgumentParser, InputError, at_least_1, run
from common.steps import MANIFEST, read_manifest
from common.tables import markdown_table

STEPS = ("corpus", "candidates", "scores", "mined", "audit", "hub")
RANKS, SCORES = ("bm25_rank", "dense_rank"), ("bm25_score", "dense_score")
INTERVAL = 0.05  # seconds between two samples
HERE = Path(__file__).parents[1]


@dataclass
class Measured:
    documents: int
    queries: int
    code: str = "this"
    seconds: dict[str, float] = field(default_factory=dict)  # of the clock, in each step
    processor: dict[str, float] = field(default_factory=dict)  # seconds of all threads, in each step
    anonymous: dict[str, float] = field(default_factory=dict)  # peak MiB in each step
    resident: float = 0.0  # peak MiB
    disk: float = 0.0  # MiB that the build left


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bench_scale", description=__doc__)
    parser.add_argument("--documents", type=at_least_1, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--queries", type=at_least_1, nargs="+", default=[10_000])
    parser.add_argument("--last_step", choices=STEPS, default="candidates")
    parser.add_argument("--against", metavar="COMMIT", help="build with the code of this commit as well")
    args = parser.parse_args(argv)
    print(environment("bm25s", "sentence-transformers", "torch", "numpy", "pyarrow", "polars"), flush=True)
    runs = [one for counts in itertools.product(args.documents, args.queries) for one in measured(*counts, args)]
    print(f"\n{format_table(runs)}")


def measured(documents: int, queries: int, args: Namespace) -> list[Measured]:
    with tempfile.TemporaryDirectory() as name:
        folder, codes = Path(name), {"this": HERE}
        if args.against:
            codes[args.against] = folder / "code"
            git = ["git", "-C", str(HERE), "worktree"]
            if subprocess.run([*git, "add", "-q", "--detach", str(folder / "code"), args.against]).returncode:
                raise InputError(f"--against {args.against}: git has no such commit; see above")
        in_child(prepare, folder, documents, queries)
        runs = [Measured(documents, queries, code) for code in codes]
        for found in runs:
            build(folder, args.last_step, found, codes[found.code])
        if args.against:
            subprocess.run([*git, "remove", "--force", str(folder / "code")], check=True)
            if args.last_step != "corpus":
                print(f"{documents:,} documents: {agreement(*(folder / code for code in codes))}", flush=True)
        return runs


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


def build(folder: Path, last_step: str, found: Measured, code: Path = HERE) -> None:
    """Run the build by `code` into a folder of its name until `last_step` is done, and watch its process."""
    output = folder / found.code
    command = [sys.executable, "-m", "dataset_builders.build", "--config", str(folder / "recipe.yaml")]
    environ = {**os.environ, "PYTHONPATH": str(code)}
    with subprocess.Popen([*command, "--output_dir", str(output)], cwd=code, env=environ) as process:
        while process.poll() is None and not (output / last_step / MANIFEST).exists():
            step = next((name for name in STEPS if not (output / name / MANIFEST).exists()), last_step)
            sample(process.pid, step, found)
            time.sleep(INTERVAL)
        process.terminate()  # the build would go on with the next step
    steps = STEPS[: STEPS.index(last_step) + 1]
    if not (output / last_step / MANIFEST).exists():
        raise InputError(
            f"{found.documents:,} documents: the build ended before step {last_step!r} was done; see above"
        )
    found.seconds = {step: read_manifest(output / step)["seconds"] for step in steps}
    found.disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 2**20


def sample(process: int, step: str, found: Measured) -> None:
    try:
        found.resident = max(found.resident, status_mib(process, "VmHWM"))
        found.anonymous[step] = max(found.anonymous.get(step, 0.0), status_mib(process, "RssAnon"))
        ticks = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[11:13]
        before = sum(seconds for name, seconds in found.processor.items() if name != step)
        found.processor[step] = sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK") - before
    except (FileNotFoundError, StopIteration, ProcessLookupError):
        pass  # it has just ended


def agreement(ours: Path, theirs: Path) -> str:
    """How many of their candidates ours hold with the same ranks by both retrievers, and how far scores are apart."""
    tables = (pl.scan_parquet(path / "candidates" / "candidates.parquet") for path in (theirs, ours))
    other, one = (table.select("query_id", "document_id", *RANKS, *SCORES) for table in tables)
    both = other.join(one, on=["query_id", "document_id"])
    same = [pl.col(name).eq_missing(pl.col(f"{name}_right")) for name in RANKS]
    apart = pl.max_horizontal((pl.col(name) - pl.col(f"{name}_right")).abs().max() for name in SCORES)
    [found] = both.select(found=pl.len(), same=pl.all_horizontal(same).sum(), apart=apart).collect().to_dicts()
    count = other.select(pl.len()).collect().item()
    return (
        f"{found['found']:,} of their {count:,} candidates are ours, {found['same']:,} with the same ranks; "
        f"scores differ by {found['apart']:.0e} at most"
    )


def format_table(runs: Sequence[Measured]) -> str:
    steps = list(runs[0].seconds)
    units = {"s": "seconds", "processor s": "processor", "MiB": "anonymous"}
    rows = []
    for one in runs:
        figures = [f"{getattr(one, name)[step]:,.0f}" for name in units.values() for step in steps]
        total = sum(one.processor.values())
        ours = sum(runs[runs.index(one) - (one.code != "this")].processor.values())
        figures += [f"{one.resident:,.0f}", f"{one.disk:,.0f}", f"{total / ours:.2f}"]
        rows.append([f"{one.documents:,}", f"{one.queries:,}", one.code, *figures])
    header = [f"{step}, {unit}" for unit in units for step in steps]
    return markdown_table(
        ["documents", "queries", "code", *header, "with mapped files, MiB", "disk, MiB", "processor, ratio"], rows
    )


if __name__ == "__main__":
    run(main)
