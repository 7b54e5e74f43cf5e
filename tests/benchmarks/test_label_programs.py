"""Identities that the programs of the label benchmarks must have, and whether what a page draws is complete."""

import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core import tree
from ergodica.estimators import ELBO, Enumerate

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.usefixtures("numpyro_promotion")


@pytest.fixture(autouse=True)
def _benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield
    for name in ("semi_supervised", "mixture_labels"):
        sys.modules.pop(name, None)


def gradients(loss, params, programs, *args):
    """One compiled program for all of them."""

    def value(params, model, guide, options):
        return loss.loss(jax.random.key(0), params, model, guide, *args, **options)

    def all_of_them(params):
        return [jax.value_and_grad(value)(params, *program) for program in programs]

    return [(float(v), np.asarray(tree.ravel(g))) for v, g in jax.jit(all_of_them)(params)]


@pytest.mark.slow
def test_exact_divergence_is_what_the_sum_over_classes_gives():
    import semi_supervised as s

    sizes = s.Sizes(pixels=5, classes=3, hidden=4, code=2)
    generator = np.random.default_rng(0)
    x, labelled = (jnp.asarray(generator.random((4, 5)) < 0.5, jnp.float32) for _ in range(2))
    programs = [(s.model, s.guide, {"exact": exact}) for exact in (False, True)]
    params = s.initial(jax.random.key(1), sizes)
    (a, da), (b, db) = gradients(
        ELBO(1, {"y": Enumerate()}), params, programs, x, labelled, jnp.array([0, 1, 2, 0]), sizes
    )
    assert a == pytest.approx(b, rel=1e-5)
    np.testing.assert_allclose(da, db, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_labels_that_know_the_clusters_give_the_marginal_bound():
    """And labels with probabilities of their own a lower one, at any parameters."""
    import mixture_labels as m

    x = m.cars()[::20]
    params = {"share_counts": jnp.array([20.0, 5.0, 9.0]), "centre_loc": m.START, "centre_scale": jnp.full((3, 2), 0.2)}
    params |= {"spread_loc": jnp.full((3, 2), -0.8), "spread_scale": jnp.full((3, 2), 0.2)}
    params |= {"label_logits": m.start_of_labels(x)}
    programs = [(m.marginal_model, m.marginal_guide, {}), (m.model, m.knowing_guide, {}), (m.model, m.guide, {})]
    (summed, by_hand), (known, enumerated), (own, _) = gradients(ELBO(4), params, programs, x)
    assert known == pytest.approx(summed, rel=1e-5)  # the draws of the clusters are the same
    np.testing.assert_allclose(enumerated, by_hand, rtol=1e-3, atol=1e-3)
    assert own > summed + 1.0


def test_stored_runs_are_complete():
    import semi_supervised as s

    record = json.loads((BENCHMARKS / "results" / "semi_supervised.json").read_text())
    runs = record["training"]["digits"]["runs"]
    assert runs.keys() == {s.SUPERVISED, *s.METHODS}
    assert len({tuple(r) for r in runs.values()}) == 1  # the same seeds for all
    assert {row["method"] for row in record["bias"]["rows"]} == s.METHODS.keys()
    assert isinstance(record["timing"]["machine_was_shared"], bool)
    assert set(record["timing"]["classes"]) == {"10", "100"}
