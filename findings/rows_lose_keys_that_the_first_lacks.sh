#!/usr/bin/env bash
# datasets 5.2.0, pyarrow 26.0.1, polars 2.1.0: of a list of dicts, keys that come later than the first row are dropped.
#
# Mined rows are often written as {"query", "positive", "negative_1", ...} with as many negatives as were found. A good guess
# is that a table made of them has all columns, with nulls in rows that lack some, as pandas has, or that the rows are
# refused. Dataset.from_list, Dataset.from_generator and pyarrow's Table.from_pylist take their columns from the first row,
# polars from the first 100; what other rows hold beside them is gone without a word.
# Seen: where the first row found one negative and all others two, no second negative is left; polars loses those that first
# come up in row 101. pandas, and load_dataset("json") of the same rows in a file, keep them. Give features or a schema.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1 polars==2.1.0 pandas==3.1.1
cd "$folder"
HF_HUB_OFFLINE=1 HF_HOME="$folder/cache" HF_DATASETS_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" - <<'PYTHON'
import json

import pandas as pd
import polars as pl
import pyarrow as pa
from datasets import Dataset, load_dataset

one = {"query": "a", "positive": "b", "negative_1": "c"}
two = one | {"negative_2": "d"}
early, late = [one, *[two] * 9], [*[one] * 100, *[two] * 9]
ways = {
    "Dataset.from_list": lambda rows: Dataset.from_list(rows).to_list(),
    "Dataset.from_generator": lambda rows: Dataset.from_generator(lambda: iter(rows)).to_list(),
    "pa.Table.from_pylist": lambda rows: pa.Table.from_pylist(rows).to_pylist(),
    "pl.DataFrame": lambda rows: pl.DataFrame(rows).to_dicts(),
    "pl.from_dicts": lambda rows: pl.from_dicts(rows).to_dicts(),
    "pd.DataFrame": lambda rows: pd.DataFrame(rows).astype(object).where(lambda kept: kept.notna(), None).to_dict("records"),
}


def from_json(rows):
    with open(f"{len(rows)}.jsonl", "w") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)
    return load_dataset("json", data_files=f"{len(rows)}.jsonl", split="train").to_list()


kept = {}
for name, way in (ways | {"load_dataset of JSON lines": from_json}).items():
    kept[name] = [sum(row.get("negative_2") == "d" for row in way(rows)) for rows in (early, late)]
    print(f"{name:27} second negatives kept of 9: {kept[name][0]} from row 2 on, {kept[name][1]} from row 101 on")
for name in ("Dataset.from_list", "Dataset.from_generator", "pa.Table.from_pylist"):
    assert kept[name] == [0, 0], f"{name} keeps later keys now"
for name in ("pl.DataFrame", "pl.from_dicts"):
    assert kept[name] == [9, 0], f"{name} has changed"
for name in ("pd.DataFrame", "load_dataset of JSON lines"):
    assert kept[name] == [9, 9], f"{name} loses keys now"
PYTHON
