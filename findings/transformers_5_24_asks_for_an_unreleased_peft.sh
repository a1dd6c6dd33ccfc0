#!/usr/bin/env bash
# transformers 5.24.0 and peft 0.21.2: pip finds no conflict, and no adapter can be added.
#
# transformers raised the oldest peft that its own adapter methods take to 0.22.0, while the newest peft on PyPI is
# 0.21.2; peft is no requirement of transformers, so `pip check` says nothing. `model.add_adapter`, which
# sentence-transformers calls too, raises a ValueError that advises a version which does not exist; peft's own
# get_peft_model goes on working. A good guess is that the newest releases of both fit. transformers 5.23.0 does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
for version in 5.23.0 5.24.0; do
  "$folder/venv/bin/pip" install --quiet "transformers==$version" peft==0.21.2 torch==2.13.0
  "$folder/venv/bin/pip" check
  "$folder/venv/bin/python" - <<'PYTHON'
import peft
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaModel

config = LlamaConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
lora = LoraConfig(r=2, target_modules="all-linear")
get_peft_model(LlamaModel(config), lora)
try:
    LlamaModel(config).add_adapter(lora)
    answer = "added"
except ValueError as error:
    answer = str(error)
print(f"transformers {transformers.__version__}, peft {peft.__version__}: {answer}")
expected = {"5.23.0": "added", "5.24.0": "0.22.0"}[transformers.__version__]
assert expected in answer, "this has changed: see the comment"
PYTHON
done
