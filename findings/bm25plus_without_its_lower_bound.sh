#!/usr/bin/env bash
# rank_bm25 0.2.2 and bm25s 0.3.16: the delta of BM25+ has no influence on any ranking.
#
# BM25+ (Lv and Zhai, CIKM 2011) gives a document at least delta * idf for each query term *that it holds*, so that a long
# document with the term beats a document without it by a margin. A good guess is that BM25Plus(corpus, delta=...) and
# BM25(method="bm25+", delta=...) do that. Both give delta * idf to all documents, those without the term as well: the
# same number is added to every score of a query, and scores differ from those of delta = 0 by that constant alone. So
# BM25+ comes out as BM25 with another idf, and a search for the best delta finds that all are alike.
# Seen: with delta 0, 2 and 100 the same scores above the lowest one, in both; by the paper's sum over the terms in
# common, a long document with both terms passes the short one with one of them at delta = 2.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet rank_bm25==0.2.2 bm25s==0.3.16 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
from math import log

import bm25s
import numpy as np
from rank_bm25 import BM25Plus

query = ["wolf", "fox"]
documents = [["wolf", "fox", *["x"] * 60], ["fox"], ["wolf", *["y"] * 5], ["bear"], ["fish", "bird"], ["bear"]]
mean = np.mean([len(words) for words in documents])


def by_the_paper(delta, k1=1.5, b=0.75):
    scores = np.zeros(len(documents))
    for place, words in enumerate(documents):
        for term in set(query) & set(words):
            holding, count = sum(term in others for others in documents), words.count(term)
            saturated = count * (k1 + 1) / (k1 * (1 - b + b * len(words) / mean) + count)
            scores[place] += log((len(documents) + 1) / holding) * (saturated + delta)
    return scores


def by_bm25s(delta):
    retriever = bm25s.BM25(method="bm25+", delta=delta, k1=1.5, b=0.75)
    retriever.index(documents, show_progress=False)
    return retriever.get_scores(query)


ways = {"paper": by_the_paper, "rank_bm25": lambda delta: BM25Plus(documents, delta=delta).get_scores(query)}
ways["bm25s"] = by_bm25s
above = {}
for name, way in ways.items():
    for delta in (0, 2, 100):
        scores = np.asarray(way(delta), float)
        above[name, delta] = scores - scores.min()
        print(f"{name:9} delta {delta:3}: lowest {scores.min():7.3f}, above it {above[name, delta].round(3)}")
assert above["paper", 0][1] > above["paper", 0][0] and above["paper", 2][1] < above["paper", 2][0]
for name in ("rank_bm25", "bm25s"):
    for delta in (0, 2, 100):  # at 100 float32 has four decimals left
        assert np.allclose(above[name, delta], above["paper", 0], atol=1e-3), f"{name} hears delta now"
PYTHON
