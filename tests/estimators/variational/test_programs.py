"""Programs as users write them: choices and their errors, autoguides, subsampled plates, masks, baselines that learn."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO, autoguide

import ergodica as erg
from ergodica.core import tree
from ergodica.estimators import (
    ELBO,
    IWELBO,
    Enumerate,
    LeaveOneOut,
    MovingAverage,
    Network,
    Reparam,
    Score,
    SiteError,
    VariationalGradient,
    expectation_gradient,
)
from tests.support.exact_programs import CASES
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def plan(loss, case):
    return {row.site: row for row in loss.plan(case.model, case.guide, *case.args).rows}


def replicates(loss, params, model, guide, *args, num_repeats=8_000):
    def one(key):
        return tree.ravel(jax.grad(lambda p: -loss.loss(key, p, model, guide, *args))(params))

    keys = jax.random.split(jax.random.key(2), num_repeats)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(keys))


# --- choices -------------------------------------------------------------------------------------------------------


def test_rule_and_precedence():
    case = CASES["mixed"]()
    rows = plan(ELBO(2), case)
    assert {name: row.estimator for name, row in rows.items()} == {
        "z": "Enumerate()",
        "w": "Reparam()",
        "c": "Enumerate()",
    }
    assert rows["c"].terms == ("log p(c)", "log p(x)", "-log q(c)")
    rows = plan(ELBO(2, {"*": LeaveOneOut(), "w": "auto"}), case)
    assert {name: row.estimator for name, row in rows.items()} == {
        "z": "LeaveOneOut()",
        "w": "Reparam()",
        "c": "LeaveOneOut()",
    }
    assert plan(IWELBO(2), case)["z"].estimator == "VIMCO()"


def test_a_site_can_say_it_itself_and_sites_come_first():
    def model():
        numpyro.sample("z", dist.Bernoulli(0.3))

    def guide():
        numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.array(0.1))), infer={"gradient": Score()})

    assert ELBO(2).plan(model, guide).rows[0].estimator == "Score()"
    assert ELBO(2, {"*": LeaveOneOut()}).plan(model, guide).rows[0].estimator == "Score()"
    assert ELBO(2, {"z": LeaveOneOut()}).plan(model, guide).rows[0].estimator == "LeaveOneOut()"


def test_explain_says_what_it_does(capsys):
    case = CASES["plated"]()
    ELBO(3, {"z": LeaveOneOut()}).explain(case.model, case.guide, *case.args)
    printed = capsys.readouterr().out
    assert "3 particles: 9 runs of model and guide a step; the gradient is unbiased" in printed
    assert "named in sites" in printed
    assert "3 values can be summed over" in printed


def _large(size):
    def model():
        b = numpyro.sample("b", dist.Bernoulli(0.5).expand([size]))
        numpyro.factor("f", jnp.sum(1.0 * b) ** 2)

    def guide():
        numpyro.sample("b", dist.Bernoulli(logits=numpyro.param("l", jnp.zeros(size))))

    return model, guide


def _mixture():
    law = dist.MixtureSameFamily(
        dist.Categorical(logits=jnp.stack([numpyro.param("t", jnp.array(0.3)), jnp.array(0.0)])),
        dist.Normal(jnp.array([-1.0, 1.5]), 0.6),
    )
    numpyro.sample("w", law)


def _normal_model():
    numpyro.sample("w", dist.Normal(0.0, 1.0))


def test_joint_elements_are_counted_and_refused():
    assert ELBO(2).plan(*_large(4)).rows[0].estimator == "Enumerate()"
    assert ELBO(2).plan(*_large(5)).rows[0].estimator == "LeaveOneOut()"
    with pytest.raises(SiteError, match=r"depend on 20 of its elements jointly, which needs 2\^20 runs"):
        ELBO(2, {"b": Enumerate()}).plan(*_large(20))


def test_errors_say_what_to_do():
    case, (model, guide) = CASES["mixed"](), _large(20)
    with pytest.raises(ValueError, match="sites names 'y', which the guide does not draw; it draws 'z', 'w', 'c'"):
        plan(ELBO(2, {"y": Score()}), case)
    with pytest.raises(
        SiteError, match=r"num_particles=1 there are no other particles for a baseline\. Raise num_particles"
    ):
        ELBO(1).plan(model, guide)
    with pytest.raises(SiteError, match=r"site 'w' \(MixtureSameFamily.*NumPyro has no reparameterisation of it"):
        ELBO(2, {"w": Reparam()}).plan(_normal_model, _mixture)
    with pytest.raises(SiteError, match="is no mean over particles"):
        plan(IWELBO(2, {"z": Enumerate()}), case)
    with pytest.raises(ValueError, match=r"The model draws 'w'.*Draw it in the guide, observe it, or sum it out"):
        ELBO(2).plan(_normal_model, lambda: None)
    with pytest.raises(ValueError, match="The guide draws 'w', which the model does not draw"):
        ELBO(2).plan(lambda: None, _normal_model)
    with pytest.raises(ValueError, match=r"shape \(3,\) in the guide and \(\) in the model"):
        ELBO(2).plan(_normal_model, lambda: numpyro.sample("w", dist.Normal(jnp.zeros(3), 1.0)))
    with pytest.raises(TypeError, match="baseline must be a number"):
        Score("mean")
    with pytest.raises(ValueError, match="decay must be above 0 and below 1"):
        MovingAverage(1.5)
    with pytest.raises(ValueError, match=r"f must return a scalar; got shape \(2,\)"):
        expectation_gradient(jax.random.key(0), jnp.zeros(2), lambda p: dist.Normal(p, 1.0), lambda x: x)


def test_doubly_reparameterised_sites_that_would_be_wrong_are_refused():
    case, stl = CASES["mixed-chain"](), Reparam(stl=True)
    with pytest.raises(SiteError, match="its law depends on w, which is doubly reparameterised"):
        plan(IWELBO(2, {"w": stl}), case)
    with pytest.raises(SiteError, match=r"is doubly reparameterised .* and this site is not"):
        plan(IWELBO(2, {"u": stl, "w": Reparam()}), CASES["continuous"]())

    def guide():
        place = numpyro.sample("place", dist.Delta(numpyro.param("m", jnp.array(0.2))))
        numpyro.sample("w", dist.Normal(place, 1.0))

    def model():
        numpyro.sample("place", dist.Normal(0.0, 1.0))
        _normal_model()

    gradient = VariationalGradient(IWELBO(2, {"w": stl}), model, guide)
    with pytest.raises(SiteError, match="point mass 'place' of the guide is placed by parameters"):
        gradient.estimate(jax.random.key(0), {"m": jnp.array(0.2)}, {})


class _OneWay(dist.transforms.Transform):
    """A transformation without an inverse."""

    domain = codomain = dist.constraints.real

    def __call__(self, x):
        return x + 0.1 * jnp.sin(x)

    def _inverse(self, y):
        raise NotImplementedError

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.log(1 + 0.1 * jnp.cos(x))

    def tree_flatten(self):
        return (), ((), {})


def test_flows_without_an_inverse():
    """Their own draws are fine; sticking the landing is not."""

    def guide():
        numpyro.sample(
            "w", dist.TransformedDistribution(dist.Normal(numpyro.param("m", jnp.array(0.1)), 1.0), _OneWay())
        )

    def loss(estimator):
        return ELBO(2, {"w": estimator}).loss(jax.random.key(0), {"m": jnp.array(0.1)}, _normal_model, guide)

    assert jnp.isfinite(loss(Reparam()))
    with pytest.raises(SiteError, match=r"'w' .* needs the inverse of a transformation that has none"):
        loss(Reparam(stl=True))


# --- laws that NumPyro gets wrong ----------------------------------------------------------------------------------


def test_mixture_guide_is_right_here_and_wrong_in_trace_elbo():
    """The gradient of KL(mixture, normal) by its logit, by quadrature on a line. Sees 5%."""
    grid = jnp.linspace(-9.0, 9.0, 4001)

    def exact(t):
        weight = jax.nn.sigmoid(t)
        parts = [jnp.exp(dist.Normal(m, 0.6).log_prob(grid)) for m in (-1.0, 1.5)]
        q = weight * parts[0] + (1 - weight) * parts[1]
        return jnp.sum(q * (dist.Normal(0.0, 1.0).log_prob(grid) - jnp.log(q))) * (grid[1] - grid[0])

    reference, params = np.array([jax.grad(exact)(0.3)]), {"t": jnp.array(0.3)}
    assert_mean(replicates(ELBO(4), params, _normal_model, _mixture), reference, smallest_error=0.15)
    theirs = replicates(Trace_ELBO(4), params, _normal_model, _mixture)
    assert np.max(np.abs(z_scores(theirs, reference))) > REJECTION


@pytest.mark.parametrize(
    "law", [dist.Bernoulli, lambda logits: dist.Binomial(3, logits=logits)], ids=["bit", "binomial"]
)
def test_logits_of_zero_have_the_right_derivative(law):
    """Where most runs start. The score at 0, by enumeration and by hand; NumPyro's own densities have another there."""
    from ergodica.estimators.variational.density import log_density

    total = float(law(logits=jnp.array(0.0)).enumerate_support()[-1])
    for value in (0, 1):

        def score(density, value=value):
            wrapped = lambda l: density(law(logits=l).expand([2]).to_event(1), jnp.array([value, value]))  # noqa: E731
            return float(jax.grad(wrapped)(jnp.array(0.0)))

        assert score(log_density) == pytest.approx(2 * (value - total / 2), abs=1e-12)
        assert score(lambda fn, v: fn.log_prob(v)) != pytest.approx(2 * (value - total / 2), abs=0.1)


def _subsampled(full, size):
    x = jnp.array([0.2, 1.3, -0.4, 0.9])

    def model():
        with numpyro.plate("data", full, subsample_size=size) as index:
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=x[index])

    def guide():
        logits = numpyro.param("logits", jnp.zeros(full))
        with numpyro.plate("data", full, subsample_size=size) as index:
            numpyro.sample("z", dist.Bernoulli(logits=logits[index]))

    return model, guide


def test_subsampled_plates_are_scaled_once():
    """Against the whole plate, enumerated; NumPyro's TraceGraph_ELBO scales the score twice. Sees 20%."""
    params = {"logits": jnp.array([0.3, -0.2, 0.5, 0.0])}
    exact = replicates(ELBO(1), params, *_subsampled(4, 4), num_repeats=1)[0]
    part = _subsampled(4, 2)
    for loss in (ELBO(2, {"z": LeaveOneOut()}), ELBO(1, {"z": Enumerate()}), IWELBO(1, {"z": Score(-1.0)})):
        assert_mean(replicates(loss, params, *part), exact, smallest_error=0.2)
    wrong = replicates(TraceGraph_ELBO(2), params, *part)
    assert np.max(np.abs(z_scores(wrong, exact))) > REJECTION


def test_masked_elements_are_drawn_all_the_same():
    """The guide's mask takes -log q out of the objective, not the value's law. Exact by enumeration."""

    def model():
        z = numpyro.sample("z", dist.Bernoulli(0.4))
        numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=0.9)

    def guide():
        with numpyro.handlers.mask(mask=False):
            numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("l", jnp.array(0.3))))

    def exact(l):
        p = jax.nn.sigmoid(l)
        terms = [dist.Bernoulli(0.4).log_prob(z) + dist.Normal(1.0 * z, 0.8).log_prob(0.9) for z in (0, 1)]
        return (1 - p) * terms[0] + p * terms[1]

    reference, params = np.array([jax.grad(exact)(0.3)]), {"l": jnp.array(0.3)}
    np.testing.assert_allclose(replicates(ELBO(1), params, model, guide, num_repeats=1)[0], reference, rtol=1e-12)
    assert_mean(replicates(ELBO(2, {"z": LeaveOneOut()}), params, model, guide), reference, smallest_error=0.1)


# --- autoguides, state, parameters ---------------------------------------------------------------------------------


def _regression(x, y):
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
    with numpyro.plate("data", x.shape[0]):
        numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


REGRESSION = (jnp.array([[1.0, 0.2], [0.3, -1.0], [-0.7, 0.5]]), jnp.array([0.9, -0.6, 0.1]))
AUTOGUIDES = ["AutoNormal", "AutoDiagonalNormal", "AutoMultivariateNormal", "AutoDelta", "AutoIAFNormal"]


@pytest.mark.parametrize("name", AUTOGUIDES)
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


@pytest.mark.parametrize("name", ["AutoNormal", "AutoDiagonalNormal"])
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
