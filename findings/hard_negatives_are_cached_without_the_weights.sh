#!/usr/bin/env bash
# sentence-transformers 6.2.0: mining again after training gives the negatives of the model before it.
#
# mine_hard_negatives(..., cache_folder=...) keeps vectors for "subsequent calls". A good guess is that they are kept by the
# model that made them. The key is made of the texts, the prompts and the model card's base_model, so a model before and
# after its training shares one file. A model out of a local folder, or built of modules as here, has no base_model, and
# all such models share one: checkpoints and strangers alike.
# Seen: a trained model's negatives are other ones, but with the cache it gets those of its first round, word for word,
# and so does a second model. Mining in rounds (ANCE) or a comparison of miners is void: use a folder for each model.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 datasets==5.2.0 \
    accelerate==1.15.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW, Dense
from sentence_transformers.util import mine_hard_negatives

words = [f"w{number}" for number in range(40)]
pairs = Dataset.from_dict({"query": words[:20], "document": words[20:]})


def new_model(seed):
    torch.manual_seed(seed)
    return SentenceTransformer(modules=[BoW(vocab=words), Dense(40, 8)])


def mined(model, **cache):
    return list(mine_hard_negatives(pairs, model, num_negatives=1, verbose=False, **cache)["negative"])


model = new_model(0)
first = mined(model, cache_folder="cache")
assert first == mined(model)
arguments = SentenceTransformerTrainingArguments(
    "out", num_train_epochs=20, learning_rate=0.05, save_strategy="no", report_to="none", disable_tqdm=True
)
SentenceTransformerTrainer(model, arguments, train_dataset=pairs, loss=MultipleNegativesRankingLoss(model)).train()
other = new_model(1)
for name, again in (("the trained model", model), ("another model", other)):
    right, cached = mined(again), mined(again, cache_folder="cache")
    changed = sum(a != b for a, b in zip(right, first, strict=True))
    print(f"{name}: {changed} of 20 negatives are other ones; with the cache {sum(a != b for a, b in zip(cached, first))}")
    assert changed >= 5, "the models are not as different as they were meant to be"
    assert cached == first, "the cache tells models apart now"
PYTHON
