"""Programs as users write them: autoguides, state and parameters of baselines, mutable sites, scans."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, autoguide

import ergodica as erg
from ergodica.estimators import (
    ELBO,
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    Network,
    Reparam,
    Score,
    SiteError,
    VariationalGradient,
)
from tests.support.exact_programs import CASES
from tests.support.replicates import replicates
from tests.support.statistics import assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def _regression(x, y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


REGRESSION = (jnp.array([[1.0, 0.2], [0.3, -1.0], [-0.7, 0.5]]), jnp.array([0.9, -0.6, 0.1]))
AUTOGUIDES = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoDelta", "AutoIAFNormal"]


@pytest.mark.parametrize(
    "name", [n if n == "AutoNormal" else pytest.param(n, marks=pytest.mark.sweep) for n in AUTOGUIDES]
)
@pytest.mark.swept_after(1)
def test_autoguides_untouched(name):
    """By rule it is NumPyro's own reparameterised gradient, number by number."""
    guide = getattr(autoguide, name)(_regression)
    svi = SVI(_regression, guide, optax.adam(0.1), Trace_ELBO(3))
    params = svi.get_params(svi.init(jax.random.key(0), *REGRESSION))

    def gradient(loss):
        return jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(3), p, _regression, guide, *REGRESSION)))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), gradient(ELBO(3)), gradient(Trace_ELBO(3))
    )


@pytest.mark.parametrize("name", ["AutoNormal", pytest.param("AutoDiagonalNormal", marks=pytest.mark.sweep)])
@pytest.mark.swept_after(1)
def test_sticking_the_landing_with_autoguides_is_unbiased(name):
    """The difference to the plain gradient, on common random numbers. Sees 10% of the largest entry."""
    guide = getattr(autoguide, name)(_regression)
    svi = SVI(_regression, guide, optax.adam(0.1), Trace_ELBO(1))
    params = svi.get_params(svi.init(jax.random.key(0), *REGRESSION))
    plain, stuck = (
        replicates(ELBO(2, {"*": Reparam(stl=stl)}), params, _regression, guide, *REGRESSION) for stl in (False, True)
    )
    difference = stuck - plain
    noisy = difference.std(axis=0) > 1e-12
    assert noisy.any()
    assert np.max(np.abs(z_scores(difference[:, noisy], 0.0))) < 5
    assert 5 * np.max(difference.std(axis=0)) / np.sqrt(len(plain)) < 0.1 * np.max(np.abs(plain.mean(axis=0)))


@pytest.mark.sweep
def test_moving_average_follows_its_recursion():
    """Two plated elements with costs of their own, three steps by hand."""
    case, decay = CASES["plated"](), 0.8
    loss = ELBO(2, {"c": Score(MovingAverage(decay)), "z": LeaveOneOut()})
    gradient = VariationalGradient(loss, case.model, case.guide, *case.args)
    state = gradient.init(jax.random.key(0), case.params)
    assert state["c"]["mean"].shape == (2,)
    means = []
    for i in range(3):
        _, state = gradient.estimate(jax.random.key(i), case.params, state)
        means.append((np.asarray(state["c"]["mean"]), float(state["c"]["weight"])))
    np.testing.assert_allclose([w for _, w in means], 1 - decay ** np.arange(1, 4), rtol=1e-12)
    alone = VariationalGradient(loss, case.model, case.guide, *case.args)
    fresh = alone.estimate(jax.random.key(2), case.params, alone.init(jax.random.key(0), case.params))[1]
    np.testing.assert_allclose(means[2][0], decay * means[1][0] + np.asarray(fresh["c"]["mean"]), rtol=1e-12)


def test_network_learns_the_cost_and_leaves_the_guides_gradient_unbiased():
    """The fit moves the network alone: its gradient is that of least squares, and the guide's that of the same constant."""
    case = CASES["plated"]()
    network = Network(lambda psi, x: psi["a"] + psi["b"] * x, {"a": jnp.array(-1.0), "b": jnp.array(0.5)})
    loss = ELBO(3, {"c": Score(network), "z": LeaveOneOut()})
    gradient = VariationalGradient(loss, case.model, loss.guide(case.model, case.guide), *case.args)
    params = gradient.start(jax.random.key(0))
    assert set(params) == {*case.params, "c$learned"}
    found = gradient.estimate(jax.random.key(1), params | case.params, {})[0].gradient
    at_once = (
        VariationalGradient(ELBO(3, {"c": Score(-1.0), "z": LeaveOneOut()}), case.model, case.guide, *case.args)
        .estimate(jax.random.key(1), case.params, {})[0]
        .gradient
    )
    np.testing.assert_allclose(found["z_logit"], at_once["z_logit"], rtol=1e-12)
    assert np.max(np.abs(found["c_logits"] - at_once["c_logits"])) > 1e-6
    flat = {"a": jnp.array(-1.0), "b": jnp.array(0.0)}
    same = gradient.estimate(jax.random.key(1), case.params | {"c$learned": flat}, {})[0].gradient
    np.testing.assert_allclose(same["c_logits"], at_once["c_logits"], rtol=1e-12)
    assert abs(float(same["c$learned"]["a"])) > 1e-3


def test_baselines_are_trained_by_svi():
    """Both kinds of declared things, in one compiled loop; the network's constant ends near the mean cost."""
    case = CASES["plated"]()
    network = Network(lambda psi, x: psi, jnp.zeros(()))
    loss = ELBO(4, {"z": Score(MovingAverage(0.9)), "c": Score(network)})
    svi = SVI(case.model, loss.guide(case.model, case.guide), optax.adam(0.02), loss)
    result = svi.run(jax.random.key(0), 600, *case.args, progress_bar=False)
    assert set(result.state.mutable_state) == {"z$remembered"}
    mean = float(result.state.mutable_state["z$remembered"]["mean"])
    late = -float(jnp.mean(result.losses[-100:]))
    assert abs(mean - late) < 0.2 * abs(late)
    assert abs(float(result.params["c$learned"]) - late / 2) < 0.35 * abs(late)


def test_mutable_sites_survive():
    from numpyro.primitives import mutable

    def model():
        numpyro.sample("w", dist.Normal(0.0, 1.0))

    def guide():
        seen = mutable("seen", {"steps": jnp.zeros(())})
        seen["steps"] = seen["steps"] + 1
        numpyro.sample("w", dist.Normal(numpyro.param("m", jnp.array(0.1)), 1.0))

    svi = SVI(model, guide, optax.adam(0.02), ELBO(3, {"w": Reparam(stl=True)}))
    state = svi.init(jax.random.key(0))
    begin = float(state.mutable_state["seen"]["steps"])
    for _ in range(2):
        state, _ = svi.update(state)
    assert float(state.mutable_state["seen"]["steps"]) == begin + 2


@pytest.mark.sweep
@pytest.mark.parametrize("vectorize", [False, lambda f, xs: jax.lax.map(f, xs, batch_size=2)], ids=["map", "own"])
def test_particles_can_be_mapped_otherwise(vectorize):
    case = CASES["plated"]()

    def gradient(loss):
        return jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(0), p, case.model, case.guide, *case.args)))(
            case.params
        )

    sites = {"z": LeaveOneOut()}
    together, mapped = gradient(ELBO(4, sites)), gradient(ELBO(4, sites, vectorize_particles=vectorize))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12), together, mapped)


def test_sites_inside_a_scan():
    """A chain of bits by NumPyro's scan: their score is taken jointly; continuous ones without a reparameterisation are refused."""
    from numpyro.contrib.control_flow import scan

    def model():
        def step(z, _):
            z = numpyro.sample("z", dist.Bernoulli(0.3 + 0.4 * z))
            numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=0.7)
            return 1.0 * z, None

        scan(step, 0.0, jnp.arange(3))

    def guide():
        logits = numpyro.param("l", jnp.zeros(3))

        def step(carry, logit):
            numpyro.sample("z", dist.Bernoulli(logits=logit))
            return carry, None

        scan(step, 0.0, logits)

    params = {"l": jnp.array([0.2, -0.3, 0.4])}
    with pytest.raises(SiteError, match="inside a scan"):
        ELBO(2, {"z": Enumerate()}).plan(model, guide)

    def value(logits):
        p, total = jax.nn.sigmoid(logits), 0.0
        for bits in np.ndindex(2, 2, 2):
            q, log_p, last = 1.0, 0.0, 0.0
            for i, b in enumerate(bits):
                q = q * (p[i] if b else 1 - p[i])
                log_p += dist.Bernoulli(0.3 + 0.4 * last).log_prob(b) + dist.Normal(1.0 * b, 1.0).log_prob(0.7)
                last = 1.0 * b
            total += q * (log_p - jnp.log(q))
        return total

    exact = np.asarray(jax.grad(value)(params["l"]))
    assert_mean(replicates(ELBO(2), params, model, guide), exact, smallest_error=0.3)
    assert erg.estimators.ELBO(2).plan(model, guide).rows[0].estimator == "LeaveOneOut()"
