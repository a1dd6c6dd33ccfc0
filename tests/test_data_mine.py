import doctest
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_data import TOPICS, tiny_build, write_encoder

from common.cli import InputError
from common.steps import ParquetStream, write_arrow, write_json, write_parquet
from dataset_builders import mine as mining_room
from dataset_builders.columns import take
from dataset_builders.mine import (
    Families,
    Mining,
    Selected,
    Sts,
    _sts_pool,
    count_by_bin,
    positions_of,
    quantiles,
    select_negatives,
    spread_over_bins,
    write_mined,
    write_sts,
)
from dataset_builders.schema import CLASSES, DOCUMENTS, GROUPS, QUERIES, SCORES, mined_schema

label = st.floats(0.01, 0.99)
candidates = st.lists(st.tuples(label, st.booleans()), max_size=30)


def test_the_examples_in_the_docstrings_hold():
    tested = doctest.testmod(mining_room)
    assert tested.attempted >= 4 and tested.failed == 0


@given(candidates, label, st.floats(0.1, 1), st.integers(1, 8), st.sampled_from(["top", "random"]))
def test_contract_3_holds_for_whatever_is_chosen(rows, positive, margin, wanted, strategy):
    labels = np.array([row[0] for row in rows])
    forbidden = np.array([row[1] for row in rows], bool)
    chosen = select_negatives(
        labels,
        positive,
        forbidden,
        margin=margin,
        num_negatives=wanted,
        strategy=strategy,
        rng=np.random.default_rng(0),
    ).tolist()
    allowed = [row for row in range(len(rows)) if labels[row] < margin * positive and not forbidden[row]]
    assert set(chosen) <= set(allowed) and len(chosen) == len(set(chosen)) == min(wanted, len(allowed))
    assert labels[chosen].tolist() == sorted(labels[chosen], reverse=True)
    if strategy == "top":
        assert chosen == sorted(allowed, key=lambda row: -labels[row])[:wanted]


@given(candidates, label, st.floats(0.1, 1), st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_of_candidates_decides_ties_alone(rows, positive, margin, wanted, random):
    assume(len({value for value, _ in rows}) == len(rows))
    shuffled = random.sample(rows, len(rows))

    def labels_chosen(rows):
        labels, forbidden = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [])
        chosen = select_negatives(labels, positive, forbidden, margin=margin, num_negatives=wanted)
        return [rows[row][0] for row in chosen]

    assert labels_chosen(rows) == labels_chosen(shuffled)


@given(candidates, label, st.floats(0.1, 1), st.floats(0.1, 1), st.integers(1, 8))
def test_a_wider_margin_never_loses_a_qualifying_candidate_nor_takes_easier_ones(rows, positive, one, other, wanted):
    labels, forbidden = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], bool)

    def at(margin, count):
        return select_negatives(labels, positive, forbidden, margin=margin, num_negatives=count).tolist()

    narrow, wide = sorted((one, other))
    assert set(at(narrow, 99)) <= set(at(wide, 99))
    pairs = list(zip(labels[at(narrow, wanted)], labels[at(wide, wanted)], strict=False))
    assert all(hard >= easy for easy, hard in pairs) and len(at(wide, wanted)) >= len(at(narrow, wanted))
    # fewer negatives are the first of more
    assert at(wide, wanted) == at(wide, wanted + 1)[:wanted]


def test_the_margin_keeps_what_lies_below_it():
    # the published sentence says the opposite: candidates below the threshold would be thrown away
    assert select_negatives(np.array([0.76, 0.75, 0.1]), 0.8, margin=0.95).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("labels", "positive"), [([-3.0, -5.0], -2.0), ([0.5, 0.0], 0.9), ([0.5, np.nan], 0.9), ([0.5], 1.0)]
)
def test_raw_scores_are_refused(labels, positive):
    with pytest.raises(ValueError, match="calibrate"):
        select_negatives(np.array(labels), positive)


def test_random_draws_evenly():
    labels, counts = np.linspace(0.1, 0.5, 10), np.zeros(10)
    for seed in range(2000):
        draw = select_negatives(labels, 0.9, num_negatives=3, strategy="random", rng=np.random.default_rng(seed))
        counts[draw] += 1
    assert counts.min() > 500 and counts.max() < 700  # 600 expected, standard deviation 20


# A corpus of 60 documents and 12 queries, graded at random: every second document has a near duplicate, every third
# is in a class or two, queries have one to three positives.


def write_graded(folder, *, seed=0, row_groups=((0, 12),), columns=SCORES.names, spoil=lambda rows: None):
    """corpus/ and scores/ as the steps leave them; returns what they hold as plain Python."""
    rng = np.random.default_rng(seed)
    texts = {f"d{number:02d}": f"text of {number}" for number in range(60)}
    groups = {f"d{number:02d}": f"d{number // 2 * 2:02d}" for number in range(60) if number % 4 < 2}
    classes = [(f"d{number:02d}", f"c{number % 5}") for number in range(0, 60, 3)] + [("d12", "c4")]
    queries = {f"q{number:02d}": f"query {number}" for number in range(12)}
    rows = {}
    for query_id in queries:
        found = rng.choice(60, 20, replace=False)
        positives = rng.integers(1, 4)
        # two labels in ten are the same, to have ties
        labels = np.round(rng.uniform(0.05, 0.7, 20), 1 if rng.random() < 0.3 else 3).astype(np.float32)
        labels[:positives] = rng.uniform(0.6, 0.95, positives)
        rows[query_id] = [
            {"document_id": f"d{document:02d}", "label": float(value), "is_positive": place < positives}
            for place, (document, value) in enumerate(zip(found, labels, strict=True))
        ]
    spoil(rows)
    for name in ("corpus", "scores"):
        (folder / name).mkdir(parents=True)
    batches = pa.table([list(texts), list(texts.values())], schema=DOCUMENTS).to_batches(max_chunksize=7)
    write_arrow(folder / "corpus" / "documents.arrow", batches, DOCUMENTS)
    write_parquet(folder / "corpus" / "groups.parquet", table_of(groups.items(), GROUPS))
    write_parquet(folder / "corpus" / "classes.parquet", table_of(classes, CLASSES))
    asked = [(query_id, text, "train") for query_id, text in queries.items()]
    write_parquet(folder / "corpus" / "queries.parquet", table_of(asked, QUERIES))
    schema = pa.schema([SCORES.field(name) for name in columns])
    with ParquetStream(folder / "scores" / "scores.parquet", schema) as stream:
        for first, last in row_groups:
            part = [{"query_id": name, **row} for name in list(rows)[first:last] for row in rows[name]]
            stream.write(pa.Table.from_pylist(part, schema=schema))
    return texts, groups, classes, queries, rows


def table_of(rows, schema):
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


def mined_by_hand(data, mining):
    """The rows that contract 3 asks for, one candidate at a time, and why each candidate was left out."""
    texts, groups, classes, queries, scores = data
    found, reasons, dropped = [], Counter(), Counter()
    for query_id, rows in scores.items():
        positives = {row["document_id"] for row in rows if row["is_positive"]}
        for positive in [row for row in rows if row["is_positive"]]:
            limit = np.float32(mining.margin) * np.float32(positive["label"])
            allowed = []
            for row in rows:
                name = row["document_id"]
                if name == positive["document_id"]:
                    continue
                if name in positives:
                    reasons["is_other_positive"] += 1
                elif any(groups.get(name) is not None and groups[name] == groups.get(other) for other in positives):
                    reasons["is_duplicate_of_positive"] += 1
                elif {c for d, c in classes if d == name} & {c for d, c in classes if d in positives}:
                    reasons["shares_class"] += 1
                elif not np.float32(row["label"]) < limit:
                    reasons["fails_margin"] += 1
                else:
                    reasons["qualifies"] += 1
                    allowed.append(row)
            if len(allowed) < mining.num_negatives:
                dropped["too_few_negatives" if allowed else "no_qualifying_candidate"] += 1
                continue
            allowed.sort(key=lambda row: -np.float32(row["label"]))
            chosen = [positive, *allowed[: mining.num_negatives]]
            ids = [row["document_id"] for row in chosen]
            named = {f"negative_{rank}": texts[name] for rank, name in enumerate(ids[1:], start=1)}
            found.append(
                {
                    "query_id": query_id,
                    "positive_id": ids[0],
                    "negative_ids": ids[1:],
                    "query": queries[query_id],
                    "positive": texts[ids[0]],
                    **named,
                    "label": [row["label"] for row in chosen],
                }
            )
    return found, reasons, dropped


def mined(folder, mining, name="mined"):
    (folder / name).mkdir()
    facts = write_mined(tiny_build(folder, mining=mining), folder / name)
    return pq.read_table(folder / name / "mined.parquet"), facts


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("mining", [Mining(num_negatives=3), Mining(num_negatives=11, margin=0.5)], ids=str)
def test_mined_rows_are_those_of_plain_python(tmp_path, seed, mining):
    data = write_graded(tmp_path, seed=seed, row_groups=((0, 5), (5, 6), (6, 12)))
    rows, reasons, dropped = mined_by_hand(data, mining)
    table, facts = mined(tmp_path, mining)
    assert table.schema.equals(mined_schema(mining.num_negatives))
    assert rows and table.to_pylist() == rows
    assert set(reasons) == set(facts["candidates"]) and min(reasons.values()) > 0
    assert facts["candidates"] == reasons
    assert facts["rows_dropped"] == {name: dropped[name] for name in ("too_few_negatives", "no_qualifying_candidate")}
    assert facts["rows"] == len(rows) and facts["negatives"] == len(rows) * mining.num_negatives
    labels = np.array([row["label"] for row in rows])
    assert facts["mean_label"] == {
        "positive": pytest.approx(labels[:, 0].mean(), abs=1e-4),
        "negative": pytest.approx(labels[:, 1:].mean(), abs=1e-4),
    }
    rows_of = Counter(row["query_id"] for row in rows)
    rows_per_query = sorted(rows_of[query_id] for query_id in data[3])
    expected = {"min": rows_per_query[0], "p10": rows_per_query[1], "median": rows_per_query[5]}
    expected |= {"p90": rows_per_query[10], "max": rows_per_query[11]}
    assert facts["yield"]["rows_per_query"] == expected


@pytest.mark.parametrize("strategy", ["top", "random"])
def test_blocks_and_other_queries_do_not_change_a_row(tmp_path, strategy, monkeypatch):
    mining = Mining(num_negatives=3, strategy=strategy, seed=5)
    write_graded(tmp_path / "one")
    write_graded(tmp_path / "many", row_groups=[(number, number + 1) for number in range(12)])
    write_graded(tmp_path / "half", row_groups=[(6, 9), (9, 12)])
    one, _ = mined(tmp_path / "one", mining)
    monkeypatch.setattr(mining_room, "ROWS", 2)  # rows written at a time
    many, _ = mined(tmp_path / "many", mining)
    half, _ = mined(tmp_path / "half", mining)
    assert one.equals(many)
    later = [row for row in one.to_pylist() if row["query_id"] >= "q06"]
    assert later and half.to_pylist() == later
    metadata = pq.read_metadata(tmp_path / "many" / "mined" / "mined.parquet")
    assert max(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)) == 2


def test_random_rows_depend_on_the_seed_and_keep_the_margin(tmp_path):
    data = write_graded(tmp_path)
    tables = [
        mined(tmp_path, Mining(num_negatives=3, strategy="random", seed=seed), f"mined-{seed}")[0] for seed in (0, 1)
    ]
    assert len(tables[0]) == len(tables[1]) and not tables[0].equals(tables[1])
    allowed = {
        (row["query_id"], row["positive_id"]): set(row["negative_ids"])
        for number in range(3, 20)
        for row in mined_by_hand(data, Mining(num_negatives=number))[0]
    }
    for row in tables[0].to_pylist() + tables[1].to_pylist():
        assert set(row["negative_ids"]) <= allowed[row["query_id"], row["positive_id"]]


def test_a_document_judged_irrelevant_is_an_ordinary_candidate(tmp_path):
    def judged(rows):  # one that no retriever returned: its ranks are null, as are all ranks here
        assert "d59" not in {row["document_id"] for row in rows["q00"]}
        rows["q00"].append({"document_id": "d59", "label": 0.55, "is_positive": False})

    write_graded(tmp_path, spoil=judged)
    table, _ = mined(tmp_path, Mining(num_negatives=3))
    first = table.to_pylist()[0]
    assert first["query_id"] == "q00" and "d59" in first["negative_ids"]


def test_positives_do_not_rule_out_the_negatives_of_other_queries():
    families = Families(np.array([3, 3, 7, 9]), np.array([0, 1, 1, 0]))
    queries, positions = np.array([0, 0, 0, 1, 1, 1]), np.array([3, 7, 8, 3, 9, 7])
    met = families.meet_positive(queries, positions, np.array([1, 0, 0, 0, 1, 0], bool))
    # document 7 shares family 1 with query 0's positive, and no family with query 1's
    assert met.tolist() == [True, True, False, True, True, False]


BAD_SCORES = {
    "query in two row groups": ({"row_groups": ((0, 3), (2, 12))}, "in two row groups"),
    "queries out of order": ({"row_groups": ((6, 12), (0, 6))}, "in the order of query ids"),
    "unknown document": ({"spoil": lambda rows: rows["q03"][4].update(document_id="d99")}, "'d99' is not in"),
    "document beyond the last": ({"spoil": lambda rows: rows["q03"][4].update(document_id="z")}, "'z' is not in"),
    "unknown query": ({"spoil": lambda rows: rows.update(zz=rows.pop("q11"))}, "'zz' is not in"),
    "label of one": ({"spoil": lambda rows: rows["q03"][4].update(label=1.0)}, "label 1.0 of query 'q03'"),
    "label of NaN": ({"spoil": lambda rows: rows["q03"][4].update(label=float("nan"))}, "label nan"),
    "null label": ({"spoil": lambda rows: rows["q03"][4].update(label=None)}, "has no 'label'"),
    "no labels": ({"columns": [name for name in SCORES.names if name != "label"]}, "no column 'label'"),
    "no positives": (
        {"spoil": lambda rows: [row.update(is_positive=False) for part in rows.values() for row in part]},
        "none of 0 rows",
    ),
}


@pytest.mark.parametrize("case", BAD_SCORES)
def test_bad_scores_are_refused(case, tmp_path):
    arguments, message = BAD_SCORES[case]
    write_graded(tmp_path, **arguments)
    with pytest.raises(InputError, match=message):
        mined(tmp_path, Mining(num_negatives=3))
    assert not (tmp_path / "mined" / "mined.parquet").exists()


def test_more_negatives_than_there_are_is_refused(tmp_path):
    write_graded(tmp_path)
    with pytest.raises(InputError, match="lower --num_negatives"):
        mined(tmp_path, Mining(num_negatives=20))


@given(st.lists(st.integers(1, 5), max_size=6), st.data())
@settings(max_examples=50)
def test_take_reads_as_arrow_does(lengths, data):
    values = [f"text {number}" for number in range(sum(lengths))]
    ends = np.cumsum(lengths).tolist()
    column = pa.chunked_array(
        [values[end - length : end] for end, length in zip(ends, lengths, strict=True)], pa.string()
    )
    rows = data.draw(st.lists(st.integers(0, len(values) - 1), max_size=20)) if values else []
    assert take(column, np.array(rows, np.int64)).to_pylist() == [values[row] for row in rows]
    found = positions_of(take(column, np.array(rows, np.int64)), pa.chunked_array([sorted(values)], pa.string()), "x")
    assert [sorted(values)[place] for place in found] == [values[row] for row in rows]


def test_take_does_not_copy_the_corpus(tmp_path):
    # pyarrow's own take joins the chunks: the whole corpus in memory, and an error beyond 2 GiB of text
    text = pa.array(["x" * 1000] * 1000)
    write_arrow(
        tmp_path / "texts.arrow",
        (pa.record_batch([pa.array(map(str, range(1000))), text], schema=DOCUMENTS) for _ in range(32)),
        DOCUMENTS,
    )
    column = mining_room.read_arrow(tmp_path / "texts.arrow")["text"]
    pool = pa.default_memory_pool()
    before, rows = pool.bytes_allocated(), np.arange(0, 32_000, 4000)
    with_ours = take(column, rows)
    assert len(with_ours) == 8 and pool.bytes_allocated() - before < 1e6


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30))
def test_quantiles_of_a_histogram_are_those_of_its_values(values):
    found = quantiles(Counter(values))
    expected = np.quantile(values, [0, 0.1, 0.5, 0.9, 1], method="inverted_cdf")
    assert list(found.values()) == expected.tolist()


def test_bins_are_filled_evenly_and_short_ones_run_out():
    rng = np.random.default_rng(0)
    labels = np.concatenate([rng.uniform(0, 0.1, 1000), rng.uniform(0.1, 1, 500), [0.95] * 50])
    labels = np.sort(labels)[: -np.count_nonzero((labels > 0.5) & (labels < 0.6)) or None]
    chosen = spread_over_bins(labels, 300, np.random.default_rng(1))
    available, taken = count_by_bin(labels), count_by_bin(labels[chosen])
    assert len(chosen) == len(set(chosen)) == 300
    full = [taken[number] for number in range(10) if taken[number] < available[number]]
    assert len(full) >= 5 and max(full) - min(full) <= 1
    assert all(taken[number] <= max(full) for number in range(10))


@pytest.mark.parametrize("count", [2, 3, 40, 300])
def test_the_pool_holds_neighbours_and_random_pairs(count):
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    sts = Sts(num_rows=20, seed=3)  # 100 near pairs wanted: of 300 queries, 100 are anchors
    pool = _sts_pool(vectors, sts)
    assert len(pool) == len({tuple(pair) for pair in pool.tolist()}) and (pool[:, 0] < pool[:, 1]).all()
    assert pool.max() < count and len(pool) <= 400
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -2)
    nearest = {tuple(sorted((row, int(similarity[row].argmax())))) for row in range(count)}
    shared = nearest & {tuple(pair) for pair in pool.tolist()}
    assert shared == nearest if count < 100 else len(shared) >= 60
    assert pool.tolist() == _sts_pool(Selected(vectors, np.arange(count)), sts).tolist()


def test_sts_pairs_are_graded_by_the_teacher_and_hold_no_test_query(tmp_path):
    from sentence_transformers import SentenceTransformer
    from tiny_data import WORDS

    rng = np.random.default_rng(0)
    queries = [
        (f"q{row:02d}", " ".join(rng.choice(WORDS, 5)), "test" if row % 3 == 0 else "train") for row in range(TOPICS)
    ]
    for name in ("corpus", "scores"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "corpus" / "queries.parquet", table_of(queries, QUERIES))
    model = write_encoder(tmp_path / "encoder")
    (tmp_path / "sts").mkdir()
    write_json(tmp_path / "scores" / "manifest.json", {"calibration": {"a": 4.0, "b": -1.0}})
    sections = {"dense": {"model": str(model)}, "teacher": {"kind": "bi_encoder", "model": str(model)}}
    build = tiny_build(tmp_path, splits=("train", "test"), sts=Sts(num_rows=50), **sections)
    facts = write_sts(build, tmp_path / "sts")
    rows = pq.read_table(tmp_path / "sts" / "sts.parquet").to_pylist()
    train = {text for _, text, split in queries if split == "train"}
    assert len(rows) == facts["rows"] == 50
    assert all({row["sentence1"], row["sentence2"]} <= train and row["sentence1"] != row["sentence2"] for row in rows)
    encoder = SentenceTransformer(str(model))
    one, other = (
        encoder.encode([row[name] for row in rows], normalize_embeddings=True) for name in ("sentence1", "sentence2")
    )
    expected = 1 / (1 + np.exp(-(4 * (one * other).sum(axis=1) - 1)))
    np.testing.assert_allclose([row["label"] for row in rows], expected, atol=2e-3)  # vectors are kept as float16
    assert sum(count > 0 for count in facts["rows_by_label_bin"]) >= 5


def test_sts_of_one_query_is_refused(tmp_path):
    for name in ("corpus", "scores"):
        (tmp_path / name).mkdir()
    write_parquet(tmp_path / "corpus" / "queries.parquet", table_of([("q", "text", "train")], QUERIES))
    write_json(tmp_path / "scores" / "manifest.json", {"calibration": {}})
    with pytest.raises(InputError, match="a pair needs two"):
        write_sts(tiny_build(tmp_path, sts=Sts()), tmp_path)
