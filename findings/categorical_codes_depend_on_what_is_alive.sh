#!/usr/bin/env bash
# polars 2.1.0: the codes behind a Categorical depend on which other categoricals are alive in the process.
#
# All categoricals share one table of strings, so ["y", "z"] gets the codes 1 and 2 while another column ["x", "y"] is
# alive, and 0 and 1 once the last categorical is gone: the table starts anew. A good guess is that codes belong to a
# column, or that they stay for the life of the process. Codes that are kept as numbers (ids of groups, shards, hash
# seeds) and compared with codes made later are wrong without an error. Seen: [1, 2], then [0, 1], for the same values.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet polars==2.1.0
"$folder/venv/bin/python" - <<'PYTHON'
import gc

import polars as pl


def codes(values):
    return pl.Series(values, dtype=pl.Categorical).to_physical().to_list()


other = pl.Series(["x", "y"], dtype=pl.Categorical)
beside = codes(["y", "z"])
del other
gc.collect()
alone = codes(["y", "z"])
print(f"codes of ['y', 'z']: {beside} beside another categorical, {alone} once it is gone")
assert (beside, alone) == ([1, 2], [0, 1]), "the table of categories has changed: see the comment"
PYTHON
