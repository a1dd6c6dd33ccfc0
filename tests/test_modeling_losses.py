"""The loss module against sentence-transformers' losses and formulas on embeddings taken by hand; its cached path, and
two processes, against the plain path in one; its masks."""

import inspect

import pytest
import torch
import torch.distributed
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    CoSENTLoss,
    MultipleNegativesRankingLoss,
)

from modeling.encoder import build_encoder
from modeling.losses import (
    MISSING,
    CachedCoSENTLoss,
    GradedLoss,
    SoftInfoNCELoss,
    known_relevant,
    sort_by_length,
    text_keys,
)
from modeling.objectives import OBJECTIVES

# words of the tiny tokenizer, so that different texts have different ids
QUERIES = ["how do i parse a date", "read a file", "open a file", "sort a list", "write its answer"]
POSITIVES = ["parse date given a date", "read file", "open file and close file", "sort list sort", "answer answer"]
NEGATIVES = [
    ["close", "write write a file given a file", "sort a date", "a", "list"],
    ["given a question retrieve its answer", "date", "query", "instruct how do i", "parse parse"],
]
LABELS = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.3, 0.2], [0.7, 0.6, 0.5], [0.9, 0.05, 0.1], [0.6, 0.2, 0.4]])
ONE_HOT = torch.tensor([[1.0, 0.0, 0.0]]).repeat(5, 1)


@pytest.fixture
def encoder(tiny_decoder):
    return build_encoder(tiny_decoder, max_seq_length=32)


def features(encoder, *columns):
    return [encoder.preprocess(column) for column in columns or (QUERIES, POSITIVES, *NEGATIVES)]


def value_and_gradient(encoder, loss, labels, *columns):
    encoder.zero_grad()
    value = loss(features(encoder, *columns), labels)
    value.backward()
    gradients = [parameter.grad.flatten() for parameter in encoder.parameters() if parameter.grad is not None]
    assert len(gradients) == len(list(encoder.parameters()))
    gradient = torch.cat(gradients)
    assert gradient.norm() > 1e-3
    return value.item(), gradient.clone()


@pytest.mark.parametrize("mini_batch_size", [None, 1, 2, 64])
def test_one_hot_labels_equal_multiple_negatives_ranking(encoder, mini_batch_size):
    expected, expected_gradient = value_and_gradient(encoder, MultipleNegativesRankingLoss(encoder, scale=50), None)
    for labels, alpha in ((ONE_HOT, 1.0), (None, 0.0)):
        loss = SoftInfoNCELoss(encoder, temperature=0.02, mini_batch_size=mini_batch_size, alpha=alpha)
        value, gradient = value_and_gradient(encoder, loss, labels)
        assert value == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("mini_batch_size", [1, 2, 3, 64])
@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_cached_equals_plain(encoder, mini_batch_size, alpha):
    kwargs = {"temperature": 0.05, "target_temperature": 0.7, "alpha": alpha}
    plain, plain_gradient = value_and_gradient(encoder, SoftInfoNCELoss(encoder, **kwargs), LABELS)
    loss = SoftInfoNCELoss(encoder, mini_batch_size=mini_batch_size, **kwargs)
    cached, cached_gradient = value_and_gradient(encoder, loss, LABELS)
    assert cached == pytest.approx(plain, rel=1e-5)
    assert (cached_gradient - plain_gradient).norm() < 1e-5 * plain_gradient.norm()
    with torch.no_grad():  # as in evaluation: no hook, no backward
        assert loss(features(encoder), LABELS).item() == pytest.approx(plain, rel=1e-5)


def test_soft_labels_change_the_gradient(encoder):
    """Else the comparisons above would pass on a loss that ignores its labels."""
    loss = SoftInfoNCELoss(encoder)
    soft, soft_gradient = value_and_gradient(encoder, loss, LABELS)
    hard, hard_gradient = value_and_gradient(encoder, loss, ONE_HOT)
    assert abs(soft - hard) > 0.1
    assert (soft_gradient - hard_gradient).norm() > 0.1 * hard_gradient.norm()


@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_duplicates_in_the_batch_are_no_negatives(encoder, mini_batch_size):
    """Row 1's positive is row 0's as well: the loss is that of a batch in which it appears once."""
    columns = [QUERIES[:2], [POSITIVES[0]] * 2, ["close", "sort a date"], ["date", "query"]]
    loss = SoftInfoNCELoss(encoder, temperature=1.0, mini_batch_size=mini_batch_size)
    value, _ = value_and_gradient(encoder, loss, LABELS[:2], *columns)
    once = features(encoder, columns[0], [POSITIVES[0], "close", "sort a date", "date", "query"])
    queries, documents = (encoder(part)["sentence_embedding"] for part in once)
    log_probabilities = (queries @ documents.T).log_softmax(1).gather(1, torch.tensor([[0, 1, 3], [0, 2, 4]]))
    expected = -(torch.softmax(torch.logit(LABELS[:2]), 1) * log_probabilities).sum(1).mean()
    assert value == pytest.approx(expected.item(), rel=1e-5)
    unmasked = CachedMultipleNegativesRankingLoss(encoder, scale=1)(features(encoder, *columns), None)
    masked = SoftInfoNCELoss(encoder, temperature=1.0, alpha=0.0)(features(encoder, *columns))
    assert unmasked.item() - masked.item() > 0.1  # of about log(6 / 5): a duplicate stood against itself


# --- every objective: unequal rows, duplicates, suspected false negatives; in one process and in two -----------------

NAN = float("nan")
# rows 0 and 3 have the same positive, rows 1 and 4 the same query: with two processes of three rows, one in each
RAGGED = [
    ["how do i parse a date", "read a file", "open a file", "sort a list", "read a file", "close file"],
    ["parse date given a date", "read file", "open file and close file", "parse date given a date", "file", "close"],
    ["close", "write a file given a file", "sort a date", "a", "", "list"],
    ["given a question retrieve its answer", "", "query", "instruct how do i", "parse parse", "open close"],
]
RAGGED_LABELS = torch.tensor(
    [[0.9, 0.5, 0.1], [0.8, 0.3, NAN], [0.7, 0.6, 0.5], [0.9, 0.05, 0.1], [0.6, NAN, 0.4], [0.95, 0.2, 0.7]]
)
GRADES = torch.tensor([0.9, 0.2, 0.5, 0.2, 0.7, 0.4])  # of pairs; the second and the fourth tie
SETTINGS = {"temperature": 0.05, "target_temperature": 0.7, "false_negative_margin": 0.1}
MINI_BATCHES = [None, 2]


def rows_of(columns, rows):
    return [[column[row] for row in rows] for column in columns]


def gradient_of(model):
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]
    return torch.cat(gradients).clone()


def by_hand(encoder, objective, in_batch_negatives=True):
    """The loss from embeddings of texts one by one, with masks made of the strings; and what they hid."""
    with torch.no_grad():
        vectors = [[encoder(encoder.preprocess([text]))["sentence_embedding"][0] for text in col] for col in RAGGED]
    queries, *columns = [torch.nn.functional.normalize(torch.stack(column), dim=1) for column in vectors]
    cosines = queries @ torch.cat(columns).T
    texts = [text for column in RAGGED[1:] for text in column]
    hidden = {"text": 0, "query": 0, "margin": 0}
    mask = torch.zeros_like(cosines, dtype=torch.bool)
    own = torch.full((6, 3), -1)
    for row in range(6):
        for k in range(3):
            if RAGGED[k + 1][row]:
                own[row, k] = 6 * k + row
        own_texts = {RAGGED[k + 1][row] for k in range(3)}
        shared = {RAGGED[1][other] for other in range(6) if RAGGED[0][other] == RAGGED[0][row]}
        for j, text in enumerate(texts):
            if not text or not in_batch_negatives:
                mask[row, j] = True
            elif j % 6 != row:
                by = {
                    "text": text in own_texts,
                    "query": text in shared,
                    "margin": bool(cosines[row, j] > cosines[row, row] + SETTINGS["false_negative_margin"]),
                }
                mask[row, j] = any(by.values())
                hidden = {name: hidden[name] + by[name] for name in by}
    given = {"labels": RAGGED_LABELS, "target_temperature": SETTINGS["target_temperature"], "mask": mask}
    needs = OBJECTIVES[objective].needs
    loss = OBJECTIVES[objective].function(
        cosines / SETTINGS["temperature"], own, **{need: given[need] for need in needs}
    )
    return loss.item(), hidden


@pytest.mark.parametrize("in_batch_negatives", [True, False])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_loss_is_its_formula(encoder, objective, in_batch_negatives):
    expected, hidden = by_hand(encoder, objective, in_batch_negatives)
    if in_batch_negatives:
        assert min(hidden.values()) > 0, hidden  # every reason to leave a document out occurs
    loss = GradedLoss(encoder, objective, in_batch_negatives=in_batch_negatives, **SETTINGS)
    value, _ = value_and_gradient(encoder, loss, RAGGED_LABELS, *RAGGED)
    assert value == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_in_batch_negatives_rows_do_not_meet(encoder, objective):
    """The loss of a batch is the mean of its rows', each trained alone with the documents it has."""
    loss = GradedLoss(encoder, objective, in_batch_negatives=False, **SETTINGS)
    value, gradient = value_and_gradient(encoder, loss, RAGGED_LABELS, *RAGGED)
    values, gradients = [], []
    for row in range(6):
        kept = [k for k in range(3) if RAGGED[k + 1][row]]
        columns = [[RAGGED[0][row]], *([RAGGED[k + 1][row]] for k in kept)]
        encoder.zero_grad()
        alone = loss(features(encoder, *columns), RAGGED_LABELS[row : row + 1, kept])
        alone.backward()
        values.append(alone.item())
        gradients.append(gradient_of(encoder))
    assert value == pytest.approx(sum(values) / 6, rel=1e-5)
    assert (gradient - sum(gradients) / 6).norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("mini_batch_size", MINI_BATCHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_alpha_mixes_with_info_nce(encoder, objective, mini_batch_size):
    def run(name, **kwargs):
        loss = GradedLoss(encoder, name, mini_batch_size=mini_batch_size, **SETTINGS, **kwargs)
        return value_and_gradient(encoder, loss, RAGGED_LABELS, *RAGGED)

    value, gradient = run(objective, alpha=0.3)
    soft, soft_gradient = run(objective)
    hard, hard_gradient = run("info_nce")
    assert value == pytest.approx(0.3 * soft + 0.7 * hard, rel=1e-5)
    assert (gradient - 0.3 * soft_gradient - 0.7 * hard_gradient).norm() < 1e-5 * gradient.norm()
    assert run(objective, alpha=0.0)[0] == pytest.approx(hard, rel=1e-6)


def train_in_two_processes(rank, folder, checkpoint):
    """Every case on this process' three rows, under DDP; saves {(objective, mini_batch_size, gather): results}."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    encoder = build_encoder(checkpoint, max_seq_length=32)
    model = DistributedDataParallel(encoder)
    rows = range(3 * rank, 3 * rank + 3)
    results = {}
    for objective in OBJECTIVES:
        for mini_batch_size in MINI_BATCHES:
            for gather in (True, False):
                model.zero_grad()
                loss = GradedLoss(
                    model, objective, mini_batch_size=mini_batch_size, gather_across_devices=gather, **SETTINGS
                )
                value = loss(features(encoder, *rows_of(RAGGED, rows)), RAGGED_LABELS[rows])
                value.backward()
                results[objective, mini_batch_size, gather] = value.item(), gradient_of(encoder)
    for mini_batch_size in MINI_BATCHES:
        for gather in (True, False):
            model.zero_grad()
            loss = CachedCoSENTLoss(model, mini_batch_size=mini_batch_size, gather_across_devices=gather)
            value = loss(features(encoder, *rows_of(RAGGED[:2], rows)), GRADES[rows])
            value.backward()
            results["cosent", mini_batch_size, gather] = value.item(), gradient_of(encoder)
    try:
        CachedCoSENTLoss(model, gather_across_devices=True)(
            features(encoder, *rows_of(RAGGED[:2], rows[rank:])), GRADES[rows[rank:]]
        )
    except ValueError as error:
        results["unequal pairs"] = str(error)
    columns = rows_of(RAGGED[: 4 - rank], rows)
    try:
        GradedLoss(model, "info_nce", gather_across_devices=True)(features(encoder, *columns))
    except ValueError as error:
        results["unequal"] = str(error)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tiny_decoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("two-processes")
    torch.multiprocessing.spawn(train_in_two_processes, (str(folder), tiny_decoder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("place", ["one process", "two, gathered", "two, each its own"])
@pytest.mark.parametrize("mini_batch_size", MINI_BATCHES)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_exactness(encoder, two_processes, objective, mini_batch_size, place):
    """Value and gradients of every path are those of the plain path in one process.

    With gather, two processes are one with all rows; without, each is one with its own rows. DDP averages gradients.
    """
    halves = [range(3), range(3, 6)] if place == "two, each its own" else [range(6)]
    expected, expected_gradient = 0.0, 0.0
    for rows in halves:
        loss = GradedLoss(encoder, objective, **SETTINGS)
        value, gradient = value_and_gradient(encoder, loss, RAGGED_LABELS[rows], *rows_of(RAGGED, rows))
        expected += value / len(halves)
        expected_gradient += gradient / len(halves)
    if place == "one process":
        loss = GradedLoss(encoder, objective, mini_batch_size=mini_batch_size, gather_across_devices=True, **SETTINGS)
        results = [value_and_gradient(encoder, loss, RAGGED_LABELS, *RAGGED)]
    else:
        results = [process[objective, mini_batch_size, place == "two, gathered"] for process in two_processes]
        assert results[0][1].equal(results[1][1])
    assert sum(value for value, _ in results) / len(results) == pytest.approx(expected, rel=1e-5)
    assert (results[0][1] - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if "mask" in OBJECTIVES[name].needs])
def test_gathering_changes_something(two_processes, objective):
    """Else the comparison above would pass on a loss that never gathers."""
    (_, gathered), (_, apart) = (two_processes[0][objective, None, gather] for gather in (True, False))
    assert (gathered - apart).norm() > 0.01 * apart.norm()


def test_unequal_batches_are_refused_by_all_processes(two_processes):
    """They would wait for each other for ever."""
    messages = [process["unequal"] for process in two_processes]
    assert messages[0] == messages[1]
    assert "[[3, 3], [2, 3]]" in messages[0]
    assert all("[[1, 3], [1, 2]]" in process["unequal pairs"] for process in two_processes)


# --- graded pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mini_batch_size", [None, 1, 2, 64])
def test_cosent_is_that_of_sentence_transformers(encoder, mini_batch_size):
    expected, expected_gradient = value_and_gradient(encoder, CoSENTLoss(encoder, scale=10), GRADES, *RAGGED[:2])
    loss = CachedCoSENTLoss(encoder, scale=10, mini_batch_size=mini_batch_size)
    value, gradient = value_and_gradient(encoder, loss, GRADES, *RAGGED[:2])
    assert value == pytest.approx(expected, rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
    with torch.no_grad():
        assert loss(features(encoder, *RAGGED[:2]), GRADES).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mini_batch_size", MINI_BATCHES)
def test_cosent_of_two_processes_is_that_of_one(encoder, two_processes, mini_batch_size):
    """Each process has the whole loss, and DDP's average is the whole gradient."""
    expected, expected_gradient = value_and_gradient(encoder, CoSENTLoss(encoder), GRADES, *RAGGED[:2])
    for process in two_processes:
        value, gradient = process["cosent", mini_batch_size, True]
        assert value == pytest.approx(expected, rel=1e-5)
        assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()
        apart = process["cosent", mini_batch_size, False]  # else this would pass on a loss that never gathers
        assert (gradient - apart[1]).norm() > 0.01 * gradient.norm()


def test_cosent_settings():
    settings = {"mini_batch_size": 8, "gather_across_devices": True}
    config = CachedCoSENTLoss(torch.nn.Identity(), 10, **settings).get_config_dict()
    assert config == {"scale": 10, "similarity_fct": "pairwise_cos_sim", **settings}
    with pytest.raises(ValueError, match="mini_batch_size must be None or at least 1"):
        CachedCoSENTLoss(torch.nn.Identity(), mini_batch_size=0)


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
    texts = ["a", "a a", "sort list a", "list a sort", "", "sort a", *QUERIES, *POSITIVES]
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
    flat = {"input_ids": ids[mask.bool()][None], "cu_seq_lens_q": lengths}
    assert text_keys(flat).equal(alone)


def test_documents_are_embedded_by_length(encoder):
    columns = features(encoder)
    (queries, documents), order = sort_by_length(columns)
    lengths = documents["attention_mask"].sum(1)
    assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
    assert queries["input_ids"].equal(columns[0]["input_ids"])
    restored = {"input_ids": documents["input_ids"][order], "attention_mask": documents["attention_mask"][order]}
    assert text_keys(restored).equal(torch.cat([text_keys(column) for column in columns[1:]]))
    # what it is for: the padding that mini-batches of 3 still hold
    embedded = sum(lengths[begin] * len(lengths[begin : begin + 3]) for begin in range(0, len(lengths), 3))
    unsorted = sum(3 * column["input_ids"].shape[1] for column in columns[1:] for _ in range(2))
    assert lengths.sum() <= embedded < unsorted


def test_dropout_is_replayed_in_the_cached_path(encoder):
    """Both forward passes of GradCache must draw the same masks, also after the documents were sorted."""
    from peft import LoraConfig

    from modeling.adapters import add_adapter

    add_adapter(encoder, LoraConfig(r=4, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False))
    encoder.train()
    trained = [parameter for parameter in encoder.parameters() if parameter.requires_grad]
    seen = {}

    class Recorded(SoftInfoNCELoss):
        def embed_minibatch(self, sentence_feature, begin, end, with_grad, **kwargs):
            reps, state = super().embed_minibatch(sentence_feature, begin, end, with_grad, **kwargs)
            seen.setdefault(with_grad, []).append(reps.detach().clone())
            return reps, state

    torch.manual_seed(0)
    Recorded(encoder, mini_batch_size=2)(features(encoder), LABELS).backward()
    assert all(parameter.grad is not None for parameter in trained)
    assert len(seen[False]) == len(seen[True]) == 3 + 8
    assert all(torch.equal(first, second) for first, second in zip(seen[False], seen[True], strict=True))


@pytest.mark.parametrize(
    ("columns", "labels", "message"),
    [
        ([QUERIES], LABELS, "at least one document column"),
        ([QUERIES, POSITIVES], LABELS[:, :1], "CoSENTLoss"),
        ([QUERIES, POSITIVES, *NEGATIVES], None, "got labels None"),
        ([QUERIES, POSITIVES, *NEGATIVES], LABELS[:, :2], "expected 3 soft labels"),
        ([QUERIES, POSITIVES, *NEGATIVES], LABELS[:, 0], "expected 3 soft labels"),
        ([QUERIES, POSITIVES, *NEGATIVES], LABELS * 9, "calibrate"),
        ([QUERIES, POSITIVES, *NEGATIVES], torch.where(LABELS == 0.9, NAN, LABELS), "positive is missing"),
    ],
)
def test_batches_that_cannot_be_trained_on(encoder, columns, labels, message):
    with pytest.raises(ValueError, match=message):
        SoftInfoNCELoss(encoder)(features(encoder, *columns), labels)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"temperature": 0},
        {"target_temperature": -1},
        {"alpha": 1.5},
        {"mini_batch_size": 0},
        {"false_negative_margin": -0.1},
        {"objective": "softinfonce"},
    ],
)
def test_settings_that_make_no_sense(kwargs):
    with pytest.raises(ValueError, match="must"):
        GradedLoss(torch.nn.Identity(), **kwargs)


def test_graded_pairs(encoder):
    """One document a row: an objective that compares documents would learn nothing, without a word."""
    columns, labels = features(encoder, QUERIES, POSITIVES), LABELS[:, :1]
    refused = [name for name in OBJECTIVES if name not in ("bixse", "info_nce")]
    assert len(refused) == 7
    for name in refused:
        with pytest.raises(ValueError, match="CoSENTLoss"):
            GradedLoss(encoder, name)(columns, labels)
    values = [GradedLoss(encoder, "bixse", temperature=0.1)(columns, grades) for grades in (labels, 1 - labels)]
    assert abs(values[0] - values[1]) > 0.1


def test_config_names_every_setting():
    """A setting that the card does not tell cannot be reproduced."""
    settings = {
        "objective": "kl",
        "temperature": 0.1,
        "mini_batch_size": 8,
        "target_temperature": 2.0,
        "alpha": 0.5,
        "in_batch_negatives": False,
        "false_negative_margin": 0.1,
        "gather_across_devices": True,
    }
    accepted = inspect.signature(GradedLoss.__init__).parameters.keys() - {"self", "model"}
    assert accepted == settings.keys()
    assert GradedLoss(torch.nn.Identity(), **settings).get_config_dict() == settings


def test_soft_info_nce_loss_is_the_default_objective():
    loss = SoftInfoNCELoss(torch.nn.Identity(), 0.1, 8, target_temperature=2.0, alpha=0.5, in_batch_negatives=False)
    settings = {"temperature": 0.1, "mini_batch_size": 8, "target_temperature": 2.0, "alpha": 0.5}
    expected = GradedLoss(torch.nn.Identity(), **settings, in_batch_negatives=False)
    assert loss.get_config_dict() == expected.get_config_dict()
    assert loss.objective == "soft_info_nce"
