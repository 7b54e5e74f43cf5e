"""The pure pieces of `benchmarks/federated_experiments.py`, against closed forms and the library's law."""

import pathlib
import sys

import numpy as np
import pytest

from ergodica.run.federated_law import ClientSteps, federated_law

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True, scope="module")
def _benchmarks_on_the_path():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


def test_labels_are_spread_evenly_at_large_concentrations_and_hardly_at_small_ones():
    from federated_parts.common import label_skew, total_variation

    labels = np.random.default_rng(0).integers(10, size=2000)
    even, uneven = (label_skew(np.random.default_rng(1), labels, 10, c) for c in (1e5, 0.02))
    assert np.bincount(even, minlength=10).std() < 10
    assert total_variation(labels, even) < 0.02
    assert total_variation(labels, uneven) > 0.6


def test_total_variation_of_two_clients_with_a_label_each_is_a_half():
    from federated_parts.common import total_variation

    client = np.repeat([0, 1], 50)
    assert total_variation(client, client) == pytest.approx(0.5)
    assert total_variation(np.tile([0, 1], 50), client) == pytest.approx(0)


def test_moments_have_the_errors_of_independent_chains():
    from federated_parts.common import moments

    x = np.random.default_rng(2).normal(3.0, 2.0, size=(400, 50, 3))
    found = moments(x)
    n = x.shape[0] * x.shape[1]
    np.testing.assert_allclose(found["mean_se"], 2 / np.sqrt(n), rtol=0.2)
    np.testing.assert_allclose(found["sd_se"], 2 / np.sqrt(2 * n), rtol=0.2)
    assert np.all(np.abs(found["mean"] - 3) < 5 * found["mean_se"])
    assert np.all(np.abs(found["sd"] - 2) < 5 * found["sd_se"])


@pytest.mark.parametrize("method", ["DSGLD", "FSGLD"])
def test_the_closed_form_of_the_blobs_is_the_law_of_random_affine_maps(method):
    """One coordinate, from the data: what the page prints beside the measured sds is not the library's own number twice."""
    from federated_parts import blobs

    x = np.asarray(blobs.shards().rows, float).reshape(blobs.CLIENTS, blobs.ROWS, 2)[..., 0]
    total, h = blobs.CLIENTS * blobs.ROWS, blobs.STEP_SIZE
    precision = blobs.PRIOR_PRECISION + total
    pull = total * (x.mean(1) if method == "DSGLD" else np.full(blobs.CLIENTS, x.mean()))
    noise = 2 * h + h**2 * total**2 * x.var(1) / blobs.BATCH
    clients = ClientSteps(np.full((blobs.CLIENTS, 1, 1), 1 - h * precision), h * pull[:, None], noise[:, None, None])
    expected = blobs.scalar_law(blobs.PRIOR_PRECISION, blobs.BLOB_VARIANCE)[method]
    for steps, ratio in zip(blobs.LOCAL_STEPS, expected, strict=True):
        law = federated_law(clients, np.full(blobs.CLIENTS, 1 / blobs.CLIENTS), steps)
        assert np.sqrt(law.visits.covariance[0, 0] * precision) == pytest.approx(ratio, rel=1e-6)


def test_taking_the_papers_step_for_the_projects_would_be_seen(monkeypatch):
    """The paper's h is twice the project's; with it FSGLD's sd over the posterior's is 1.96 and not 1.54."""
    from federated_parts import blobs

    right = blobs.scalar_law(blobs.PRIOR_PRECISION, blobs.BLOB_VARIANCE)
    monkeypatch.setattr(blobs, "STEP_SIZE", 2 * blobs.STEP_SIZE)
    wrong = blobs.scalar_law(blobs.PRIOR_PRECISION, blobs.BLOB_VARIANCE)
    for method in ("DSGLD", "FSGLD"):
        assert wrong[method][0] > 1.1 * right[method][0]


def test_similar_pairs_show_one_digit_and_two_pictures():
    from federated_parts.metric import pairs_of

    label = np.repeat([3, 8], 20)
    z = np.arange(40.0)[:, None] + 1000 * (label == 8)[:, None]  # all differ; classes are 1000 apart
    pairs = pairs_of(np.random.default_rng(0), z, label, 60)
    distance = np.sqrt(pairs["z"][:, 0])
    assert pairs["similar"].sum() == 30
    assert np.all((distance > 900) == (pairs["similar"] == 0))
    assert distance.min() >= 1


def test_what_is_not_finite_is_stored_as_none():
    from federated_experiments import rounded

    assert rounded({"a": [1.23456789, float("nan"), float("-inf")], "b": "text"}) == {
        "a": [1.23457, None, None],
        "b": "text",
    }
