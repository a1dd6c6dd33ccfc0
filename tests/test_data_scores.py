import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from dataset_builders.cli import InputError
from dataset_builders.schema import LABEL_FLOOR
from dataset_builders.scores import Calibration, PairScorer, Teacher, calibrate, count_flat_and_one_hot

rng = np.random.default_rng(0)
POSITIVES, OTHERS = rng.normal(0.6, 0.1, 500), rng.normal(0.4, 0.15, 20_000)


def test_calibration_is_platt_scaling_of_balanced_classes():
    calibration, facts = calibrate(POSITIVES, OTHERS)
    scores, truth = np.concatenate([POSITIVES, OTHERS]), np.r_[np.ones(500), np.zeros(20_000)]
    # the same by repeating positives 40 times instead of weighting, without a penalty
    repeated = np.concatenate([np.repeat(POSITIVES, 40), OTHERS])[:, None]
    reference = LogisticRegression(C=np.inf).fit(repeated, np.r_[np.ones(20_000), np.zeros(20_000)])
    expected = reference.predict_proba(scores[:, None])[:, 1]
    np.testing.assert_allclose(calibration(scores), np.clip(expected, LABEL_FLOOR, 1 - LABEL_FLOOR), atol=2e-3)
    np.testing.assert_allclose(calibration(scores[:9]), expit(facts["a"] * scores[:9] + facts["b"]), rtol=1e-6)
    assert facts["auc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-4)
    assert (facts["positives"], facts["others"]) == (500, 20_000)


def test_labels_do_not_depend_on_the_teachers_unit():
    cosine, _ = calibrate(POSITIVES, OTHERS)
    logits, _ = calibrate(POSITIVES * 40 - 25, OTHERS * 40 - 25)
    np.testing.assert_allclose(logits(POSITIVES * 40 - 25), cosine(POSITIVES), atol=1e-4)


def test_labels_stay_inside_the_interval_and_a_faultless_teacher_stays_finite():
    calibration, facts = calibrate(np.full(50, 9.0) + rng.random(50), np.full(50, -9.0) + rng.random(50))
    assert np.isfinite(facts["a"]) and facts["auc"] == 1
    labels = calibration(np.array([-1e9, -9, 9, 1e9]))
    assert labels.dtype == np.float32 and labels.min() >= np.float32(LABEL_FLOOR) and labels.max() < 1


@pytest.mark.parametrize(
    ("positives", "others", "message"),
    [
        ([0.9, np.nan], [0.1, 0.2], "NaN"),
        ([0.9, np.inf], [0.1, 0.2], "infinite"),
        ([0.5, 0.5], [0.5, 0.5], "cannot tell documents apart"),
        ([0.1, 0.2], [0.8, 0.9], "run against the labels"),
        ([], [0.8, 0.9], "calibration needs both"),
        ([0.8], [], "calibration needs both"),
    ],
)
def test_teachers_that_cannot_be_calibrated_are_refused(positives, others, message):
    with pytest.raises(InputError, match=message):
        calibrate(np.array(positives), np.array(others))


def test_flat_and_one_hot_rows_of_unequal_length():
    labels = np.array([0.5, 0.52, 0.9999, 0.01, 0.01, 0.9, 0.5, 0.7], np.float32)
    found = count_flat_and_one_hot(labels, np.array([0, 2, 5, 7]))
    assert found == {"flat_rows": 1, "one_hot_rows": 1}  # the last row has one document: neither


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory):
    import torch
    from sentence_transformers import CrossEncoder
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "cross-encoder"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefghijklmnop"]
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(
        vocab_size=len(words), max_position_embeddings=64, num_labels=1, initializer_range=0.5, **sizes
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder, CrossEncoder(str(folder))


def test_batched_cross_encoder_scores_are_those_of_single_pairs(cross_encoder, tmp_path):
    folder, model = cross_encoder
    import torch

    letters = list("abcdefghijklmnop")
    queries = [" ".join(rng.choice(letters, length)) for length in (1, 3, 6)]
    documents = [" ".join(rng.choice(letters, length)) for length in (2, 30, 9, 4)]
    pairs = np.array([(query, document) for query in range(3) for document in range(4)])
    teacher = Teacher(kind="cross_encoder", model=str(folder), batch_tokens=40)
    scores = PairScorer(teacher, tmp_path, queries, documents)(pairs, tmp_path / "teacher.npy")
    raw = torch.nn.Identity()
    alone = [model.predict([(queries[query], documents[document])], activation_fn=raw)[0] for query, document in pairs]
    assert np.std(alone) > 0.01
    np.testing.assert_allclose(scores, alone, atol=1e-5)


def test_calibration_constants_are_all_that_a_later_step_needs():
    np.testing.assert_allclose(Calibration(2.0, -1.0)(np.array([0.5])), [0.5])
