#!/usr/bin/env bash
# tokenizers 0.23.3: a post-processor may hold the text twice, and then truncation does not keep to max_length.
#
# `TemplateProcessing(single="again : $A now : $A")` is accepted, saved in tokenizer.json and loaded again, so a prompt
# that repeats its text (Echo embeddings, arXiv 2402.15449) needs no code. A good guess is that truncation to 10 then
# gives 10 tokens. It takes the template's own 4 tokens off and cuts the text to the 6 left, once: the result has 16.
# Seen: 16 tokens for max_length 10. Whoever uses such a template must ask for less than the model has positions for.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3
"$folder/venv/bin/python" - "$folder/tokenizer.json" <<'PYTHON'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers, processors

words = ["[UNK]", "again", "now", ":", "word"]
tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
pieces = [{"id": name, "ids": ids, "tokens": [words[i] for i in ids]} for name, ids in (("p", [1, 3]), ("q", [2, 3]))]
tokenizer.post_processor = processors.TemplateProcessing(single=["p", "$A", "q", "$A"], special_tokens=pieces)
tokenizer.save(sys.argv[1])
tokenizer = Tokenizer.from_file(sys.argv[1])
assert tokenizer.encode("word word").tokens == ["again", ":", "word", "word", "now", ":", "word", "word"]
assert tokenizer.num_special_tokens_to_add(False) == 4
tokenizer.enable_truncation(max_length=10)
length = len(tokenizer.encode("word " * 50).ids)
print(f"max_length 10, a template of 4 tokens with the text twice: {length} tokens")
assert length == 16, "truncation has changed: see the comment"
PYTHON
