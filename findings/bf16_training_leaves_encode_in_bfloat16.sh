#!/usr/bin/env bash
# sentence-transformers 6.2.0, transformers 5.23.0, accelerate 1.15.0, torch 2.13.0: after a training with bf16 the model in
# memory gives other vectors than the one that is saved.
#
# A good guess is that mixed precision ends with train(): weights are in float32, and encode() outside the trainer computes
# with them as it did before. accelerate has wrapped the model's own forward in autocast, and leaves it so: encode(), an
# evaluator that is called afterwards, and vectors written down for comparison are bfloat16's, while save_pretrained and
# loading give float32's. accelerator.unwrap_model(model, keep_fp32_wrapper=False) takes the wrapper off; its default keeps it.
# Seen: the model in memory and its saved copy are 4e-4 apart on this tiny one (1e-2 on a trained one of 12 layers), and equal
# once it is unwrapped.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 accelerate==1.15.0 \
  datasets==5.2.0 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.losses import MultipleNegativesRankingLoss
from transformers import BertConfig, BertModel, BertTokenizerFast

words = "one two three four five six seven eight".split()
with open("vocab.txt", "w") as stream:
    stream.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
torch.manual_seed(0)
sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
BertModel(BertConfig(vocab_size=13, **sizes)).save_pretrained("base")
BertTokenizerFast("vocab.txt").save_pretrained("base")
model = SentenceTransformer("base", device="cpu")
pairs = Dataset.from_dict({"anchor": words, "positive": words[::-1]})
arguments = SentenceTransformerTrainingArguments(
    "out", max_steps=1, bf16=True, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
)
trainer = SentenceTransformerTrainer(model, arguments, pairs, loss=MultipleNegativesRankingLoss(model))
trainer.train()
model.save_pretrained("saved")
saved = SentenceTransformer("saved", device="cpu").encode(words)


def distance():
    return float(abs(model.encode(words) - saved).max())


after_training = distance()
trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
unwrapped = distance()
print(f"largest difference to the saved model: {after_training:.0e} after training, {unwrapped:.0e} unwrapped")
assert next(model.parameters()).dtype == torch.float32
assert after_training > 1e-4, "training leaves no autocast behind any more"
assert unwrapped < 1e-6, "unwrap_model(keep_fp32_wrapper=False) leaves something behind"
PYTHON
