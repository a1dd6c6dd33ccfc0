"""What a stranger would get from hub/, found out before it is published: stock `datasets` reads every config to its
end, in a process that cannot import this repository, and the rows are as the card and the manifest say.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from common.cli import InputError
from common.steps import files_of, read_manifest, row_groups

README = "README.md"
# Names that a stranger's machine does not have; blocked in the process that reads the data.
_OUR_PACKAGES = ("dataset_builders", "modeling", "train_st", "eval", "push_to_hub")
# Where people's files lie; a URL has no blank or quote before its path.
_HOMES = r"""(^|[\s"'`(=,:])(/home/|/Users/|/root/|~/|[A-Za-z]:\\)"""
_KEYS = {"queries": "query_id", "documents": "document_id"}  # ids, unique in these configs
# (config, column) in which the values of another config's columns must be found; rows to train on hold texts, not ids
_IDS = {key: (name, key) for name, key in _KEYS.items()}
_TEXTS = {"query": ("queries", "text"), "positive": ("documents", "text"), "negative": ("documents", "text")}
_TOLD = 10  # problems that an error names


def verify_dataset(folder: Path) -> dict[str, Any]:
    """The facts of a published folder: `configs` (name -> rows, bytes on disk, features), `rows` in all, and `files`,
    the names of what is uploaded; README.md among them is the card of no repository yet (see `card.card_for`).

    Every row is read four times, twice by `datasets`, which unpacks one config after the other into the temporary
    folder; memory holds eight bytes for each id and text of `documents` and `queries`.

    Raises:
        InputError: all that a stranger could not read, should not have to trust, or would train wrongly on.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    _refuse(folder, check_files(folder, manifest))  # what is read below is what was made
    found = in_clean_process(describe_dataset, folder, library="datasets")
    paths = {name: sorted((folder / name).glob("*.parquet")) for name in found}
    _refuse(
        folder, [*check_configs(folder, manifest["rows"], found), *check_rows(paths), *check_places(folder, paths)]
    )
    configs = {
        name: {
            "rows": facts["rows"],
            "bytes": sum(path.stat().st_size for path in paths[name]),
            "features": facts["features"],
        }
        for name, facts in found.items()
    }
    return {"configs": configs, "rows": sum(manifest["rows"].values()), "files": sorted(manifest["files"])}


def _refuse(folder: Path, problems: list[str]) -> None:
    if problems:
        more = f"; and {len(problems) - _TOLD} more" if len(problems) > _TOLD else ""
        raise InputError(f"{folder}: not to be published: {'; '.join(problems[:_TOLD])}{more}; build it again")


def check_files(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """What is wrong with the files, going by their names and hashes."""
    made = manifest.get("files")
    if not isinstance(made, dict) or not isinstance(manifest.get("rows"), dict):
        return ["its manifest.json is not that of a published data set"]
    found = files_of(folder)
    links = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink()]
    return [
        *(f"{name} is missing" for name in sorted(made.keys() - found.keys())),
        *(f"{name} was altered" for name in sorted(made.keys() & found.keys()) if made[name] != found[name]),
        *(f"{name} was not made by the build" for name in sorted(found.keys() - made.keys())),
        *(f"{name} is a link" for name in sorted(links)),
        *(f"{name} is neither Parquet nor the card nor a plot" for name in sorted(made) if not _is_published(name)),
    ]


def _is_published(name: str) -> bool:
    """The Hub's readers need no code, and no format that runs some."""
    path = PurePosixPath(name)
    kinds = {"assets": ".png"}
    return name == README or (len(path.parts) == 2 and path.suffix == kinds.get(path.parts[0], ".parquet"))


def in_clean_process(describe: Callable[..., dict[str, Any]], *folders: Path, library: str) -> dict[str, Any]:
    """`describe(*folders)` in another working folder, without this repository, network or token. `describe` is taken
    there as its source, so it imports all it needs; `library` is what it uses, as the error says.

    Raises:
        InputError: it fails there.
    """
    program = "\n".join(
        [
            "import json, sys",
            f"sys.modules.update(dict.fromkeys({_OUR_PACKAGES!r}))",  # None: importing it is an error
            inspect.getsource(describe),
            f"print(json.dumps({describe.__name__}(*sys.argv[1:])))",
        ]
    )
    environment = {name: value for name, value in os.environ.items() if "TOKEN" not in name} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *(str(folder.resolve()) for folder in folders)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        reason = (done.stderr.strip() or f"it ended with code {done.returncode}").splitlines()[-1]
        raise InputError(f"{folders[0]}: plain {library} cannot use it: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


def describe_dataset(path: str) -> dict:
    """Read every config as a stranger does, unpacked and streamed, and tell what came. Runs alone."""
    import shutil

    import datasets

    datasets.disable_progress_bars()
    facts = {}
    for name in datasets.get_dataset_config_names(path):
        told = datasets.load_dataset_builder(path, name, cache_dir="cache").info
        loaded = datasets.load_dataset(path, name, cache_dir="cache")
        rows = loaded["train"].with_format("arrow")
        streamed, equal = 0, True
        # to the end: an open stream may abort the interpreter when it exits (datasets 5.2)
        for batch in datasets.load_dataset(path, name, split="train", streaming=True).with_format("arrow").iter(4096):
            equal = equal and batch.equals(rows[streamed : streamed + len(batch)])
            streamed += len(batch)
        facts[name] = {
            "splits": list(loaded),
            "rows": len(rows),
            "rows_in_card": told.splits["train"].num_examples if told.splits else None,
            "features": rows.features.to_dict(),
            "features_in_card": told.features.to_dict() if told.features else None,
            "streams_the_same": equal and streamed == len(rows),
        }
        del loaded, rows
        shutil.rmtree("cache")
    return facts


def check_configs(folder: Path, rows: Mapping[str, int], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Where the manifest's row counts, the card and what `datasets` read are not the same."""
    from datasets import Features

    if list(rows) != list(found):
        return [f"the card has configs {', '.join(found)}, and the manifest {', '.join(rows)}"]
    problems = []
    for name, facts in found.items():
        counts = {"the manifest": rows[name], "the card": facts["rows_in_card"]}
        problems += [
            f"config {name!r} has {facts['rows']} rows, and {count} in {where}"
            for where, count in counts.items()
            if count != facts["rows"]
        ]
        for path in sorted((folder / name).glob("*.parquet")):
            stored = Features.from_arrow_schema(pq.read_schema(path).remove_metadata()).to_dict()
            if not stored == facts["features"] == facts["features_in_card"]:
                problems.append(f"{path.relative_to(folder)} has other columns than the card")
        if facts["splits"] != ["train"]:
            problems.append(f"config {name!r} has splits {', '.join(facts['splits'])}")
        if not facts["streams_the_same"]:
            problems.append(f"config {name!r} gives other rows when it is streamed")
    return problems


def check_rows(paths: Mapping[str, list[Path]]) -> list[str]:
    """What is wrong with the rows: labels outside (0, 1), ids that are not unique or refer to nothing, ..."""
    wrong: Counter[str] = Counter()
    known = {}
    for name, key in _KEYS.items():
        for column in (key, "text") if name in paths else ():
            hashes = [_hashes(table[column]) for table in _tables(paths[name], [column])]
            known[name, column] = np.sort(np.concatenate([np.empty(0, np.int64), *hashes]))
        if name in paths:
            ids = known[name, key]
            wrong[f"{name}: {key} that another row has"] += int(np.count_nonzero(ids[1:] == ids[:-1]))
    for name, files in paths.items():
        for table in _tables(files):
            for problem, count in _wrong_rows(table, known, name):
                wrong[f"{name}: {problem}"] += count
    return [f"{problem} ({count} rows)" for problem, count in wrong.items() if count]


def _tables(paths: list[Path], columns: list[str] | None = None) -> Iterator[pa.Table]:
    for path in paths:
        yield from row_groups(path, columns)


def _hashes(values: pa.ChunkedArray) -> np.ndarray:
    """(n,) int64, salted by this process: no text can be made to look like another."""
    return np.fromiter(map(hash, values.to_pylist()), np.int64, len(values))


def _wrong_rows(table: pa.Table, known: Mapping[tuple[str, str], np.ndarray], name: str) -> Iterator[tuple[str, int]]:
    """(what is wrong, in how many rows) of a row group."""
    for column in table.column_names:
        kind = column.partition("_")[0] if name.startswith("train") else column
        target = (_TEXTS if name.startswith("train") else _IDS).get(kind)
        if target or column in ("text", "sentence1", "sentence2", "label"):
            yield f"{column} is null", table[column].null_count
        if target in known and target[0] != name:
            hashes = _hashes(table[column])
            first, last = (np.searchsorted(known[target], hashes, side) for side in ("left", "right"))
            yield f"{column} is in no row of {target[0]}", int(np.count_nonzero(first == last))
    if "teacher_score" in table.column_names:
        yield "teacher_score is not finite", _count(pc.invert(pc.is_finite(table["teacher_score"])))
    if "label" in table.column_names:
        labels = table["label"]
        if pa.types.is_list(labels.type):
            width = sum(column == "positive" or column.startswith("negative_") for column in table.column_names)
            yield f"label has not {width} values", _count(pc.not_equal(pc.list_value_length(labels), width))
            labels = pc.list_flatten(labels)
        inside = pc.and_(pc.greater(labels, 0), pc.less(labels, 1))
        yield "label is outside (0, 1)", _count(pc.invert(pc.fill_null(inside, False)))


def _count(flags: pa.ChunkedArray) -> int:
    return pc.sum(flags).as_py() or 0


def check_places(folder: Path, paths: Mapping[str, list[Path]]) -> list[str]:
    """Files that name a folder of this machine: the card and the plots, the notes in Parquet files, and ids."""
    places = {Path.home(), Path.cwd(), folder.resolve(), *folder.resolve().parents}
    # /tmp or /data says nothing; a longer path does
    ours = "|".join(re.escape(str(place)) for place in sorted(places) if len(place.parts) > 2)
    read = {README: (folder / README).read_text(encoding="utf-8")}
    read |= {f"assets/{path.name}": path.read_bytes().decode("latin-1") for path in (folder / "assets").glob("*.png")}
    for path in (path for files in paths.values() for path in files):
        notes = pq.read_metadata(path).metadata or {}
        read[path.relative_to(folder).as_posix()] = b"\n".join([*notes, *notes.values()]).decode("latin-1")
    problems = [name for name, text in read.items() if re.search(f"{_HOMES}|{ours}", text)]
    for name, key in _KEYS.items():  # ids can look like any path, so only those of this machine
        tables = _tables(paths.get(name, []), [key])
        if any(_count(pc.match_substring_regex(table[key], ours)) for table in tables):
            problems.append(f"a {key}")
    return [f"{where} names a folder of this machine" for where in problems]
