"""The losses against sentence-transformers' and formulas on embeddings taken by hand; their cached path, and two
processes, against the plain path in one; their masks."""

import pytest
import torch
import torch.distributed
from sentence_transformers.sentence_transformer.losses import CoSENTLoss, MatryoshkaLoss, MultipleNegativesRankingLoss

from modeling.encoder import build_encoder
from modeling.losses import (
    MISSING,
    POSITIVES,
    CachedCoSENTLoss,
    GradedLoss,
    SoftInfoNCELoss,
    known_relevant,
    text_keys,
)
from modeling.objectives import OBJECTIVES

NAN = float("nan")
# Words of the tiny tokenizer, so that different texts have different ids. Rows 0 and 3 have the same positive, rows 1
# and 4 the same query, rows 0, 2 and 5 a popular negative; rows 1 and 4 lack a negative. With two processes of three
# rows each, all of these but one lie apart.
COLUMNS = [
    ["how do i parse a date", "read a file", "open a file", "sort a list", "read a file", "close file"],
    ["parse date given a date", "read file", "open file and close file", "parse date given a date", "file", "close"],
    ["write", "write a file given a file", "write", "a", "", "write"],
    ["given a question retrieve its answer", "", "query", "instruct how do i", "parse parse", "open close"],
]
LABELS = torch.tensor(
    [[0.9, 0.5, 0.1], [0.8, 0.3, NAN], [0.7, 0.6, 0.5], [0.9, 0.05, 0.1], [0.6, NAN, 0.4], [0.95, 0.2, 0.7]]
)
KNOWN = {0: ["file"], 3: ["open close", "list of no row"], 5: ["read file"]}  # positives that the rows do not tell
GRADES = torch.tensor([0.9, 0.2, 0.5, 0.2, 0.7, 0.4])  # of pairs; the second and the fourth tie
WHOLE = torch.where(LABELS.isnan(), 0.2, LABELS)  # for rows that lack nothing
SETTINGS = {"temperature": 0.05, "target_temperature": 0.7, "false_negative_margin": 0.1}
MINI_BATCHES = [None, 2]


@pytest.fixture
def encoder(tiny_decoder):
    return build_encoder(tiny_decoder, max_seq_length=32)


def features(encoder, columns=COLUMNS, rows=range(6), known=None):
    """What the trainer hands to a loss: columns of the rows, and of the queries what the collator adds to them."""
    made = [encoder.preprocess([column[row] for row in rows]) for column in columns]
    if known is not None:
        keys = [text_keys(encoder.preprocess(known[row])).tolist() if row in known else [] for row in rows]
        made[0][POSITIVES] = torch.tensor([[*row, *[MISSING] * (2 - len(row))] for row in keys])
    return made


def gradient_of(model):
    found = [value.grad.flatten() for value in model.parameters() if value.requires_grad]
    return torch.cat(found).clone()


def value_and_gradient(model, loss, columns, labels):
    model.zero_grad()
    value = loss(columns, labels)
    value.backward()
    gradient = gradient_of(model)
    assert gradient.norm() > 1e-3
    return value.item(), gradient


def assert_same(found, expected, tolerance=1e-5):
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert (found[1] - expected[1]).norm() < tolerance * expected[1].norm()


# --- against others --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mini_batch_size", [None, 1, 64])
def test_one_hot_labels_equal_multiple_negatives_ranking(encoder, mini_batch_size):
    columns = [column[:3] for column in [*COLUMNS[:2], COLUMNS[3][3:]]]
    columns[2] = ["instruct how do i", "parse parse", "open close"]  # no text twice
    theirs = value_and_gradient(
        encoder, MultipleNegativesRankingLoss(encoder, scale=50), features(encoder, columns, range(3)), None
    )
    for labels, alpha in ((torch.tensor([[1.0, 0.0]] * 3), 1.0), (None, 0.0)):
        loss = SoftInfoNCELoss(encoder, temperature=0.02, mini_batch_size=mini_batch_size, alpha=alpha)
        assert_same(value_and_gradient(encoder, loss, features(encoder, columns, range(3)), labels), theirs)


def vectors_of(encoder, columns, dimensions=None):
    """Embeddings of texts one by one, cut to so many dimensions, at unit length."""
    vectors = [[encoder(encoder.preprocess([text]))["sentence_embedding"][0] for text in col] for col in columns]
    return [torch.nn.functional.normalize(torch.stack(column)[:, :dimensions], dim=1) for column in vectors]


def by_hand(encoder, objective, in_batch_negatives=True, dimensions=None):
    """The loss from vectors of texts one by one, with masks made of the strings; and what they hid."""
    queries, *documents = vectors_of(encoder, COLUMNS, dimensions)
    cosines = queries @ torch.cat(documents).T
    texts = [text for column in COLUMNS[1:] for text in column]
    hidden = {"text": 0, "query": 0, "known": 0, "margin": 0}
    mask = torch.zeros_like(cosines, dtype=torch.bool)
    own = torch.full((6, 3), -1)
    for row in range(6):
        own_texts = [column[row] for column in COLUMNS[1:]]
        own[row] = torch.tensor([6 * k + row if text else -1 for k, text in enumerate(own_texts)])
        same_query = [COLUMNS[1][other] for other in range(6) if COLUMNS[0][other] == COLUMNS[0][row]]
        for j, text in enumerate(texts):
            if not text or not in_batch_negatives:
                mask[row, j] = True
            elif j % 6 != row:
                by = {
                    "text": text in own_texts,
                    "query": text in same_query,
                    "known": text in KNOWN.get(row, []),
                    "margin": bool(cosines[row, j] > cosines[row, row] + SETTINGS["false_negative_margin"]),
                }
                mask[row, j] = any(by.values())
                hidden = {name: hidden[name] + by[name] for name in by}
    given = {"labels": LABELS, "target_temperature": SETTINGS["target_temperature"], "mask": mask}
    function, needs, _ = OBJECTIVES[objective]
    loss = function(cosines / SETTINGS["temperature"], own, **{need: given[need] for need in needs})
    return loss, hidden


@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_its_formula_and_its_cached_path_too(encoder, objective, in_batch_negatives):
    expected, hidden = by_hand(encoder, objective, in_batch_negatives)
    assert not in_batch_negatives or min(hidden.values()) > 0, hidden  # every reason to leave a document out occurs
    plain, cached = (
        value_and_gradient(
            encoder,
            GradedLoss(encoder, objective, in_batch_negatives=in_batch_negatives, mini_batch_size=size, **SETTINGS),
            features(encoder, known=KNOWN),
            LABELS,
        )
        for size in MINI_BATCHES
    )
    assert plain[0] == pytest.approx(expected.item(), rel=2e-5)
    assert_same(cached, plain)


@pytest.mark.parametrize("size", MINI_BATCHES)
@pytest.mark.parametrize("objective", [*OBJECTIVES, "cosent"])
def test_matryoshka_is_the_sum_over_vectors_cut_and_renormalised(encoder, objective, size):
    dimensions = (32, 12, 4)
    encoder.zero_grad()
    if objective == "cosent":
        made, labels = features(encoder, COLUMNS[:2]), GRADES
        loss = CachedCoSENTLoss(encoder, mini_batch_size=size)
        pairs = [vectors_of(encoder, COLUMNS[:2], number) for number in dimensions]
        expected = sum(CoSENTLoss(encoder).compute_loss_from_embeddings(pair, GRADES) for pair in pairs)
    else:
        made, labels = features(encoder, known=KNOWN), LABELS
        loss = GradedLoss(encoder, objective, mini_batch_size=size, **SETTINGS)
        expected = sum(by_hand(encoder, objective, dimensions=number)[0] for number in dimensions)
    expected.backward()
    plain = expected.item(), gradient_of(encoder)
    assert plain[1].norm() > 1e-3
    assert_same(value_and_gradient(encoder, MatryoshkaLoss(encoder, loss, dimensions), made, labels), plain, 1e-4)


@pytest.mark.parametrize("objective", ["soft_info_nce", "lambda_loss"])
def test_alpha_mixes_with_info_nce(encoder, objective):
    def run(name, **settings):
        loss = GradedLoss(encoder, name, mini_batch_size=2, **SETTINGS, **settings)
        return value_and_gradient(encoder, loss, features(encoder), LABELS)

    soft, hard = run(objective), run("info_nce")
    assert (soft[1] - hard[1]).norm() > 0.1 * hard[1].norm()
    assert_same(run(objective, alpha=0.3), [0.3 * a + 0.7 * b for a, b in zip(soft, hard, strict=True)])
    assert_same(run(objective, alpha=0.0), hard)


@pytest.mark.parametrize("mini_batch_size", MINI_BATCHES)
def test_cosent_is_that_of_sentence_transformers(encoder, mini_batch_size):
    theirs = value_and_gradient(encoder, CoSENTLoss(encoder, scale=10), features(encoder, COLUMNS[:2]), GRADES)
    loss = CachedCoSENTLoss(encoder, scale=10, mini_batch_size=mini_batch_size)
    assert_same(value_and_gradient(encoder, loss, features(encoder, COLUMNS[:2]), GRADES), theirs)
    with torch.no_grad():  # as in evaluation: no hook, no backward
        assert loss(features(encoder, COLUMNS[:2]), GRADES).item() == pytest.approx(theirs[0], rel=1e-5)


# --- two processes --------------------------------------------------------------------------------------------

SPREAD = ["soft_info_nce", "bixse", "kl"]  # the target on own documents, on all, and no other rows


def refusal(loss, columns, labels):
    with pytest.raises(ValueError) as refused:
        loss(columns, labels)
    return str(refused.value)


def train_in_two_processes(rank, folder, checkpoint):
    """Every case on this process' three rows, under DDP; saves {case: (value, gradient)}."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    encoder = build_encoder(checkpoint, max_seq_length=32)
    model = DistributedDataParallel(encoder)
    rows = range(3 * rank, 3 * rank + 3)
    results = {}
    for size in MINI_BATCHES:
        for gather in (True, False):
            # keeps some graphs, not all
            settings = {"mini_batch_size": size, "gather_across_devices": gather, "activation_memory": 200_000}
            columns = features(encoder, rows=rows, known=KNOWN)
            for name in SPREAD:
                loss = GradedLoss(model, name, **settings, **SETTINGS)
                results[name, size, gather] = value_and_gradient(model, loss, columns, LABELS[rows])
            loss, columns = CachedCoSENTLoss(model, **settings), features(encoder, COLUMNS[:2], rows)
            results["cosent", size, gather] = value_and_gradient(model, loss, columns, GRADES[rows])
    uneven = rows[rank:]
    cosent = CachedCoSENTLoss(model, gather_across_devices=True)
    results["rows"] = refusal(cosent, features(encoder, COLUMNS[:2], uneven), GRADES[uneven])
    graded = GradedLoss(model, "info_nce", gather_across_devices=True)
    results["columns"] = refusal(graded, features(encoder, COLUMNS[: 4 - rank], rows), None)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tiny_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-processes")
    torch.multiprocessing.spawn(train_in_two_processes, (str(folder), tiny_decoder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("gather", [True, False])
@pytest.mark.parametrize("mini_batch_size", MINI_BATCHES)
@pytest.mark.parametrize("name", [*SPREAD, "cosent"])
def test_two_processes_are_one_with_all_rows_or_each_one_with_its_own(
    encoder, two_processes, name, mini_batch_size, gather
):
    """DDP averages gradients."""
    parts = [range(6)] if gather else [range(3), range(3, 6)]
    if name == "cosent":
        loss, columns, labels = CoSENTLoss(encoder), COLUMNS[:2], GRADES
    else:
        loss, columns, labels = GradedLoss(encoder, name, **SETTINGS), COLUMNS, LABELS
    known = None if name == "cosent" else KNOWN
    alone = [
        value_and_gradient(encoder, loss, features(encoder, columns, rows, known), labels[rows]) for rows in parts
    ]
    expected = [sum(part) / len(parts) for part in zip(*alone, strict=True)]
    found = [process[name, mini_batch_size, gather] for process in two_processes]
    assert found[0][1].equal(found[1][1])
    assert_same((sum(value for value, _ in found) / 2, found[0][1]), expected)
    other = two_processes[0][name, mini_batch_size, not gather][1]
    assert ((found[0][1] - other).norm() > 0.01 * other.norm()) == (name != "kl")  # else gathering changes nothing


def test_unequal_batches_are_refused_by_all_processes(two_processes):
    """They would wait for each other for ever."""
    assert all("[[3, 3], [2, 3]]" in process["columns"] for process in two_processes)
    assert all("[[1, 3], [1, 2]]" in process["rows"] for process in two_processes)


# --- parts --------------------------------------------------------------------------------------------


def test_known_relevant():
    # documents: positives p0 p1 p2, negatives n0 n1 n2; p1 is n0, and rows 0 and 2 have the same query
    queries, documents = torch.tensor([7, 8, 7]), torch.tensor([1, 2, 3, 2, 5, 6])
    expected = torch.tensor([
        [True, True, True, True, False, False],   # own p0, n0 (so p1, the same text), p2 by the query
        [False, True, False, True, True, False],  # own p1 (so n0), n1
        [True, False, True, False, False, True],  # p0 by the query, own p2, n2
    ])  # fmt: skip
    assert known_relevant(queries, documents, slice(0, 3)).equal(expected)
    assert known_relevant(queries, documents, slice(1, 3)).equal(expected[1:])
    # row 0 is told of n2 and of a positive that is not in the batch, row 1 of nothing
    positives = torch.tensor([[6, 99], [MISSING, MISSING], [1, MISSING]])
    expected[0, 5] = True
    assert known_relevant(queries, documents, slice(0, 3), positives).equal(expected)


def test_text_keys_tell_texts_apart_whatever_the_padding(encoder):
    texts = ["a", "a a", "sort list a", "list a sort", "", "sort a", *COLUMNS[0][:4], *COLUMNS[3][2:]]
    alone = torch.cat([text_keys(encoder.preprocess([text])) for text in texts])
    assert len(alone.unique()) == len(texts)
    together = encoder.preprocess(texts)
    assert text_keys(together).equal(alone)
    # padded on the other side
    ids, mask = together["input_ids"], together["attention_mask"]
    order = mask.argsort(dim=1, stable=True)
    left = {"input_ids": ids.gather(1, order), "attention_mask": mask.gather(1, order)}
    assert left["attention_mask"][0, 0] == 0
    assert text_keys(left).equal(alone)
    # flattened, as for flash attention
    lengths = torch.cat([torch.zeros(1, dtype=torch.long), mask.sum(1).cumsum(0)])
    assert text_keys({"input_ids": ids[mask.bool()][None], "cu_seq_lens_q": lengths}).equal(alone)


BAD = {
    "no documents": (COLUMNS[:1], LABELS, "at least one document column"),
    "one document": (COLUMNS[:2], LABELS[:, :1], "CoSENTLoss"),
    "no labels": (COLUMNS, None, "got labels None"),
    "fewer labels": (COLUMNS, LABELS[:, :2], "expected 3 soft labels"),
    "one label a row": (COLUMNS, LABELS[:, 0], "expected 3 soft labels"),
    "raw scores": (COLUMNS, LABELS * 9, "calibrate"),
    "no label of a positive": (COLUMNS, torch.where(LABELS == 0.9, NAN, LABELS), "positive is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_batches_that_cannot_be_trained_on(encoder, case):
    columns, labels, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        SoftInfoNCELoss(encoder)(features(encoder, columns), labels)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"target_temperature": -1}, {"alpha": 1.5}, {"objective": "x"}]
)
def test_settings_that_make_no_sense(settings):
    with pytest.raises(ValueError, match="must"):
        GradedLoss(torch.nn.Identity(), **settings)


def test_graded_pairs_train_those_objectives_alone_that_learn_from_one_document(encoder):
    columns, labels = features(encoder, COLUMNS[:2]), WHOLE[:, :1]
    refused = [name for name in OBJECTIVES if name not in ("bixse", "info_nce")]
    assert len(refused) == 7
    for name in refused:
        with pytest.raises(ValueError, match="CoSENTLoss"):
            GradedLoss(encoder, name)(columns, labels)
    values = [GradedLoss(encoder, "bixse", temperature=0.1)(columns, grades) for grades in (labels, 1 - labels)]
    assert abs(values[0] - values[1]) > 0.1
