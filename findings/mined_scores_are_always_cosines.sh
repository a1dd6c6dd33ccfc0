#!/usr/bin/env bash
# sentence-transformers 6.2.0: mine_hard_negatives(output_scores=True) writes cosines of the bi-encoder, whatever is asked for.
#
# Scores beside mined negatives are what distillation (MarginMSE, KL) takes for its teacher's. A good guess is that a
# cross_encoder, which is there "for rescoring the candidates", gives them; the page says of output_scores "computed by
# the model or cross_encoder". It is asked if a margin, max_score or min_score is set, too, and else not once, without a
# word. Nor is the model's own similarity heard: vectors are brought to unit length first, so that one trained for dot
# products is mined, filtered and scored by cosines.
# Seen: no call of the cross-encoder and cosines in "scores"; its own scores with min_score=-1e9, which filters nothing; and
# for a dot-product model another negative than the one that its similarity() puts first.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 datasets==5.2.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from datasets import Dataset
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Dense
from sentence_transformers.util import mine_hard_negatives
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

words = ["query", "right", "short", "long", "away"]
with open("vocab.txt", "w") as stream:
    stream.write("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]))
sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "num_labels": 1}
BertForSequenceClassification(BertConfig(vocab_size=10, **sizes)).save_pretrained("cross")
BertTokenizerFast("vocab.txt", model_max_length=32).save_pretrained("cross")
scored = []


class Counted(CrossEncoder):
    def predict(self, inputs, **kwargs):
        scored.extend(inputs)
        return super().predict(inputs, **kwargs)


def bi_encoder(similarity):
    dense = Dense(5, 2, bias=False, activation_function=torch.nn.Identity())
    # "short" points where the query does; "long" is farther round, and has the larger dot product
    dense.linear.weight.data = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.5, 0.05], [9.0, 9.0], [-1.0, 0.0]]).T
    return SentenceTransformer(modules=[BoW(vocab=words), dense], similarity_fn_name=similarity)


pairs = Dataset.from_dict({"query": ["query"], "document": ["right"]})
asked = {"corpus": words[1:], "num_negatives": 1, "output_scores": True, "verbose": False}
cross_encoder = Counted("cross")
plain = mine_hard_negatives(pairs, bi_encoder("cosine"), **asked)[0]
beside = mine_hard_negatives(pairs, bi_encoder("cosine"), cross_encoder=cross_encoder, **asked)[0]
calls = len(scored)
filtered = mine_hard_negatives(pairs, bi_encoder("cosine"), cross_encoder=cross_encoder, min_score=-1e9, **asked)[0]
print(f"scores {plain['scores']}; with a cross-encoder {beside['scores']}, {calls} pairs scored")
print(f"with a cross-encoder and min_score=-1e9 {filtered['scores']}, {len(scored) - calls} pairs scored")
assert beside == plain and calls == 0, "the cross-encoder is asked now"
assert filtered["scores"] != plain["scores"] and len(scored) > 0, "the cross-encoder is asked no more"
dot = bi_encoder("dot")
similarities = dot.similarity(dot.encode("query"), dot.encode(words[2:]))[0]
mined = mine_hard_negatives(pairs, dot, **asked)[0]
print(f"dot products {dict(zip(words[2:], similarities.tolist()))}; mined {mined['negative']!r}, scores {mined['scores']}")
assert words[2:][int(similarities.argmax())] == "long", "the model is not as it was meant to be"
assert mined["negative"] == "short" and max(mined["scores"]) < 1, "the model's own similarity is heard now"
PYTHON
