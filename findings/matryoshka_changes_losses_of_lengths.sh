#!/usr/bin/env bash
# sentence-transformers 6.2.0: MatryoshkaLoss around a loss of dot products is another loss, at the full dimension, too.
#
# A good guess is that MatryoshkaLoss(model, loss, [d]) with d the model's own dimension is the loss itself, and that
# smaller dimensions cut the vectors before it. It brings every vector to unit length first, the uncut one as well. A loss
# of cosines does not notice; one of dot products (MarginMSELoss, MultipleNegativesRankingLoss with dot_score, a
# distance) is computed on cosines between -1 and 1, so that a teacher's margins beyond 2 can never be met, while
# encode(), with truncate_dim or without, gives vectors of the lengths that were never trained.
# Seen: a student with exactly its teacher's margins has a MarginMSELoss of 0, and of 25 with MatryoshkaLoss around it;
# CoSENTLoss, of cosines, is the same in both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MarginMSELoss, MatryoshkaLoss
from sentence_transformers.sentence_transformer.modules import BoW, Dense

words = ["query", "positive", "negative"]
dense = Dense(3, 2, bias=False, activation_function=torch.nn.Identity())
dense.linear.weight.data = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]]).T
model = SentenceTransformer(modules=[BoW(vocab=words), dense])
query, positive, negative = model.encode(words, convert_to_tensor=True)
margin = (query @ positive - query @ negative)[None]  # 6, where cosines differ by 1
examples = (
    (MarginMSELoss(model), [["query"], ["positive"], ["negative"]], margin),
    (CoSENTLoss(model), [["query", "query"], ["positive", "negative"]], torch.tensor([0.2, 0.8])),
)
seen = {}
for inner, columns, labels in examples:
    for loss in (inner, MatryoshkaLoss(model, inner, [2])):
        features = [model.preprocess(texts) for texts in columns]
        seen.setdefault(type(inner).__name__, []).append(round(float(loss(features, labels)), 4))
print("alone and in MatryoshkaLoss with the full dimension:", seen)
assert seen["MarginMSELoss"] == [0, 25], "MatryoshkaLoss leaves lengths as they are now"
assert seen["CoSENTLoss"][0] == seen["CoSENTLoss"][1] > 0
PYTHON
