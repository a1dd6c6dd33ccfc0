#!/usr/bin/env bash
# ir_measures 0.4.3, pytrec-eval-terrier 0.5.11: RR@10 is higher than RR, of the same run in the same call.
#
# RR@10 counts the first relevant document if it is among ten, RR wherever it is; a good guess is that RR@10 <= RR, and
# that measures of one call see one ranking. They come from two programs: RR, AP, nDCG and the others from trec_eval,
# which puts documents of equal scores in falling order of their ids, RR@10 from MS MARCO's script, in rising order.
# Scores that tie are common: bfloat16 or int8 vectors, duplicates, a reranker whose sigmoid has come to 1.
# Seen: with three documents of one score RR is 1/3 and RR@10 is 1 for d1, and 1 and 1/3 for d3; nDCG@10 is of RR's order.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ir-measures==0.4.3 pytrec-eval-terrier==0.5.11
"$folder/venv/bin/python" - <<'PYTHON'
from ir_measures import RR, Qrel, ScoredDoc, calc_aggregate, nDCG

run = [ScoredDoc("q", document, 1.0) for document in ("d1", "d2", "d3")]
seen = {}
for relevant in ("d1", "d2", "d3"):
    scores = calc_aggregate([RR, RR @ 10, nDCG @ 10], [Qrel("q", relevant, 1)], run)
    seen[relevant] = [round(scores[measure], 3) for measure in (RR, RR @ 10, nDCG @ 10)]
    print(f"{relevant} relevant: RR, RR@10, nDCG@10 = {seen[relevant]}")
assert seen == {"d1": [0.333, 1, 0.5], "d2": [0.5, 0.5, 0.631], "d3": [1, 0.333, 1]}, "ties are broken otherwise now"
PYTHON
