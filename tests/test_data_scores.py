"""The step that grades: every pair once, resumed to the same bytes, checked against a reference."""

import json
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from tiny_data import WORDS, tiny_build, write_encoder

from common.cli import InputError
from common.steps import parquet_writer, read_arrow, read_parquet, write_arrow, write_parquet
from dataset_builders import calibration as calibration_module
from dataset_builders import scores as scores_module
from dataset_builders import teachers
from dataset_builders.calibration import Calibration, calibrate, count_flat_and_one_hot
from dataset_builders.check_teacher import check_teacher, compare_scores
from dataset_builders.columns import positions_of
from dataset_builders.engines import LocalEngine
from dataset_builders.schema import CANDIDATES, DOCUMENTS, QRELS, QUERIES, SCORES
from dataset_builders.scores import graded_blocks, write_scores
from dataset_builders.teachers import PairScorer, Teacher


@given(st.sets(st.text(max_size=4), min_size=1), st.randoms(use_true_random=False))
def test_positions_are_found_across_chunks(ids, random):
    ids = sorted(ids)
    wanted = [random.choice(ids) for _ in range(7)]
    column = pa.chunked_array([ids[:2], ids[2:]], pa.string())
    assert [ids[row] for row in positions_of(pa.array(wanted), column, "documents")] == wanted
    with pytest.raises(InputError, match="documents: id 'longer' is not in the corpus"):
        positions_of(pa.array([*wanted, "longer"]), column, "documents")


@pytest.fixture
def graded_set(tmp_path) -> Path:
    """11 train and 4 test queries in row groups of 4; judged documents that were not retrieved, and queries (q03,
    q99) for which nothing was."""
    draw = np.random.default_rng(5)
    query_ids = [f"q{number:02d}" for number in range(14)] + ["q99"]
    document_ids = [f"d{number:03d}" for number in range(80)]
    texts = [" ".join(draw.choice(WORDS, draw.integers(3, 30))) for _ in document_ids]
    # a query repeats words of its positive, document number 5 * query
    asked = [" ".join(texts[5 * row].split()[:3]) for row in range(15)]
    splits = ["test" if row % 4 == 1 else "train" for row in range(15)]
    corpus, candidates = tmp_path / "corpus", tmp_path / "candidates"
    corpus.mkdir()
    candidates.mkdir()
    batches = pa.table([document_ids, texts], schema=DOCUMENTS).to_batches(max_chunksize=32)
    write_arrow(corpus / "documents.arrow", batches, DOCUMENTS)
    write_parquet(corpus / "queries.parquet", pa.table([query_ids, asked, splits], schema=QUERIES))
    qrels = [(query_ids[row], document_ids[5 * row], 1, splits[row]) for row in range(15)]
    qrels += [("q00", "d077", 2, "train"), ("q00", "d078", 0, "train"), ("q02", "d079", 0, "train")]
    columns = list(zip(*qrels, strict=True))
    write_parquet(corpus / "qrels.parquet", pa.table(columns, schema=QRELS))
    with parquet_writer(candidates / "candidates.parquet", CANDIDATES) as stream:
        rows = []
        for number, query_id in enumerate(query_ids):
            if query_id not in ("q03", "q99"):
                found = draw.permutation(60)[:9]
                if number not in (2, 8):  # two more positives that were not retrieved
                    found = np.unique([*found[:8], 5 * number])
                for rank, document in enumerate(found, start=1):
                    found_by = (rank, 1.5, None, None, 1 / (60 + rank), rank, 0.35 / rank, rank)
                    rows.append((query_id, document_ids[document], *found_by))
            if number % 4 == 3 or query_id == "q99":
                if rows:
                    stream.write(pa.table(list(zip(*rows, strict=True)), schema=CANDIDATES))
                rows = []
    return tmp_path


def expected_rows(folder: Path) -> list[tuple]:
    """(query_id, document_id, rrf_rank, is_positive) by plain Python over the whole files."""
    qrels = read_parquet(folder / "corpus" / "qrels.parquet").to_pylist()
    judged = {(row["query_id"], row["document_id"]): row["score"] for row in qrels if row["split"] == "train"}
    train = {query for query, _ in judged}
    rows = {
        (row["query_id"], row["document_id"]): row["rrf_rank"]
        for row in read_parquet(folder / "candidates" / "candidates.parquet").to_pylist()
        if row["query_id"] in train
    }
    ranked = {**dict.fromkeys(judged), **rows}
    order = sorted(ranked, key=lambda pair: (pair[0], ranked[pair] or 1_000, pair[1]))
    return [(*pair, ranked[pair], judged.get(pair, 0) > 0) for pair in order]


def grade(folder: Path, teacher: Teacher, name: str = "scores", engine=None) -> tuple[pa.Table, dict]:
    target = folder / name
    target.mkdir(exist_ok=True)
    facts = write_scores(tiny_build(folder, splits=("train", "test"), engine=engine, teacher=teacher), target)
    return read_parquet(target / "scores.parquet"), facts


def test_everything_retrieved_or_judged_is_graded_once(graded_set):
    encoder = write_encoder(graded_set / "encoder")
    table, facts = grade(graded_set, Teacher(kind="bi_encoder", model=str(encoder)))
    assert table.schema == SCORES
    names = ("query_id", "document_id", "rrf_rank", "is_positive")
    found = list(zip(*(table[name].to_pylist() for name in names), strict=True))
    assert found == expected_rows(graded_set) and len(found) > 80
    not_retrieved = [row[:2] for row in found if row[2] is None]
    # positives, judged and not relevant, and of queries without any candidate
    assert {("q00", "d077"), ("q00", "d078"), ("q02", "d079"), ("q03", "d015"), ("q99", "d070")} <= set(not_retrieved)
    assert facts["judged_not_retrieved"] == len(not_retrieved) == table["bm25_rank"].null_count
    assert (facts["queries"], facts["graded"]) == (len({row[0] for row in found}), len(found))
    constants = facts["calibration"]
    assert constants["positives"] == sum(row[3] for row in found if row[2] is not None) > 0
    assert constants["positives"] + constants["others"] == len(found) - len(not_retrieved)
    assert constants["positives_not_retrieved"] == sum(row[3] for row in found if row[2] is None) > 0
    labels = Calibration(constants["a"], constants["b"])(table["teacher_score"].to_numpy())
    np.testing.assert_array_equal(table["label"].to_numpy(), labels)
    query_ids = np.array(table["query_id"].to_pylist())
    starts = np.flatnonzero(np.r_[True, query_ids[1:] != query_ids[:-1]])
    assert count_flat_and_one_hot(labels, starts) == {name: facts[name] for name in ("flat_rows", "one_hot_rows")}
    assert json.loads(json.dumps(facts)) == facts  # goes into the manifest as it is


def texts_by_id(folder: Path) -> dict[str, str]:
    rows = read_parquet(folder / "corpus" / "queries.parquet").to_pylist()
    documents = read_arrow(folder / "corpus" / "documents.arrow").to_pylist()
    return {row["query_id"]: row["text"] for row in rows} | {row["document_id"]: row["text"] for row in documents}


def test_a_bi_encoders_scores_are_its_cosines_but_for_float16(graded_set):
    from sentence_transformers import SentenceTransformer

    folder = write_encoder(graded_set / "encoder")
    table, facts = grade(graded_set, Teacher(kind="bi_encoder", model=str(folder)))
    texts, model = texts_by_id(graded_set), SentenceTransformer(str(folder))
    sides = ([texts[identifier] for identifier in table[name].to_pylist()] for name in ("query_id", "document_id"))
    queries, documents = (model.encode(side, normalize_embeddings=True) for side in sides)
    differences = table["teacher_score"].to_numpy() - (queries * documents).sum(axis=1)
    assert 0 < np.abs(differences).max() < 2e-4
    assert "tokens_needed" not in facts


@pytest.fixture
def any_teacher_will_do(monkeypatch):
    """A random model may score positives below the others, which calibration refuses."""
    monkeypatch.setattr(
        scores_module,
        "calibrate",
        lambda *_: (Calibration(1.0, 0.0), {"auc": 1.0, "positives": 1, "expected_calibration_error": 0.0}),
    )


@pytest.mark.usefixtures("any_teacher_will_do")
def test_a_cross_encoders_scores_stand_beside_their_pairs(graded_set, classifier):
    import torch
    from sentence_transformers import CrossEncoder

    teacher = Teacher(kind="cross_encoder", model=str(classifier), batch_tokens=200, max_seq_length=64)
    table, facts = grade(graded_set, teacher)
    texts, model = texts_by_id(graded_set), CrossEncoder(str(classifier), max_length=64)
    pairs = [(texts[row["query_id"]], texts[row["document_id"]]) for row in table.to_pylist()]
    expected = model.predict(pairs, batch_size=1, activation_fn=torch.nn.Identity())
    np.testing.assert_allclose(table["teacher_score"].to_numpy(), expected, atol=1e-5)
    needed = sum(len(ids) for ids in model.tokenizer([q for q, _ in pairs], [d for _, d in pairs])["input_ids"])
    assert facts["tokens_needed"] == needed <= facts["tokens_computed"] < 1.3 * needed


class Interrupted(Exception):
    pass


@dataclass
class EngineThatStops(LocalEngine):
    """Stops after some shards; `computed` are those it was asked for and finished."""

    shards: int
    computed: list[int] = field(default_factory=list)

    def run(self, work, numbers, folder):
        for number in super().run(work, numbers, folder):
            if len(self.computed) == self.shards:
                raise Interrupted
            self.computed.append(number)
            yield number


@pytest.mark.usefixtures("any_teacher_will_do")
def test_an_interrupted_grading_goes_on_after_its_shards_to_the_same_bytes(graded_set, classifier, monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_PAIRS", 16)
    teacher = Teacher(kind="cross_encoder", model=str(classifier), batch_tokens=200, max_seq_length=64)
    _, facts = grade(graded_set, teacher, "straight")
    before, after = EngineThatStops(3), EngineThatStops(99)
    with pytest.raises(Interrupted):
        grade(graded_set, teacher, engine=before)
    _, resumed = grade(graded_set, teacher, engine=after)
    shards = -(-facts["graded"] // 16)
    assert shards > 5 and len(before.computed) == 3
    # the shard that was being counted when it stopped was on disk
    assert sorted(before.computed + after.computed) == [n for n in range(shards) if n != 3]
    assert resumed == facts
    straight, stopped = (graded_set / name / "scores.parquet" for name in ("straight", "scores"))
    assert stopped.read_bytes() == straight.read_bytes()


class EngineThatPickles(LocalEngine):
    """Hands the work on as Ray does: pickled, and for every shard anew."""

    def run(self, work, numbers, folder):
        for number in numbers:
            pickled = pickle.dumps(work)
            assert len(pickled) < 20_000  # paths and queries, no documents and no vectors
            yield from super().run(pickle.loads(pickled), [number], folder)


@pytest.mark.usefixtures("any_teacher_will_do")
@pytest.mark.parametrize("kind", ["bi_encoder", "cross_encoder"])
def test_workers_elsewhere_grade_as_this_process_does(graded_set, classifier, monkeypatch, kind):
    monkeypatch.setattr(teachers, "SHARD_PAIRS", 32)
    model = classifier if kind == "cross_encoder" else write_encoder(graded_set / "encoder")
    teacher = Teacher(kind=kind, model=str(model), max_seq_length=64 if kind == "cross_encoder" else None)
    table, facts = grade(graded_set, teacher)
    again, facts_again = grade(graded_set, teacher, "pickled", EngineThatPickles())
    assert again.equals(table) and facts_again == facts


def test_neither_blocks_nor_shards_decide_a_grade(graded_set, monkeypatch):
    encoder = write_encoder(graded_set / "encoder")
    teacher = Teacher(kind="bi_encoder", model=str(encoder))
    table, facts = grade(graded_set, teacher, "small-blocks")
    assert len({len(block) for block in graded_blocks(tiny_build(graded_set))}) > 1
    path = graded_set / "candidates" / "candidates.parquet"
    write_parquet(path, read_parquet(path))
    assert pq.ParquetFile(path).num_row_groups == 1
    monkeypatch.setattr(teachers, "SHARD_PAIRS", 7)
    again, facts_again = grade(graded_set, teacher, "one-block")
    assert again.equals(table) and facts_again == facts


def test_calibration_reads_all_positives_and_an_even_stride_of_the_others(graded_set, monkeypatch):
    monkeypatch.setattr(teachers, "SHARD_PAIRS", 10)
    monkeypatch.setattr(scores_module, "MAX_OTHERS", 20)
    table, facts = grade(graded_set, Teacher(kind="bi_encoder", model=str(write_encoder(graded_set / "encoder"))))
    scores, is_positive = table["teacher_score"].to_numpy(), table["is_positive"].to_numpy()
    is_retrieved = table["rrf_rank"].is_valid().to_numpy()
    others = scores[~is_positive & is_retrieved]
    assert len(others) > 60  # so that the stride is 4 or more
    stride = -(-len(others) // 20)
    expected = calibrate(scores[is_positive & is_retrieved], others[::stride])[1]
    missed = int((is_positive & ~is_retrieved).sum())
    assert facts["calibration"] == {**expected, "positives_not_retrieved": missed} and missed > 0


def test_warnings_are_printed_and_kept(graded_set, monkeypatch, capsys):
    monkeypatch.setattr(calibration_module, "WARN_AUC", 1.1)
    _, facts = grade(graded_set, Teacher(kind="bi_encoder", model=str(write_encoder(graded_set / "encoder"))))
    printed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(printed) == len(facts["warnings"]) >= 1
    assert all(kept in line for kept, line in zip(facts["warnings"], printed, strict=True))


def test_nothing_to_grade_and_unknown_documents_are_refused(graded_set):
    teacher = Teacher(kind="bi_encoder", model=str(write_encoder(graded_set / "encoder")))
    qrels = graded_set / "corpus" / "qrels.parquet"
    table = read_parquet(qrels)
    rows = table.to_pylist()
    rows[0]["document_id"] = "lost"
    write_parquet(qrels, pa.Table.from_pylist(rows, schema=QRELS))
    with pytest.raises(InputError, match="id 'lost' is not in the corpus"):
        grade(graded_set, teacher)
    write_parquet(qrels, table.filter(pc.field("score") > 0))
    write_parquet(graded_set / "candidates" / "candidates.parquet", CANDIDATES.empty_table())
    with pytest.raises(InputError, match="found 0 positives and 0 other candidates"):  # judged documents alone
        grade(graded_set, teacher, "judged-only")
    write_parquet(qrels, QRELS.empty_table())
    with pytest.raises(InputError, match="nothing to grade"):
        grade(graded_set, teacher, "nothing")


# Fast path against reference


def check(folder: Path, teacher: Teacher, sample: int = 40) -> dict:
    return check_teacher(tiny_build(folder, splits=("train", "test"), teacher=teacher), sample)


def test_a_sound_teacher_passes_its_check(graded_set, classifier, capsys):
    encoder = Teacher(kind="bi_encoder", model=str(write_encoder(graded_set / "encoder")))
    reranker = Teacher(kind="cross_encoder", model=str(classifier), max_seq_length=64, batch_tokens=500)
    half = reranker.model_copy(update={"dtype": "bfloat16"})
    facts = [check(graded_set, teacher) for teacher in (encoder, reranker, half)]
    assert [fact["pairs"] for fact in facts] == [40, 40, 40]
    assert facts[0]["max_difference"] < 2e-4 and facts[1]["max_difference"] < 1e-5
    assert 1e-4 < facts[2]["mean_difference"] < 0.05 * facts[2]["reference_deviation"]
    assert all(fact["spearman"] > 0.98 for fact in facts)
    assert capsys.readouterr().out.count("max difference") == 3
    leftovers = [path for path in (graded_set / "embeddings").rglob("*") if path.suffix in (".arrow", ".shards")]
    assert leftovers == []


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda scores: np.zeros_like(scores), r"\(build\) are all 0"),
        (lambda scores: np.full_like(scores, np.nan), "NaN"),
        (lambda scores: np.random.default_rng(0).permutation(scores), "not those of the reference.*Spearman"),
        (lambda scores: expit(scores), "mean_difference"),
    ],
)
def test_a_fast_path_that_goes_wrong_is_caught(graded_set, monkeypatch, broken, message):
    teacher = Teacher(kind="bi_encoder", model=str(write_encoder(graded_set / "encoder")))
    sound = PairScorer.scores
    monkeypatch.setattr(PairScorer, "scores", lambda self, *arguments: broken(sound(self, *arguments)))
    with pytest.raises(InputError, match=message):
        check(graded_set, teacher)


def test_a_reference_that_is_constant_is_refused():
    with pytest.raises(InputError, match="reference"):
        compare_scores(np.arange(3.0), np.ones(3))
