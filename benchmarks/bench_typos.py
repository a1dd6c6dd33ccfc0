"""How many typos in a text decontamination finds: `python -m benchmarks.bench_typos DATA/stsb`.

Each distinct sentence (sentence1 and sentence2 of all splits) gets one typo at random: a letter too many, too few,
another one, or two that changed places. Then it is searched for among the sentences as they are.
"""

from __future__ import annotations

import random
import string
import time
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from common.cli import ArgumentParser, run
from common.tables import markdown_table
from dataset_builders.near_duplicates import NEAR_DUPLICATE, band_keys, near_matches, normalised, text_keys
from dataset_builders.typos import typo_matches


def main(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.bench_typos", description=__doc__)
    parser.add_argument("folder", type=Path, help="Parquet files with sentence1 and sentence2")
    rows = pl.read_parquet(parser.parse_args(argv).folder / "*.parquet")
    texts = pl.concat([rows["sentence1"], rows["sentence2"].alias("sentence1")]).rename("text")
    texts = pl.DataFrame([texts, text_keys(texts)]).unique("key", maintain_order=True)["text"]
    texts = texts.filter(texts.str.len_chars() >= 5)
    rng = random.Random(0)
    wrong = pl.Series("text", [with_typo(text, rng) for text in texts])
    start = time.process_time()
    near = near_matches(wrong, band_keys(wrong), texts, band_keys(texts), NEAR_DUPLICATE)
    middle = time.process_time()
    typos = typo_matches(wrong, texts, NEAR_DUPLICATE)
    stop = time.process_time()
    found = pl.DataFrame({"row": range(len(texts)), "length": texts.str.len_chars()})
    for name, matches in (("near", near), ("typo", typos)):
        own = matches.filter(pl.col("row") == pl.col("other"))["row"]
        found = found.with_columns(pl.col("row").is_in(own.implode()).alias(name))
    lines = []
    for title, longest in (("all", None), ("below 64 characters", 64), ("below 50 characters", 50)):
        part = found.filter(pl.col("length") < longest) if longest else found
        escaped = (1 - part["near"].mean(), 1 - (part["near"] | part["typo"]).mean())
        lines.append([title, f"{len(part):,}", *(f"{share:.1%}" for share in escaped)])
    titles = ["sentences", "number", "escape by Jaccard alone", "with the rule for short texts"]
    print(markdown_table(titles, lines))
    print(f"\nProcessor seconds: MinHash and its matches {middle - start:.1f}, the rule {stop - middle:.1f}.")


def with_typo(text: str, rng: random.Random) -> str:
    """`text` with one letter added, lost, changed or swapped, so that it is another text."""
    while True:
        place, letter = rng.randrange(len(text) - 1), rng.choice(string.ascii_lowercase)
        before, here, after = text[:place], text[place], text[place + 1 :]
        middle_and_end = (letter + after, letter + here + after, after, after[0] + here + after[1:])
        made = before + rng.choice(middle_and_end)
        if normalised(made) != normalised(text):
            return made


if __name__ == "__main__":
    run(main)
