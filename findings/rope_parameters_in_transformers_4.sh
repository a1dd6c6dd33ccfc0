#!/usr/bin/env bash
# transformers 5 writes RoPE's base as rope_parameters alone. transformers 4 does not look there: it takes its default
# base, 10,000, without a warning, and every vector is another one. Both keys side by side are read rightly by both.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/new"
python3 -m venv "$folder/old"
"$folder/new/bin/pip" install --quiet 'transformers==5.23.0'
"$folder/old/bin/pip" install --quiet 'transformers==4.57.6'

"$folder/new/bin/python" - "$folder" <<'PYTHON'
import json, sys
import transformers

folder = sys.argv[1]
config = transformers.LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 100_000.0})
config.save_pretrained(f"{folder}/as_written")
written = json.load(open(f"{folder}/as_written/config.json"))
print(f"transformers {transformers.__version__} writes", {key: written[key] for key in written if "rope" in key})
config.save_pretrained(f"{folder}/both")
json.dump(written | {"rope_theta": 100_000.0}, open(f"{folder}/both/config.json", "w"))
again = transformers.AutoConfig.from_pretrained(f"{folder}/both")
assert again.rope_parameters == config.rope_parameters, "transformers 5 no longer reads both"
PYTHON

"$folder/old/bin/python" - "$folder" <<'PYTHON'
import sys, warnings
import transformers

warnings.simplefilter("error")
for name in ("as_written", "both"):
    base = transformers.AutoConfig.from_pretrained(f"{sys.argv[1]}/{name}").rope_theta
    print(f"transformers {transformers.__version__} reads {name}: rope_theta {base:,.0f}")
    assert base == {"as_written": 10_000.0, "both": 100_000.0}[name], "this behaviour has changed"
PYTHON
