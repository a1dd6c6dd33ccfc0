#!/usr/bin/env bash
# transformers 5.23.0: AutoTokenizer makes a tokenizer for a folder that has none, and it knows no word.
#
# A good guess is that a checkpoint whose tokenizer files were not copied (model.save_pretrained alone, a partial
# download) is refused, as 4.57 did and as 5 still does for Llama and Mistral. For other families 5 builds one out of the
# class's own special tokens and says nothing.
# Seen: BERT reads every word as [UNK], so that texts of equal length are equal; Qwen3 gives no ids at all, for any text.
# Training on that runs and learns nothing. Look at len(tokenizer), or at the ids of two texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
for version in 4.57.6 5.23.0; do
    python3 -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "transformers==$version" protobuf==6.33.1 sentencepiece==0.2.1
    HF_HUB_OFFLINE=1 "$folder/$version/bin/python" - "$folder/models" <<'PYTHON'
import sys

import transformers
from transformers import AutoTokenizer, BertConfig, LlamaConfig, Qwen3Config

seen = {}
for config in (BertConfig, Qwen3Config, LlamaConfig):
    path = f"{sys.argv[1]}/{config.model_type}"
    config().save_pretrained(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        seen[config.model_type] = [tokenizer(text)["input_ids"] for text in ("sort a list", "open my file")]
    except (ImportError, OSError, TypeError, ValueError) as error:
        seen[config.model_type] = type(error).__name__
print(transformers.__version__, seen)
if transformers.__version__.startswith("5."):
    bert = seen["bert"]
    assert bert[0] == bert[1] and len(bert[0]) == 5 and len({*bert[0][1:4]}) == 1, "BERT's words are told apart now"
    assert seen["qwen3"] == [[], []] and seen["llama"] == "ValueError", "see the comment"
else:
    assert all(isinstance(result, str) for result in seen.values()), "4.57 made one, too"
PYTHON
done
