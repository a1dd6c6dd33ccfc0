"""Mining against its rules in plain Python, one candidate at a time, and what order, seed and blocks may change."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tiny_data import tiny_build

from common.cli import InputError
from common.steps import parquet_writer, write_arrow, write_parquet
from dataset_builders import mine as mine_module
from dataset_builders.mine import Mining, select_negatives, write_mined
from dataset_builders.schema import CLASSES, DOCUMENTS, GROUPS, POSITIVES, QRELS, QUERIES, SCORES, mined_schema

label = st.floats(0.01, 0.99)
candidates = st.lists(st.tuples(label, st.booleans()), max_size=30)


@given(candidates, label, st.floats(0.1, 1), st.integers(1, 8), st.sampled_from(["top", "random"]))
def test_contract_3_holds_for_whatever_is_chosen(rows, positive, margin, wanted, strategy):
    labels, forbidden = np.array([row[0] for row in rows]), np.array([row[1] for row in rows], bool)
    keys = {"margin": margin, "num_negatives": wanted, "strategy": strategy, "rng": np.random.default_rng(0)}
    chosen = select_negatives(labels, positive, forbidden, **keys).tolist()
    allowed = [row for row in range(len(rows)) if labels[row] < margin * positive and not forbidden[row]]
    assert set(chosen) <= set(allowed) and len(chosen) == len(set(chosen)) == min(wanted, len(allowed))
    assert labels[chosen].tolist() == sorted(labels[chosen], reverse=True)
    if strategy == "top":
        assert chosen == sorted(allowed, key=lambda row: -labels[row])[:wanted]


@given(candidates, label, st.floats(0.1, 1), st.integers(1, 8), st.randoms(use_true_random=False))
def test_the_order_of_candidates_decides_ties_alone(rows, positive, margin, wanted, random):
    assume(len({value for value, _ in rows}) == len(rows))

    def labels_chosen(rows):
        labels, forbidden = (np.array(column) for column in zip(*rows, strict=True)) if rows else ([], [])
        chosen = select_negatives(labels, positive, forbidden, margin=margin, num_negatives=wanted)
        return [rows[row][0] for row in chosen]

    assert labels_chosen(rows) == labels_chosen(random.sample(rows, len(rows)))


@pytest.mark.parametrize(
    ("labels", "positive"), [([-3.0, -5.0], -2.0), ([0.5, 0.0], 0.9), ([0.5, np.nan], 0.9), ([0.5], 1.0)]
)
def test_raw_scores_are_refused(labels, positive):
    with pytest.raises(ValueError, match="calibrate"):
        select_negatives(np.array(labels), positive)


# A corpus of 60 documents and 12 queries, graded at random: every second document has a near duplicate, every third
# is in a class or two, queries have one to three positives.


def write_graded(folder, *, seed=0, row_groups=((0, 12),), spoil=lambda rows: None):
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
    judged = [
        (query_id, row["document_id"], int(row["is_positive"]), "train") for query_id in rows for row in rows[query_id]
    ]
    for name, schema, values in (
        ("groups", GROUPS, groups.items()),
        ("classes", CLASSES, classes),
        ("queries", QUERIES, [(query_id, text, "train") for query_id, text in queries.items()]),
        ("qrels", QRELS, judged),
    ):
        write_parquet(folder / "corpus" / f"{name}.parquet", table_of(values, schema))
    with parquet_writer(folder / "scores" / "scores.parquet", SCORES) as writer:
        for first, last in row_groups:
            part = [{"query_id": name, **row} for name in list(rows)[first:last] for row in rows[name]]
            writer.write(pa.Table.from_pylist(part, schema=SCORES))
    return texts, groups, classes, queries, rows


def table_of(rows, schema):
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=schema)


MININGS = [
    Mining(num_negatives=3),
    Mining(num_negatives=11, margin=0.5),
    Mining(num_negatives=3, margin=0.1, margin_type="absolute"),
    Mining(num_negatives=3, margin_type="none", skip=2),
    Mining(num_negatives=2, margin_type="flipped_control"),
    Mining(num_negatives=3, relabel="exclude"),
    Mining(num_negatives=3, relabel="promote"),
]


def passes(margin_type, label, limit):
    return {"none": True, "flipped_control": not label < limit}.get(margin_type, label < limit)


def mined_by_hand(data, mining):
    """The rows that contract 3 asks for, one candidate at a time, and why each candidate was left out."""
    texts, groups, classes, queries, scores = data
    found, reasons, dropped = [], Counter(), Counter()
    for query_id, rows in scores.items():
        highest = max(np.float32(row["label"]) for row in rows if row["is_positive"])
        if mining.relabel == "promote":  # those that are neither near duplicates nor of the class of a positive
            positives = {row["document_id"] for row in rows if row["is_positive"]}
            of_positives = {c for d, c in classes if d in positives}
            rows = [
                row
                | {
                    "is_positive": row["is_positive"]
                    or (
                        np.float32(row["label"]) > highest
                        and not any(groups.get(row["document_id"], 0) == groups.get(other, 1) for other in positives)
                        and not {c for d, c in classes if d == row["document_id"]} & of_positives
                    )
                }
                for row in rows
            ]
        positives = {row["document_id"] for row in rows if row["is_positive"]}
        for positive in [row for row in rows if row["is_positive"]]:
            label, margin = np.float32(positive["label"]), np.float32(mining.margin)
            limit = label - margin if mining.margin_type == "absolute" else margin * label
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
                elif mining.relabel == "exclude" and np.float32(row["label"]) > highest:
                    reasons["graded_above_positive"] += 1
                elif not passes(mining.margin_type, np.float32(row["label"]), limit):
                    reasons["fails_margin"] += 1
                else:
                    reasons["qualifies"] += 1
                    allowed.append(row)
            allowed.sort(key=lambda row: -np.float32(row["label"]))
            skipped, allowed = allowed[: mining.skip], allowed[mining.skip :]
            reasons.update(fails_margin=len(skipped), qualifies=-len(skipped))
            if len(allowed) < mining.num_negatives:
                dropped["too_few_negatives" if allowed else "no_qualifying_candidate"] += 1
                continue
            chosen = [positive, *allowed[: mining.num_negatives]]
            ids = [row["document_id"] for row in chosen]
            named = {f"negative_{rank}": texts[name] for rank, name in enumerate(ids[1:], start=1)}
            row = {"query_id": query_id, "positive_id": ids[0], "negative_ids": ids[1:], "query": queries[query_id]}
            found.append({**row, "positive": texts[ids[0]], **named, "label": [row["label"] for row in chosen]})
    return found, reasons, dropped


def mined(folder, mining, name="mined"):
    (folder / name).mkdir()
    facts = write_mined(tiny_build(folder, mining=mining), folder / name)
    return pq.read_table(folder / name / "mined.parquet"), facts


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("mining", MININGS, ids=Mining.config_name)
def test_mined_rows_are_those_of_plain_python(tmp_path, seed, mining):
    data = write_graded(tmp_path, seed=seed, row_groups=((0, 5), (5, 5), (5, 6), (6, 12)))
    rows, reasons, dropped = mined_by_hand(data, mining)
    table, facts = mined(tmp_path, mining)
    assert table.schema.equals(mined_schema(mining.num_negatives))
    assert rows and table.to_pylist() == rows
    always = {"is_other_positive", "is_duplicate_of_positive", "shares_class", "qualifies"}
    assert always <= {name for name, count in reasons.items() if count}
    assert {name: count for name, count in facts["candidates"].items() if count} == +reasons
    assert facts["rows_dropped"] == {name: dropped[name] for name in ("too_few_negatives", "no_qualifying_candidate")}
    assert facts["rows"] == len(rows) and facts["negatives"] == len(rows) * mining.num_negatives
    labels = np.array([row["label"] for row in rows])
    assert facts["mean_label"] == {
        "positive": pytest.approx(labels[:, 0].mean(), abs=1e-4),
        "negative": pytest.approx(labels[:, 1:].mean(), abs=1e-4),
    }
    rows_of = Counter(row["query_id"] for row in rows)
    per_query = sorted(rows_of[query_id] for query_id in data[3])
    places = {"min": 0, "p10": 1, "median": 5, "p90": 10, "max": 11}
    assert facts["yield"]["rows_per_query"] == {name: per_query[place] for name, place in places.items()}


def test_all_positives_of_a_query_go_along(tmp_path):
    """In training none of them may be an in-batch negative of the query, whichever row brings it."""
    texts, _, _, queries, rows = write_graded(tmp_path)
    mined(tmp_path, Mining(num_negatives=3))
    table = pq.read_table(tmp_path / "mined" / "positives.parquet")
    expected = [
        (queries[query_id], texts[document_id])
        for query_id, found in rows.items()
        for document_id in sorted(row["document_id"] for row in found if row["is_positive"])
        if sum(row["is_positive"] for row in found) > 1
    ]
    assert table.schema.equals(POSITIVES) and 0 < len(expected) < 36
    assert list(zip(*table.to_pydict().values(), strict=True)) == expected


@pytest.mark.parametrize("relabel", ["exclude", "promote"])
def test_candidates_graded_above_every_positive_are_no_in_batch_negatives(tmp_path, relabel):
    texts, _, _, queries, rows = write_graded(tmp_path)
    mined(tmp_path, Mining(num_negatives=3), "plain")
    mined(tmp_path, Mining(num_negatives=3, relabel=relabel))
    plain, more = (
        set(zip(*pq.read_table(tmp_path / name / "positives.parquet").to_pydict().values(), strict=True))
        for name in ("plain", "mined")
    )
    known = {query: max(row["label"] for row in found if row["is_positive"]) for query, found in rows.items()}
    above = {
        (queries[query], texts[row["document_id"]])
        for query, found in rows.items()
        for row in found
        if row["label"] > known[query]
    }
    labelled = {
        (queries[q], texts[row["document_id"]]) for q, found in rows.items() for row in found if row["is_positive"]
    }
    assert plain < more and more - labelled and more - labelled <= above


def test_without_several_positives_no_file_tells_of_them(tmp_path):
    def single(rows):
        for found in rows.values():
            found[0]["is_positive"], found[1]["is_positive"], found[2]["is_positive"] = True, False, False

    write_graded(tmp_path, spoil=single)
    mined(tmp_path, Mining(num_negatives=3))
    assert [path.name for path in (tmp_path / "mined").iterdir()] == ["mined.parquet"]


@pytest.mark.parametrize("strategy", ["top", "random"])
def test_blocks_and_other_queries_do_not_change_a_row(tmp_path, strategy, monkeypatch):
    mining = Mining(num_negatives=3, strategy=strategy, seed=5)
    write_graded(tmp_path / "one")
    write_graded(tmp_path / "many", row_groups=[(number, number + 1) for number in range(12)])
    write_graded(tmp_path / "half", row_groups=[(6, 9), (9, 12)])
    one, _ = mined(tmp_path / "one", mining)
    monkeypatch.setattr(mine_module, "ROWS", 2)  # rows written at a time
    many, _ = mined(tmp_path / "many", mining)
    half, _ = mined(tmp_path / "half", mining)
    assert one.equals(many)
    later = [row for row in one.to_pylist() if row["query_id"] >= "q06"]
    assert later and half.to_pylist() == later
    metadata = pq.read_metadata(tmp_path / "many" / "mined" / "mined.parquet")
    assert max(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)) == 2


def test_a_random_row_is_drawn_by_select_negatives_from_its_seed_and_ids(tmp_path):
    data = write_graded(tmp_path)
    tables = [mined(tmp_path, Mining(num_negatives=3, strategy="random", seed=seed), str(seed))[0] for seed in (0, 1)]
    assert len(tables[0]) == len(tables[1]) and not tables[0].equals(tables[1])
    # with as many negatives as qualify, each row of a top mining names all that may be drawn
    allowed = {
        (row["query_id"], row["positive_id"]): row["negative_ids"]
        for number in range(3, 20)
        for row in mined_by_hand(data, Mining(num_negatives=number))[0]
    }
    for seed, table in enumerate(tables):
        for row in table.to_pylist():
            ids = row["query_id"], row["positive_id"]
            graded = [one for one in data[-1][ids[0]] if one["document_id"] in allowed[ids]]
            labels = np.array([one["label"] for one in graded], np.float32)
            rng = np.random.default_rng(mine_module.stable_hash(seed, *ids))
            chosen = select_negatives(labels, 0.999, margin=1.0, num_negatives=3, strategy="random", rng=rng)
            assert row["negative_ids"] == [graded[place]["document_id"] for place in chosen]


def all_labels(value):
    return lambda rows: [row.update(label=value) for row in rows["q03"] if not row["is_positive"]]


BAD_SCORES = {
    "query in two row groups": ({"row_groups": ((0, 3), (2, 12))}, "in one row group"),
    "queries out of order": ({"row_groups": ((6, 12), (0, 6))}, "in the order of query ids"),
    "unknown document": (
        {"spoil": lambda rows: [row.update(document_id=f"z{at}") for at, row in enumerate(rows["q03"])]},
        "is not in the corpus",
    ),
    "unknown query": ({"spoil": lambda rows: rows.update(zz=rows.pop("q11"))}, "'zz' is not in"),
    "label of one": ({"spoil": all_labels(1.0)}, "label 1.0 of query 'q03'"),
    "label of NaN": ({"spoil": all_labels(float("nan"))}, "label nan"),
    "null label": ({"spoil": all_labels(None)}, "label None"),
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
