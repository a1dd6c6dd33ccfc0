import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataset_builders.mine import count_by_bin, select_negatives, spread_over_bins

label = st.floats(0.01, 0.99)


@given(
    st.lists(st.tuples(label, st.booleans()), max_size=30),
    label,
    st.floats(0.1, 1),
    st.integers(1, 8),
    st.sampled_from(["top", "random"]),
)
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


def test_the_margin_keeps_what_lies_below_it():
    # the published sentence says the opposite: candidates below the threshold would be thrown away
    assert select_negatives(np.array([0.76, 0.75, 0.1]), 0.8, margin=0.95).tolist() == [1, 2]


def test_raw_scores_are_refused():
    with pytest.raises(ValueError, match="calibrate"):
        select_negatives(np.array([-3.0, -5.0]), -2.0)


def test_random_draws_evenly():
    labels, counts = np.linspace(0.1, 0.5, 10), np.zeros(10)
    for seed in range(2000):
        draw = select_negatives(labels, 0.9, num_negatives=3, strategy="random", rng=np.random.default_rng(seed))
        counts[draw] += 1
    assert counts.min() > 500 and counts.max() < 700  # 600 expected, standard deviation 20


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
