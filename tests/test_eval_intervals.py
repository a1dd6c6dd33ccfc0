"""Intervals of a mean over seeds and queries: by hand, scipy's, and what the method says of them."""

import numpy as np
import pytest
from scipy import stats

from eval import intervals
from eval.intervals import METHOD, bootstrap_interval


def test_two_seeds_and_two_queries_by_hand():
    # one seed and one query are drawn each time, so that every cell comes up in a quarter of all resamples
    assert bootstrap_interval(np.array([[0.1, 0.2], [0.3, 0.7]])) == (0.1, 0.7)
    # seeds that agree leave the queries alone: one is drawn, and 2.5 % of the resamples lie below either
    assert bootstrap_interval(np.array([[0.1, 0.7], [0.1, 0.7]])) == (0.1, 0.7)
    assert bootstrap_interval(np.array([[0.5]])) is None


@pytest.mark.parametrize("shape", [(1, 300), (300, 1)], ids=["queries", "seeds"])
def test_along_one_axis_it_is_scipys(shape):
    values = np.random.default_rng(3).gamma(2.0, size=300)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    ours = bootstrap_interval(values.reshape(shape))
    assert ours[0] < values.mean() < ours[1]
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.03 * (theirs.high - theirs.low))


def test_variances_of_seeds_and_queries_add_up(seeds=3):
    """Where scores are a seed's effect plus a query's, the variance of the mean is s_seed^2 / S + s_query^2 / Q."""
    generator = np.random.default_rng(0)
    of_seeds, of_queries = generator.normal(size=seeds), generator.normal(size=400) * 5
    variance = of_seeds.var(ddof=1) / seeds + of_queries.var(ddof=1) / 400
    weights = (intervals._weights(generator, length, 40_000) for length in (seeds, 400))
    by_seed, by_query = next(weights), next(weights)
    resampled = by_seed @ of_seeds + by_query @ of_queries
    assert resampled.var() == pytest.approx(variance, rel=0.03)
    low, high = bootstrap_interval(of_seeds[:, None] + of_queries)
    assert (low, high) == pytest.approx(np.quantile(resampled, [0.025, 0.975]), abs=0.04 * (high - low))


def test_what_the_method_says_of_few_seeds():
    """Two draws of three are both the least one in one of nine: the interval spans the seeds, and misses the truth
    when all of them lie on one side of it.
    """
    of_seeds = np.random.default_rng(2).normal(size=(2000, 3, 1))
    intervals = [bootstrap_interval(seeds, resamples=400) for seeds in of_seeds]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.75, abs=0.03)
    assert "75 % with 3" in METHOD
