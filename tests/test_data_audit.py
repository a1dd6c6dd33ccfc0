"""The audit's figures against hand-computed values, references and a plain recount of the files; its plots' bytes."""

import shutil
from itertools import groupby

import numpy as np
import pyarrow as pa
import pytest
from tiny_data import WORDS, tiny_build, write_encoder

from common.steps import parquet_writer, read_parquet, write_arrow, write_json, write_parquet
from dataset_builders import audit
from dataset_builders.audit import MARGINS, gradient_shares, wilson, write_audit
from dataset_builders.mine import Mining, write_mined
from dataset_builders.schema import DOCUMENTS, GROUPS, QRELS, QUERIES, SCORES

QUERY_COUNT, CANDIDATES_EACH = 24, 14
MINING = Mining(num_negatives=3)
COUNTS = {"queries": 24, "documents": 40, "queries_cut": 1, "documents_cut": 30}
PAIRS = {"graded": 336, "pairs_cut": 9, "pairs_without_document": 2}
RELIABILITY = [{"label": 0.1, "observed": 0.2, "positives": 1, "others": 4}]


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 7), (7, 7), (41, 1000)])
def test_wilson_is_scipys(successes, trials):
    from scipy.stats import binomtest

    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    found = wilson(successes, trials)
    assert (found["low"], found["high"]) == pytest.approx((expected.low, expected.high), abs=1e-4)


def test_pairs_of_one_query_do_not_narrow_the_interval():
    assert wilson(50, 100, clusters=4) == wilson(2, 4)
    assert wilson(0, 0) == {"share": None, "low": None, "high": None}


def test_hardness_is_the_gradient_of_infonce():
    import torch

    rng = np.random.default_rng(0)
    cosines, labels = rng.uniform(-1, 1, (5, 4)), rng.uniform(0.01, 0.99, (5, 4))
    scores = torch.tensor(cosines, requires_grad=True)
    torch.nn.functional.cross_entropy(scores / 0.1, torch.zeros(5, dtype=torch.long), reduction="sum").backward()
    gradient = 0.1 * scores.grad.numpy()[:, 1:]
    hardness, useful = gradient_shares(cosines, labels, 0.1)
    assert hardness == pytest.approx(gradient.sum(axis=1)) and hardness.min() > 0
    assert useful == pytest.approx((gradient * (1 - labels[:, 1:])).sum(axis=1))


def test_quality_by_hand():
    # one negative as close as the positive: half of the softmax, a quarter of it on what the teacher finds relevant
    hardness, useful = gradient_shares(np.array([[0.5, 0.5]]), np.array([[0.9, 0.25]]), 0.05)
    assert (hardness[0], useful[0]) == pytest.approx((0.5, 0.375))


# ---- a whole audit, against a recount in plain Python --------------------------------------------------------------


@pytest.fixture(scope="module")
def graded(tmp_path_factory):
    """A build with graded candidates of 24 queries: each third one has three positives, of which one was not
    retrieved.

    Document 0 and 1 are near duplicates; labels are random, so that every rule has cases.
    """
    folder = tmp_path_factory.mktemp("graded") / "build"
    for step in ("corpus", "candidates", "scores", "mined"):
        (folder / step).mkdir(parents=True)
    rng = np.random.default_rng(7)
    documents = [f"d{number:02d}" for number in range(40)]
    texts = [" ".join(rng.choice(WORDS, 8)) for _ in documents]
    queries = [f"q{number:02d}" for number in range(QUERY_COUNT)]
    rows = []
    for number, query in enumerate(queries):
        chosen = rng.choice(documents, CANDIDATES_EACH, replace=False).tolist()
        if number % 4 == 0:
            chosen = ["d00", "d01", *[name for name in chosen if name not in ("d00", "d01")]][:CANDIDATES_EACH]
        positives = 3 if number % 3 == 0 else 1
        counts = {"bm25": 0, "dense": 0}
        for rank, document in enumerate(chosen, start=1):
            is_positive = rank <= positives
            retrieved = not (is_positive and rank == 3)
            by_bm25 = retrieved and rank % 2 == 1
            by_dense = retrieved and (rank % 3 == 0 or not by_bm25)
            # the teacher grades the positive of q05 below everything: that query gives no row
            score = float(rng.normal(2 if is_positive else 0)) - 9 * (is_positive and number == 5)
            row = {"query_id": query, "document_id": document, "teacher_score": score, "is_positive": is_positive}
            row["label"] = float(np.clip(1 / (1 + np.exp(-score)), 1e-4, 1 - 1e-4))
            row["rrf_rank"] = rank - (positives == 3 and rank > 3) if retrieved else None
            row["rrf_score"] = 1 / (60 + rank) if retrieved else None
            for name, found in (("bm25", by_bm25), ("dense", by_dense)):
                # a retriever's own ranks count its own documents, in the order of the fused list
                counts[name] += found
                row |= {f"{name}_rank": counts[name] if found else None, f"{name}_score": 1.0 if found else None}
            rows.append(row)
    corpus = folder / "corpus"
    table = pa.table([documents, texts], schema=DOCUMENTS)
    write_arrow(corpus / "documents.arrow", table.to_batches(), DOCUMENTS)
    write_parquet(corpus / "groups.parquet", pa.table([["d00", "d01"], ["d00", "d00"]], schema=GROUPS))
    asked = [" ".join(rng.choice(WORDS, 4)) for _ in queries]
    write_parquet(corpus / "queries.parquet", pa.table([queries, asked, ["train"] * QUERY_COUNT], schema=QUERIES))
    judged = [
        (row["query_id"], row["document_id"], 1 + (at % 3 == 0), "train")
        for at, row in enumerate(rows)
        if row["is_positive"]
    ]
    write_parquet(corpus / "qrels.parquet", pa.table(list(map(list, zip(*judged, strict=True))), schema=QRELS))
    write_json(folder / "candidates" / "manifest.json", COUNTS)
    calibration = {"a": 1.0, "b": 0.0, "reliability": RELIABILITY}
    write_json(folder / "scores" / "manifest.json", {"calibration": calibration, **PAIRS})
    write_scores(folder, rows)
    write_encoder(folder / "encoder")
    write_mined(build_of(folder), folder / "mined")
    return folder, rows


def write_scores(folder, rows):
    write_parquet(folder / "scores" / "scores.parquet", pa.Table.from_pylist(rows, schema=SCORES))


def build_of(folder, mining=MINING):
    return tiny_build(folder, mining=mining, dense={"model": str(folder / "encoder")})


def run_audit(folder, mining=MINING):
    (folder / "audit").mkdir(exist_ok=True)
    return write_audit(build_of(folder, mining), folder / "audit")


@pytest.fixture(scope="module")
def facts(graded):
    return run_audit(graded[0])


@pytest.fixture
def copy(graded, tmp_path):
    """To be changed."""
    return shutil.copytree(graded[0], tmp_path / "build")


def test_row_groups_change_nothing(graded, facts, copy, monkeypatch):
    # bounded memory must not cost exactness: five queries at a time, or all at once; one that hides positives
    monkeypatch.setattr(audit, "PAIRS", 40)
    table = read_parquet(copy / "scores" / "scores.parquet")
    with parquet_writer(copy / "scores" / "scores.parquet", SCORES) as writer:
        for start in range(0, QUERY_COUNT, 5):
            writer.write(table.slice(start * CANDIDATES_EACH, 5 * CANDIDATES_EACH))
    shutil.rmtree(copy / "audit")
    assert run_audit(copy) == facts
    for name in facts["plots"]:
        assert (copy / "audit" / name).read_bytes() == (graded[0] / "audit" / name).read_bytes()
    assert facts["plots"] == ["labels.png", "false_negatives.png", "reliability.png"]


def test_mined_rows_are_recounted_from_the_files(graded, facts):
    folder, _ = graded
    mined = read_parquet(folder / "mined" / "mined.parquet").to_pylist()
    used = [document for row in mined for document in row["negative_ids"]]
    found = facts["mined_rows"]
    assert found["rows"] == len(mined) > 20
    assert found["queries_without_rows"] == QUERY_COUNT - len({row["query_id"] for row in mined}) > 0
    assert found["distinct_negatives"] == len(set(used)) and found["negatives"] == len(used)
    assert found["most_uses"] == max(map(used.count, used))
    assert found["violations"] == dict.fromkeys(found["violations"], 0)


def test_cut_texts_are_those_of_the_manifests(facts):
    found = [(row["model"], row["cut"], row["of"]) for row in facts["cut_texts"]]
    assert found == [("dense", 1, 24), ("dense", 30, 40), ("teacher", 9, 336), ("teacher", 2, 336)]


def test_labels_and_retrievers_are_recounted(graded, facts):
    _, rows = graded
    positives = [row for row in rows if row["is_positive"]]
    assert facts["labels"]["positives"]["count"] == len(positives) == sum(facts["labels"]["positives"]["bins"])
    assert facts["labels"]["candidates"]["count"] == len(rows) - len(positives)
    assert facts["labels"]["positives"]["mean"] == pytest.approx(
        np.mean([row["label"] for row in positives]), abs=1e-4
    )
    by_both = sum(row["bm25_rank"] is not None and row["dense_rank"] is not None for row in positives)
    assert facts["found_by"]["positives"]["both"] == pytest.approx(by_both / len(positives), abs=1e-4)
    assert facts["found_by"]["positives"]["neither"] == pytest.approx(8 / len(positives), abs=1e-4)
    assert facts["found_by"]["candidates"]["neither"] == 0


def test_false_negatives_by_a_plain_recount(graded, facts):
    _, rows = graded
    found = facts["false_negatives"]
    assert [row["margin"] for row in found["by_margin"]] == list(MARGINS)
    assert found["queries"] == 8 and found["reason"] is None
    for by_margin in found["by_margin"]:
        admitted = hidden = negatives = false = kept = 0
        for _, group in groupby(rows, key=lambda row: row["query_id"]):
            group = list(group)
            positives = [row for row in group if row["is_positive"]]
            if len(positives) < 2:
                continue
            for known in positives:
                pool = [row for row in group if row is not known and row["rrf_rank"] is not None]
                limit = np.float32(by_margin["margin"]) * np.float32(known["label"])
                others = [row for row in pool if row["is_positive"]]
                hidden += len(others)
                admitted += sum(np.float32(row["label"]) < limit for row in others)
                twins = {"d00", "d01"} if known["document_id"] in ("d00", "d01") else set()
                allowed = [row for row in pool if np.float32(row["label"]) < limit and row["document_id"] not in twins]
                chosen = sorted(allowed, key=lambda row: -row["label"])[:3]
                if len(chosen) == 3:
                    kept, negatives = kept + 1, negatives + 3
                    false += sum(row["is_positive"] for row in chosen)
        assert (by_margin["rows"], by_margin["negatives"], found["hidden"]) == (kept, negatives, hidden)
        assert by_margin["admitted"]["share"] == pytest.approx(admitted / hidden, abs=1e-4)
        assert by_margin["among_negatives"]["share"] == pytest.approx(false / negatives, abs=1e-4)
    admitted = [row["admitted"]["share"] for row in found["by_margin"]]
    assert admitted == sorted(admitted) and admitted[0] > 0 and found["by_margin"][-1]["among_negatives"]["share"] > 0


def test_rankings_are_scored_as_by_ir_measures(graded, facts):
    from ir_measures import calc_aggregate, nDCG

    folder, rows = graded
    assert facts["ndcg_at_10"]["queries"] == QUERY_COUNT
    qrels = {}
    for row in read_parquet(folder / "corpus" / "qrels.parquet").to_pylist():
        qrels.setdefault(row["query_id"], {})[row["document_id"]] = row["score"]
    assert {score for judged in qrels.values() for score in judged.values()} == {1, 2}
    for name, key in {
        "bm25": "bm25_rank",
        "dense": "dense_rank",
        "rrf": "rrf_rank",
        "graded": "teacher_score",
    }.items():
        run = {query_id: {} for query_id in qrels}
        for row in rows:
            if row[key] is not None and row["rrf_rank"] is not None:
                run[row["query_id"]][row["document_id"]] = row[key] if name == "graded" else -float(row[key])
        [expected] = calc_aggregate([nDCG @ 10], qrels, run).values()
        assert facts["ndcg_at_10"][name] == pytest.approx(expected, abs=1e-4)


def test_a_list_that_fusion_cut_has_no_figure(graded, copy):
    write_scores(copy, [{**row, "bm25_rank": row["bm25_rank"] and row["bm25_rank"] + 1} for row in graded[1]])
    found = run_audit(copy)["ndcg_at_10"]
    assert found["bm25"] is None and found["dense"] > 0


def test_strategies_are_compared_on_the_encoders_own_cosines(graded, facts):
    from sentence_transformers import SentenceTransformer

    folder, _ = graded
    found = facts["negative_quality"]["strategies"]
    assert [(row["strategy"], row["margin"]) for row in found] == [("top", 0.95), ("random", 0.95), ("top", 1.0)]
    model = SentenceTransformer(str(folder / "encoder"))
    hardness = []
    for row in read_parquet(folder / "mined" / "mined.parquet").to_pylist():
        texts = [row["positive"], *(row[f"negative_{rank}"] for rank in range(1, 4))]
        query, documents = model.encode(row["query"]), model.encode(texts)
        cosines = documents @ query / np.linalg.norm(documents, axis=1) / np.linalg.norm(query)
        weights = np.exp(cosines / facts["negative_quality"]["temperature"])
        hardness.append(1 - weights[0] / weights.sum())
    assert found[0]["hardness"] == pytest.approx(np.mean(hardness), abs=2e-3) and 0 < np.mean(hardness) < 1
    # random negatives have lower labels, so less of what they teach is wrong
    assert found[1]["safety"] > found[0]["safety"]
    assert all(row["useful"] <= row["hardness"] for row in found)


@pytest.mark.parametrize(
    ("kind", "named"), [("absolute", "0.2 absolute"), ("none", "none"), ("flipped_control", "0.2 flipped_control")]
)
def test_a_margin_that_is_no_ratio_is_not_taken_for_one(kind, named, copy):
    """Nor is the comparison with margin 1 made by its rule, which would leave no row."""
    mining = Mining(margin=0.2, margin_type=kind, num_negatives=1)
    write_mined(build_of(copy, mining), copy / "mined")
    found = run_audit(copy, mining)
    assert {row["margin"] for row in found["false_negatives"]["by_margin"]} == set(MARGINS)
    strategies = found["negative_quality"]["strategies"]
    assert [row["margin"] for row in strategies] == [named, named, 1.0] and strategies[-1]["rows"] > 0


def test_rules_broken_in_the_file_are_counted(graded, copy):
    _, rows = graded
    table = read_parquet(copy / "mined" / "mined.parquet")
    broken = table.to_pylist()
    query = next(row["query_id"] for row in broken if row["positive_id"] == "d00")
    first, second = [row for row in broken if row["query_id"] == query][:2]  # rows of one query: d00 is in q00, q12
    known = {row["document_id"]: row for row in rows if row["query_id"] == query}
    above = next(name for name, row in known.items() if row["label"] >= 0.95 * second["label"][0])
    first["negative_ids"] = [first["negative_ids"][0], first["negative_ids"][0], second["positive_id"]]
    second["negative_ids"] = ["d39" if "d39" not in known else "d38", above, second["negative_ids"][0]]
    write_parquet(copy / "mined" / "mined.parquet", pa.Table.from_pylist(broken, schema=table.schema))
    found = run_audit(copy)["mined_rows"]["violations"]
    expected = {"repeated_in_row": 1, "labelled_positive": 1 + known[above]["is_positive"]}
    # a document that was never graded breaks the margin, too
    too_high = known[second["positive_id"]]["label"] >= np.float32(0.95) * np.float32(first["label"][0])
    expected["above_margin"] = 2 + too_high
    assert {name: found[name] for name in expected} == expected


def test_without_several_positives_there_is_a_reason_instead_of_an_estimate(graded, copy):
    # the first positive stays one; the others are plain candidates
    write_scores(copy, [{**row, "is_positive": at % CANDIDATES_EACH == 0} for at, row in enumerate(graded[1])])
    write_mined(build_of(copy), copy / "mined")
    shutil.rmtree(copy / "audit", ignore_errors=True)
    found = run_audit(copy)
    assert found["false_negatives"] == {
        "reason": "no query has two labelled positives of which one was retrieved",
        "by_margin": [],
    }
    assert "false_negatives.png" not in found["plots"]


def test_documents_of_one_class_say_nothing_of_false_negatives(copy):
    names = [f"d{number:02d}" for number in range(40)]
    table = pa.table({"document_id": names, "class": [f"c{number % 5}" for number in range(40)]})
    write_parquet(copy / "corpus" / "classes.parquet", table)
    mining = Mining(num_negatives=1)
    write_mined(build_of(copy, mining), copy / "mined")
    found = run_audit(copy, mining)
    assert found["false_negatives"]["reason"].startswith("documents of one class")
    assert found["mined_rows"]["violations"]["same_class"] == 0 < found["mined_rows"]["rows"]
