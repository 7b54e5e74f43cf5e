"""Inclusive divergence as users meet it: what it says of itself, autoguides, what it refuses, and with which words."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, autoguide

from ergodica.estimators import ForwardKL, SiteError, VariationalGradient, WakeSleep
from tests.estimators.variational.test_wake_sleep import dreamer, param
from tests.support.exact_programs import exact_iwelbo
from tests.support.statistics import THRESHOLD

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def test_explain_says_what_is_done(capsys):
    case = dreamer()
    ForwardKL(8).explain(case.model, case.guide, *case.args)
    printed = capsys.readouterr().out
    assert "ForwardKL, 8 particles: 8 runs of model and guide a step; the gradient is biased." in printed
    assert "a bias of order 1 / num_particles" in printed
    assert "estimators of sites are not used" in printed
    assert "self-normalised weights" in printed
    WakeSleep(1, {"x": "x"}, num_dreams=3).explain(case.model, case.guide, *case.args)
    printed = capsys.readouterr().out
    assert "the gradient is unbiased" in printed
    assert "learns from 3 joint draws of the model a step; the model follows ELBO" in printed
    WakeSleep(2, {"x": "x"}, phase="both").explain(case.model, case.guide, *case.args)
    assert "the gradient is biased" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["AutoNormal", pytest.param("AutoDiagonalNormal", marks=pytest.mark.sweep)])
def test_autoguides_take_the_inclusive_divergence_and_no_dreams(name):
    """Where the posterior is normal the guide finds it: here scale and place of a normal, to a few per cent."""

    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 2.0))
        with numpyro.plate("data", 3):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    x = jnp.array([1.0, 2.0, 0.6])
    guide = getattr(autoguide, name)(model)
    optimiser = optax.adam(optax.cosine_decay_schedule(0.05, 1000))
    fit = SVI(model, guide, optimiser, ForwardKL(16)).run(jax.random.key(0), 1000, x, progress_bar=False)
    posterior = guide.get_posterior(fit.params) if name == "AutoDiagonalNormal" else None
    loc, scale = (
        (fit.params["z_auto_loc"], fit.params["z_auto_scale"])
        if posterior is None
        else (posterior.mean[0], jnp.sqrt(posterior.variance[0]))
    )
    np.testing.assert_allclose([loc, scale], [3.6 / 3.25, 3.25**-0.5], rtol=0.06)
    expected = "No density of the guide depends on x" if posterior is None else "the model does not draw it"
    with pytest.raises(ValueError, match=expected):
        WakeSleep(2, {"x": "x"}).plan(model, guide, x)


def test_point_masses_are_refused():
    def model():
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    def guide():
        numpyro.sample("z", dist.Delta(param("m", 0.2)))

    with pytest.raises(SiteError, match="ForwardKL cannot be used with the point mass 'z'"):
        ForwardKL(2).loss(jax.random.key(0), {"m": jnp.array(0.2)}, model, guide)


def test_errors_say_where_data_should_go():
    case = dreamer()

    def plan(observed, model=case.model, guide=case.guide, args=case.args):
        return WakeSleep(1, observed).plan(model, guide, *args)

    with pytest.raises(TypeError, match=r"observed must map names of sites to names of arguments; got None"):
        WakeSleep(2)
    with pytest.raises(ValueError, match="hands several sites to one argument"):
        WakeSleep(2, {"x": "data", "y": "data"})
    with pytest.raises(ValueError, match=r"phase='wake' draws nothing from the model: that is ForwardKL"):
        WakeSleep(2, {"x": "x"}, phase="wake")
    with pytest.raises(ValueError, match="observed names 'y', which the model does not observe; it observes 'x'"):
        plan({"y": "x"})
    with pytest.raises(
        ValueError, match=r"names the argument 'data', which the guide is not called with: it takes 'x'"
    ):
        plan({"x": "data"})
    with pytest.raises(ValueError, match=r"draws shape \(3,\) at 'x', and the argument 'x' holds shape \(4,\)"):
        plan({"x": "x"}, args=(jnp.array([1, 0, 1, 1]),))
    with pytest.raises(TypeError, match=r"observed must return \(args, kwargs\) for the guide"):
        plan(lambda draws, x: draws["x"])

    def two(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)
        numpyro.sample("y", dist.Normal(0.0, 1.0), obs=x)

    def normal(x):
        numpyro.sample("z", dist.Normal(param("m", 0.1) * x, 1.0))

    def with_factor(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.factor("f", x)

    def counted(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    one = (jnp.array(0.3),)
    with pytest.raises(ValueError, match="The model observes 'y' too, which observed does not name"):
        plan({"x": "x"}, two, normal, one)
    with pytest.raises(ValueError, match="The model has the factor 'f', from which nothing can be drawn"):
        plan({"x": "x"}, with_factor, normal, one)
    with pytest.raises(TypeError, match=r"the argument 'x' holds int.*: cast the data"):
        plan({"x": "x"}, counted, normal, (jnp.array(1),))
    with pytest.raises(ValueError, match="No density of the guide depends on x: WakeSleep would fit it to the prior"):
        plan({"x": "x"}, counted, lambda x: numpyro.sample("z", dist.Normal(param("m", 0.1), 1.0)), one)


def test_models_that_cannot_be_drawn_from_are_refused():
    from numpyro.contrib.control_flow import scan

    def guide(x):
        numpyro.sample("z", dist.Normal(param("m", 0.1) * jnp.sum(x), 1.0))

    def improper(x):
        z = numpyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
        numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def in_scan(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        scan(lambda carry, x: (carry, numpyro.sample("x", dist.Normal(z, 1.0), obs=x)), None, x)

    loss = WakeSleep(1, {"x": "x"})
    with pytest.raises(ValueError, match="The observed site 'x' is inside a scan, where it cannot be drawn"):
        loss.plan(in_scan, guide, jnp.arange(3.0))
    with pytest.raises(ValueError, match="The model cannot be simulated"):
        loss.plan(improper, guide, jnp.array(0.3))
    assert [row.site for row in ForwardKL(2).plan(improper, guide, jnp.array(0.3)).rows] == ["z"]


def test_value_is_the_bound_and_dreams_are_counted():
    """The loss is IWELBO's, exactly on average; an error of 0.2 would be seen."""
    case = dreamer()
    gradient = VariationalGradient(WakeSleep(2, {"x": "x"}, num_dreams=3), case.model, case.guide, *case.args)
    run = jax.jit(jax.vmap(lambda key: gradient.probe(key, case.params, {})))
    found = run(jax.random.split(jax.random.key(1), 1000))
    assert np.all(np.asarray(found.n_grad) == 5)
    exact = float(jax.jit(lambda params: exact_iwelbo(case, params))(case.params))
    error = float(found.value.std()) / np.sqrt(1000)
    assert abs(float(found.value.mean()) - exact) < THRESHOLD * error < 0.2
