#!/usr/bin/env bash
# sentence-transformers 6.2.0, torch 2.13.0: similarities of int8 vectors are taken modulo 256 for a dot-product model.
#
# encode(..., precision="int8") quantises, and model.similarity compares what encode gave. A good guess is that sums are
# made in a wider type. For a model whose similarity is "dot" the matrix is torch.mm of int8 by int8, which is int8 again:
# every sum wraps into -128 ... 127, and semantic_search(score_function=dot_score) ranks by what is left.
# similarity_pairwise wraps each product and adds those up, so it is wrong by another number. No warning; "cosine" raises
# an error here.
# Seen: all of 200 queries that are copies of documents find their document by the float vectors and by int8 vectors whose
# sums are int32, and none by model.similarity or semantic_search; the first vector by itself is 319,894 in truth, -106 in
# the matrix and -362 pairwise. Cast to a wider type before comparing.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 sentence-transformers==6.2.0
cd "$folder"
CUDA_VISIBLE_DEVICES="" HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import BoW, Dense, Normalize
from sentence_transformers.util import dot_score, semantic_search

words = [f"w{number}" for number in range(200)]
torch.manual_seed(0)
dense = Dense(200, 64, bias=False, activation_function=torch.nn.Identity())
model = SentenceTransformer(modules=[BoW(vocab=words), dense, Normalize()], similarity_fn_name="dot")
floats, codes = model.encode(words), model.encode(words, precision="int8")
scores = {
    "float": model.similarity(floats, floats),
    "int8, summed as int32": codes.astype(np.int32) @ codes.astype(np.int32).T,
    "int8, model.similarity": model.similarity(codes, codes),
}
found = {name: int((np.asarray(matrix).argmax(axis=1) == np.arange(200)).sum()) for name, matrix in scores.items()}
hits = semantic_search(torch.from_numpy(codes), torch.from_numpy(codes), top_k=1, score_function=dot_score)
found["int8, semantic_search"] = sum(first["corpus_id"] == place for place, [first] in enumerate(hits))
print(f"of 200 queries that are their document, found: {found}")
matrix = scores["int8, model.similarity"]
true, wrapped = int(scores["int8, summed as int32"][0, 0]), int(matrix[0, 0])
pairwise = int(model.similarity_pairwise(codes[:1], codes[:1])[0])
print(f"the first vector by itself: {true} in int32, {wrapped} by similarity, {pairwise} by similarity_pairwise")
assert matrix.dtype == torch.int8 and wrapped == (true + 128) % 256 - 128, "sums are made in another type now"
assert pairwise == (codes[0] * codes[0]).sum(dtype=np.int64) != true, "products are made in another type now"
assert found["float"] == 200 and found["int8, summed as int32"] >= 190, "the model is not as it was meant to be"
assert found["int8, model.similarity"] < 20 and found["int8, semantic_search"] < 20, "sums do not wrap any more"
PYTHON
