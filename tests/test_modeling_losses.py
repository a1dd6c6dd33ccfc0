"""The loss module against sentence-transformers' own losses, its cached path against the plain one, and its masks."""

import inspect

import pytest
import torch
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    MultipleNegativesRankingLoss,
)

from modeling.encoder import build_encoder
from modeling.losses import GradedLoss, SoftInfoNCELoss, known_relevant, sort_by_length, text_keys

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

    from modeling.encoder import add_adapter

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
    ],
)
def test_batches_that_cannot_be_trained_on(encoder, columns, labels, message):
    with pytest.raises(ValueError, match=message):
        SoftInfoNCELoss(encoder)(features(encoder, *columns), labels)


@pytest.mark.parametrize(
    "kwargs", [{"temperature": 0}, {"target_temperature": -1}, {"alpha": 1.5}, {"mini_batch_size": 0}]
)
def test_settings_that_make_no_sense(kwargs):
    with pytest.raises(ValueError, match="must"):
        SoftInfoNCELoss(torch.nn.Identity(), **kwargs)


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
