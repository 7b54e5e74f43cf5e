"""`compare_gradients` on variational objectives: NumPyro's wrong gradients, biased sites, budgets, subsamples, memories."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

import ergodica as erg
from ergodica.estimators import (
    ELBO,
    IWELBO,
    Enumerate,
    GumbelSoftmax,
    LeaveOneOut,
    MovingAverage,
    MuProp,
    Score,
    StraightThrough,
    VariationalGradient,
)

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def bit_model():
    b = numpyro.sample("b", dist.Multinomial(1, probs=jnp.array([0.6, 0.4])))
    numpyro.factor("cost", 2.0 * (b[0] - 0.2) ** 3 + b[1])


def bit_guide():
    logit = numpyro.param("logit", jnp.array(0.3))
    numpyro.sample("b", dist.Multinomial(1, logits=jnp.stack([logit, jnp.zeros_like(logit)])))


def mixture_model():
    w = numpyro.sample("w", dist.Normal(0.5, 1.5))
    numpyro.factor("cost", jnp.sin(w))


def mixture_guide():
    logit = numpyro.param("logit", jnp.array(0.3))
    parts = dist.Normal(numpyro.param("loc", jnp.array([-1.0, 1.5])), 0.6)
    numpyro.sample("w", dist.MixtureSameFamily(dist.Categorical(logits=jnp.stack([logit, 0.0 * logit])), parts))


def verdicts(table, j=0):
    return dict(zip(table.estimator.values.tolist(), table.verdict.isel(point=j).values.tolist(), strict=True))


def gradients(model, guide, **losses):
    return {name: VariationalGradient(loss, model, guide) for name, loss in losses.items()}


@pytest.mark.sweep
def test_numpyros_wrong_gradients_of_mixtures_are_flagged():
    """At default settings; every bias of more than 5% is found, and the ELBO's exact gradient is found by quadrature."""
    estimators = gradients(
        mixture_model, mixture_guide, trace=Trace_ELBO(8), graph=TraceGraph_ELBO(8), ours=ELBO(8, {"w": LeaveOneOut()})
    )
    params = {"logit": jnp.array(0.3), "loc": jnp.array([-1.0, 1.5])}
    table = erg.compare_gradients(jax.random.key(0), estimators, params, num_timings=0)
    assert table.attrs["reference"] == "exact"
    assert verdicts(table) == {"trace": "biased", "graph": "unbiased", "ours": "unbiased"}
    assert table.relative_bias.sel(estimator="trace").item() > 0.5
    assert set(table.control.values.ravel()) == {"found"}
    assert table.derivative_evaluations.sel(point=0).values.tolist() == [8.0, 0.0, 0.0]
    assert table.value_evaluations.sel(point=0).values.tolist() == [8.0, 8.0, 8.0]


def test_numpyros_bound_of_discrete_guides_is_flagged():
    estimators = gradients(bit_model, bit_guide, ours=IWELBO(2), renyi=RenyiELBO(0, 2))
    table = erg.compare_gradients(jax.random.key(1), estimators, {"logit": jnp.array(0.3)}, num_timings=0)
    assert verdicts(table)["ours"] != "biased"
    assert verdicts(table)["renyi"] == "biased"


def test_biased_sites_are_flagged_and_measured():
    """Straight-through takes two values, so that its bias is known exactly; relaxations are flagged; unbiased ones are not."""
    estimators = gradients(
        bit_model,
        bit_guide,
        exact=ELBO(1, {"b": Enumerate()}),
        straight=ELBO(8, {"b": StraightThrough()}),
        relaxed=ELBO(8, {"b": GumbelSoftmax(1.0)}),
        muprop=ELBO(8, {"b": MuProp()}),
    )
    with pytest.raises(ValueError, match="has the name 'exact', which is what reference='exact' stands for"):
        erg.compare_gradients(jax.random.key(2), estimators, {"logit": jnp.array(0.3)})
    estimators["sum"] = estimators.pop("exact")
    params = {"logit": jnp.array(0.3)}
    table = erg.compare_gradients(jax.random.key(2), estimators, params, num_timings=0)
    assert verdicts(table) == {"straight": "biased", "relaxed": "biased", "muprop": "unbiased", "sum": "unbiased"}
    straight = VariationalGradient(ELBO(1, {"b": StraightThrough()}), bit_model, bit_guide)
    keys = jax.random.split(jax.random.key(3), 64)
    values = np.unique(np.round(jax.vmap(lambda k: straight.estimate(k, params, {})[0].gradient["logit"])(keys), 12))
    assert len(values) == 2
    q = 1 / (1 + np.exp(-0.3))
    exact = table.reference.item()
    candidates = [values @ [q, 1 - q] - exact, values @ [1 - q, q] - exact]
    cell = table.sel(estimator="straight", point=0)
    assert min(abs(c - cell.bias.item()) for c in candidates) < 5 * cell.standard_error.item()
    np.testing.assert_allclose(cell.relative_bias, abs(cell.bias.item() / exact), rtol=1e-3)
    assert cell.mse > cell.variance
    assert table.derivative_evaluations.sel(estimator="sum").item() == 0
    assert table.derivative_evaluations.sel(estimator="straight").item() == 8


@pytest.mark.sweep
def test_equal_budgets():
    """Particles are chosen so that all run the program as often, twice for each of the enumerated bit's."""
    estimators = gradients(
        bit_model, bit_guide, sum=ELBO(1, {"b": Enumerate()}), score=ELBO(1, {"b": Score()}), graph=TraceGraph_ELBO(1)
    )
    params = {"logit": jnp.array(0.3)}
    table = erg.compare_gradients(jax.random.key(4), estimators, params, budget=12, num_repeats=2000, num_timings=0)
    assert table.datum_gradients.values.ravel().tolist() == [12.0, 12.0, 12.0]
    one = erg.compare_gradients(jax.random.key(4), estimators, params, num_repeats=2000, num_timings=0)
    ratio = (one.variance / table.variance).sel(estimator="score").item()
    assert 10 < ratio < 14.5
    with pytest.raises(ValueError, match=r"budget=12 cannot be given to estimators\['bound'\], a VariationalGradient"):
        erg.compare_gradients(jax.random.key(4), gradients(bit_model, bit_guide, bound=IWELBO(2)), params, budget=12)


DATA = np.array([1.0, -0.5, 2.0, 0.3, 0.7, -1.1])


@pytest.mark.sweep
def test_variance_of_data_and_of_sampling():
    """A subsampled plate, closed forms: N² σ²/n (N-n)/(N-1) and (N + 1)²."""

    def model(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 6, subsample_size=2) as i:
            numpyro.sample("x", dist.Normal(w, 1.0), obs=x[i])

    def guide(x):
        numpyro.sample("w", dist.Normal(numpyro.param("loc", jnp.array(0.2)), 1.0))

    estimators = {
        name: VariationalGradient(loss, model, guide, jnp.asarray(DATA))
        for name, loss in {"ours": ELBO(1), "numpyro": Trace_ELBO(1)}.items()
    }
    table = erg.compare_gradients(
        jax.random.key(5), estimators, {"loc": jnp.array(0.2)}, num_repeats=8000, num_timings=0, split_variance=True
    )
    assert table.attrs["reference"] == "pooled"
    for part, exact in (("data", 36 * DATA.var() / 2 * 4 / 5), ("sampling", 49.0)):
        assert (table[f"variance_{part}_lower"] < exact).all()
        assert (table[f"variance_{part}_upper"] > exact).all()
        assert (table[f"variance_{part}_upper"] - table[f"variance_{part}_lower"] < 0.25 * 60).all()


def test_state_learned_on_the_same_samples_is_biased():
    """A moving average that includes the sample itself, with weight 1/5, shrinks the gradient by a fifth; frozen it does not."""
    loss = ELBO(1, {"b": Score(baseline=MovingAverage(0.8))})
    estimators = gradients(bit_model, bit_guide, average=loss)
    params = {"logit": jnp.array(0.3)}
    found = {
        state: erg.compare_gradients(
            jax.random.key(6), estimators, params, num_timings=0, num_repeats=8000, state=state, warmup=warmup
        )
        for state, warmup in (("fresh", 0), ("frozen", 50), ("same samples", 50))
    }
    assert ["biased" in verdicts(table).values() for table in found.values()] == [False, False, True]
    assert found["frozen"].verdict.item() == "unbiased"
    cell = found["same samples"].isel(estimator=0, point=0)
    assert abs(cell.bias.item() + 0.2 * cell.reference.item()) < 5 * cell.standard_error.item()
    assert (found["frozen"].variance < found["fresh"].variance).all()
    with pytest.raises(ValueError, match="needs warmup"):
        erg.compare_gradients(jax.random.key(6), estimators, params, state="frozen")


@pytest.mark.sweep
def test_common_random_numbers_shorten_the_interval_of_a_ratio():
    """Two constant baselines: nearly the same noise."""
    estimators = gradients(bit_model, bit_guide, one=ELBO(2, {"b": Score(0.4)}), other=ELBO(2, {"b": Score(0.6)}))
    lengths = []
    for common in (False, True):
        table = erg.compare_gradients(
            jax.random.key(7),
            estimators,
            {"logit": jnp.array(0.3)},
            num_repeats=2000,
            num_timings=0,
            common_random_numbers=common,
        )
        other = table.sel(estimator="other", point=0)
        lengths.append(np.log(other.variance_ratio_upper / other.variance_ratio_lower).item())
    assert lengths[1] < 0.7 * lengths[0]
