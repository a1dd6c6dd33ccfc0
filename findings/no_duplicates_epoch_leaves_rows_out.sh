#!/usr/bin/env bash
# sentence-transformers 6.2.0, transformers 5.23.0: batch_sampler="no_duplicates" can end an epoch with rows unseen.
#
# A good guess is that the sampler only moves rows to other batches, so that one epoch reads each row once. It reads what
# its __len__ promises, rows / batch_size rounded up, and rows that repeat a text need more batches than that: where half
# of 100 rows share their positive, batches of 10 come to 50, one shared row in each. The trainer stops after 10. The
# sampler's own warning is for drop_last=True alone, where batches come short; here nothing is said.
# Seen: 60 of 100 rows trained on in an epoch, the last four batches of one row each, which has no in-batch negative.
# Data with few distinct positives (labels, popular passages) is where this bites: count what was read.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 \
    accelerate==1.14.0 datasets==5.2.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import BoW, Dense

words = [f"w{number}" for number in range(100)]
rows = [{"anchor": word, "positive": "same" if place < 50 else word} for place, word in enumerate(words)]
model = SentenceTransformer(modules=[BoW(vocab=[*words, "same"]), Dense(101, 8)])
batches = []


class Recording(MultipleNegativesRankingLoss):
    def forward(self, sentence_features, labels):
        sentence_features = list(sentence_features)
        batches.append(sentence_features[0]["sentence_embedding"].argmax(dim=1).tolist())  # one word a text
        return super().forward(sentence_features, labels)


arguments = SentenceTransformerTrainingArguments(
    "out",
    num_train_epochs=1,
    per_device_train_batch_size=10,
    batch_sampler="no_duplicates",
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
trainer = SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=Recording(model))
promised = len(trainer.get_train_dataloader())
needed = sum(1 for _ in trainer.get_train_dataloader().batch_sampler)
trainer.train()
seen = {row for batch in batches for row in batch}
sizes = [len(batch) for batch in batches]
print(f"batches promised {promised}, needed {needed}; epoch {trainer.state.epoch}: {len(seen)} of 100 rows, sizes {sizes}")
assert (promised, needed, trainer.state.epoch) == (10, 50, 1.0), "the sampler or the trainer has changed"
assert len(seen) == 60 and sizes[-4:] == [1, 1, 1, 1], "the rows of an epoch have changed: see the comment"
PYTHON
