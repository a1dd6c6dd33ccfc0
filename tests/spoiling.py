"""What the cases of bad input do to a folder of sound inputs, before the command runs in it."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from common.steps import read_arrow, write_arrow


def later(function):
    """`function(folder, ...)` as a change that is made once there is a folder."""
    return lambda *arguments, **named: lambda folder: function(folder, *arguments, **named)


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@later
def delete(folder, name):
    remove(folder / name)


@later
def write(folder, name, content):
    remove(folder / name)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


@later
def cut(folder, name, end):
    (folder / name).write_bytes((folder / name).read_bytes()[:end])


@later
def keys(folder, **changed):
    """Keys of the recipe: `mining.margin` is margin in the section mining."""
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for path, value in changed.items():
        *sections, last = path.split(".")
        target = recipe
        for section in sections:
            target = target.setdefault(section, {})
        target[last] = value
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@later
def columns(folder, name, **changed):
    """Columns of a table: one value for all rows, a list to begin with, or None to leave the column out."""
    is_arrow = name.endswith(".arrow")
    table = read_arrow(folder / name) if is_arrow else pq.read_table(folder / name)
    values = table.to_pydict()
    for column, new in changed.items():
        here = values.pop(column)
        if isinstance(new, list):
            values[column] = [*new, *here[len(new) :]]
        elif new is not None:
            values[column] = [new] * len(here)
    table = pa.table(values) if changed else table.slice(0, 0)
    if is_arrow:
        write_arrow(folder / name, table.to_batches(), table.schema)
    else:
        pq.write_table(table, folder / name)


no_rows = columns


@later
def one_file(folder, task_type, **values):
    """A set of one file in place of a corpus."""
    shutil.rmtree(folder / "set")
    (folder / "set").mkdir()
    pq.write_table(pa.table(values), folder / "set" / "train.parquet")
    keys(task_type=task_type, **{"source.eval_splits": []})(folder)
    if task_type == "sts":
        source = {"kind": "local", "path": "set", "score_range": [0, 5]}
        recipe = {"task_type": "sts", "instruction": "x", "source": source}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@later
def another(folder, table="queries", **changed):
    """A local set whose test queries are kept out of training, with these columns of a table of its own."""
    shutil.copytree(folder / "set", folder / "other")
    keys(decontamination={"local": {"Other": "other"}})(folder)
    columns(f"other/{table}.parquet", **changed)(folder)
