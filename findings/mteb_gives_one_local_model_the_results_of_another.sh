#!/usr/bin/env bash
# mteb 2.26.24, sentence-transformers 6.2.0: of models loaded from local folders, the second gets the first one's scores.
#
# A good guess is that mteb.evaluate(SentenceTransformer("folder"), task) scores that model. Results are kept below
# ~/.cache/mteb by the model's name and revision. A model that was trained and saved by sentence-transformers has neither,
# whatever its folder is called: it is no_model_name/available at no_revision_available, and what the first such model
# scored is handed to all later ones, in later processes as well.
# Seen: two models whose correlations with the gold scores are 1 and -1 both score 1; the second has -1 with cache=None.
# Two checkpoints of one training are compared like that. Give each model a name and revision, or pass cache=None.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0 \
    datasets==5.2.0 mteb==2.26.24
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 MTEB_CACHE="$folder/cache" "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import mteb
import torch
from mteb.mocks import MOCK_TASK_REGISTRY
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Dense

task = MOCK_TASK_REGISTRY["MockSTSTask"]()  # "This is a test sentence" matches its Danish translation, "another" does not
words = ["this", "another", "dette", "denne"]
# the words' vectors: as the gold scores have it, and the other way round
vectors = {
    "right": [[1.0, 0.0], [0.0, 1.0], [1.0, 0.2], [1.0, 0.1]],
    "wrong": [[1.0, 0.0], [0.0, 1.0], [0.1, 1.0], [0.2, 1.0]],
}
scores = {}
for name, rows in vectors.items():
    dense = Dense(len(words), 2, bias=False, activation_function=torch.nn.Identity())
    dense.linear.weight.data = torch.tensor(rows).T
    SentenceTransformer(modules=[BoW(vocab=words), dense]).save_pretrained(name)
    model = SentenceTransformer(name)
    kept = mteb.evaluate(model, task, show_progress_bar=False)
    alone = mteb.evaluate(model, task, cache=None, show_progress_bar=False)
    scores[name] = [round(float(found.task_results[0].get_score()), 3) for found in (kept, alone)]
    print(f"{name}: {kept.model_name} {kept.model_revision}, with the default cache and without: {scores[name]}")
assert scores["right"] == [1, 1] and scores["wrong"][1] == -1, "the two models are not as they were meant to be"
assert scores["wrong"][0] == 1, "mteb tells local models apart now"
PYTHON
