#!/usr/bin/env bash
# sentence-transformers 6.2.0, transformers 5.23.0: a resumed training begins with a new loss.
#
# Some losses learn weights of their own: SoftmaxLoss its classifier, others a temperature, a projection, a decoder. The
# trainer optimises them with the model's, and a good guess is that resume_from_checkpoint brings back what was
# optimised, so that a killed run ends as one that was not. A checkpoint holds the model, and for the loss's weights the
# optimiser's moments alone: the classifier is drawn anew at random, and goes on with the moments of the one that is lost.
# Its learning rate does not warm up again, and nothing is said.
# Seen: the resumed classifier is the freshly drawn one to the bit, half a unit away from the saved training's; the model's
# own weights are equal.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 \
    accelerate==1.15.0 datasets==5.2.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import SoftmaxLoss
from sentence_transformers.sentence_transformer.modules import BoW, Dense

words = [f"w{number}" for number in range(40)]
rows = Dataset.from_dict({"a": words[:20], "b": words[20:], "label": [number % 3 for number in range(20)]})


class Watched(SoftmaxLoss):
    seen = None  # (classifier, encoder) as they are at each step

    def forward(self, features, labels):
        self.seen.append([self.classifier.weight.detach().clone(), self.model[1].linear.weight.detach().clone()])
        return super().forward(features, labels)


def train(seed, checkpoint=None):
    torch.manual_seed(seed)
    model = SentenceTransformer(modules=[BoW(vocab=words), Dense(40, 4)])
    loss = Watched(model, 4, 3)
    loss.seen, drawn = [], loss.classifier.weight.detach().clone()
    arguments = SentenceTransformerTrainingArguments(
        f"run{seed}", max_steps=8, per_device_train_batch_size=5, learning_rate=0.01, save_steps=4, report_to="none",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=rows, loss=loss)
    trainer.train(resume_from_checkpoint=checkpoint)
    return drawn, loss.seen


_, whole = train(1)
drawn, resumed = train(2, "run1/checkpoint-4")
assert len(whole) == 8 and len(resumed) == 4
(classifier, encoder), (again, encoder_again) = whole[4], resumed[0]
print(f"at step 5 the classifiers are {float((classifier - again).abs().max()):.3f} apart, the encoders "
      f"{float((encoder - encoder_again).abs().max())}; the resumed classifier is the new one: {torch.equal(again, drawn)}")
assert torch.equal(encoder, encoder_again), "the model is not as it was saved"
assert torch.equal(again, drawn) and not torch.allclose(again, classifier, atol=0.1), "the loss is resumed now"
PYTHON
