import numpy as np
import pytest

from deltapref_jax.config import DIMENSIONS
from deltapref_jax.judging.exact import rate_exactly
from deltapref_jax.records import digest
from deltapref_jax.synthetic.rate import rate
from deltapref_jax.synthetic.world import meta, problem, solution

PROBLEMS = [problem("chain", 2, 0, i) for i in range(8)]
METAS, TRACES = [meta(p) for p in PROBLEMS], [solution(p, error_rate=0.4) for p in PROBLEMS]
IDS = [digest(i) for i in range(8)]


def rated(noise=0.7, seed=1, dimensions=DIMENSIONS, which=range(8)):
    return rate_exactly(
        [METAS[i] for i in which],
        [TRACES[i] for i in which],
        [IDS[i] for i in which],
        dimensions,
        noise,
        seed,
    )


def test_without_noise_it_is_the_exact_rating():
    want = [[rate(p, t)[d] for d in DIMENSIONS] for p, t in zip(PROBLEMS, TRACES, strict=True)]
    np.testing.assert_array_equal(rated(noise=0.0).expectation, want)


def test_noise_depends_on_seed_trace_and_dimension_only():
    whole = rated()
    order = [5, 2, 7]
    some = rated(dimensions=("signal_to_noise", "factuality"), which=order)
    np.testing.assert_array_equal(some.expectation, whole.expectation[order][:, [4, 0]])
    assert (rated(seed=2).expectation != whole.expectation).mean() > 0.5
    same = rate_exactly(METAS[:1] * 2, TRACES[:1] * 2, [IDS[0], IDS[1]], DIMENSIONS, 0.7, 1)
    assert (same.expectation[0] != same.expectation[1]).any()


def test_noise_is_normal_with_its_deviation():
    n = 2000
    empty = rate_exactly(
        METAS[:1] * n,
        ["1. 1 + 1 = 2\n1. 1 + 1 = 3"] * n,
        [digest("n", i) for i in range(n)],
        ("numerical_precision",),
        0.3,
        0,
    ).expectation[:, 0]
    assert abs(empty.mean() - 3.0) < 4 * 0.3 / n**0.5
    assert abs(empty.std() - 0.3) < 4 * 0.3 / (2 * n) ** 0.5


def test_the_distributions_expectation_is_the_rating():
    for r in (rated(), rated(noise=0.0), rated(noise=50.0)):
        labels = np.arange(1, 6)
        assert ((r.expectation >= 1) & (r.expectation <= 5)).all()
        np.testing.assert_allclose(r.distribution.sum(-1), 1.0)
        assert (r.distribution >= 0).all()
        np.testing.assert_allclose(r.distribution @ labels, r.expectation)
        variance = r.distribution @ labels**2 - (r.distribution @ labels) ** 2
        np.testing.assert_allclose(r.spread, np.sqrt(np.maximum(variance, 0)), atol=1e-6)
        assert (r.mass == 1).all()


@pytest.mark.parametrize("trace", ["", "garbage", "1. = ="])
def test_any_text_is_rated(trace):
    assert rate_exactly(METAS[:1], [trace], IDS[:1], DIMENSIONS, 0.0, 0).expectation.min() >= 1
