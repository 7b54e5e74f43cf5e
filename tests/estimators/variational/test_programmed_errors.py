"""Objectives written as programs: as users write them, rightly and wrongly."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.contrib.control_flow import scan
from numpyro.infer import SVI, autoguide

from ergodica.estimators import (
    ELBO,
    LeaveOneOut,
    MovingAverage,
    ProgrammedObjective,
    Reparam,
    Score,
    SiteError,
    VariationalGradient,
    marginal,
    normalise,
)
from ergodica.estimators.variational.programmed.log_density import LogDensity
from tests.support import resampled_tables as tables
from tests.support.exact_programs import CASES, Case

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")


def elbo(model, guide):
    z, log_q = guide.sample()
    return model.log_density(z) - log_q


def plan(objective, case, num_particles=2, sites=None):
    return ProgrammedObjective(objective, num_particles, sites).plan(case.model, case.guide, *case.args)


# --- what is wrong -----------------------------------------------------------------------------------------------------


def latents(model):
    return {"z": jnp.array(1), "c": jnp.array(0), "b": jnp.array([0, 1])}


WRONG = {
    "a vector": (lambda m, g: jnp.stack([elbo(m, g)] * 2), ValueError, r"must return a scalar; got shape \(2,\)"),
    "a pair": (lambda m, g: g.sample(), ValueError, "returned tuple. It must return a scalar"),
    "nothing returned": (lambda m, g: g.sample() and None, ValueError, "returned NoneType. It must return a scalar"),
    "a truth value": (lambda m, g: g.sample()[1] > 0, (ValueError, TypeError), "returned|not supported"),
    "nothing drawn": (
        lambda m, g: m.log_density(latents(m)),
        ValueError,
        "draws nothing, so that it is no expectation",
    ),
    "a site short": (
        lambda m, g: m.log_density({k: v for k, v in g.sample()[0].items() if k != "c"}),
        ValueError,
        "model.log_density needs a value for every latent site, and got none for 'c'; it got 'z', 'b'",
    ),
    "a site too many": (
        lambda m, g: m.log_density(g.sample()[0] | {"w": jnp.zeros(())}),
        ValueError,
        "got values for 'w', which it does not draw; it draws 'z', 'c', 'b'",
    ),
    "an observed site": (
        lambda m, g: m.log_density(g.sample()[0] | {"x": jnp.zeros(())}),
        ValueError,
        "got values for 'x', which it does not draw",
    ),
    "another shape": (
        lambda m, g: m.log_density(g.sample()[0] | {"b": jnp.zeros(3)}),
        ValueError,
        r"values\['b'\] has shape \(3,\), and the site has \(2,\) in model",
    ),
    "both results": (lambda m, g: m.log_density(g.sample()), TypeError, r"sample\(\) returns two things"),
    "a draw from the joint": (
        lambda m, g: m.sample()[1],
        ValueError,
        r"counts 'x', which it does not draw. Draw from model.prior",
    ),
    "keeps what is not drawn": (
        lambda m, g: marginal(g, ["q"]).sample()[1],
        ValueError,
        "keep names 'q', which the program does not draw; it draws 'z', 'c', 'b'",
    ),
    "keeps everything": (
        lambda m, g: marginal(g, ["z", "c", "b"]).sample()[1],
        ValueError,
        "there is nothing to sum out. Use the program itself",
    ),
    "keeps a string": (
        lambda m, g: marginal(g, "z").sample()[1],
        TypeError,
        r"keep must be a list of names .* got 'z'",
    ),
    "no particles": (lambda m, g: marginal(g, ["z"], 0).sample()[1], ValueError, "num_particles must be at least 1"),
    "others than kept": (
        lambda m, g: marginal(g, ["z"]).log_density(g.sample()[0]),
        ValueError,
        "needs values for 'z' and no others; got 'z', 'c', 'b'",
    ),
    "a marginal of no density": (
        lambda m, g: marginal(elbo, ["z"]),
        TypeError,
        "marginal takes the model or the guide",
    ),
    "no proposal for a marginal": (
        lambda m, g: normalise(marginal(g, ["z"]), 2),
        ValueError,
        "proposal must be given where the program is a Marginal",
    ),
    "a proposal that is no program": (
        lambda m, g: normalise(m, 2, proposal="prior"),
        TypeError,
        "proposal must be a NumPyro program or a density; got 'prior'",
    ),
    "a proposal that lacks a site": (
        lambda m, g: marginal(g, ["z", "c"], 2, lambda kept: numpyro.sample("u", dist.Normal(0.0, 1.0))).sample()[1],
        ValueError,
        "proposal.log_density (needs|got)",
    ),
}


@pytest.mark.parametrize("label", WRONG)
def test_what_is_wrong_is_said(label):
    objective, error, message = WRONG[label]
    with pytest.raises(error, match=message):
        plan(objective, CASES["discrete"]())


def test_estimators_that_would_have_no_effect_are_refused():
    with pytest.raises(SiteError, match=r"at site 'w' of an objective that is written as a program.*guide\.held"):
        plan(elbo, CASES["mixed"](), sites={"w": Reparam(stl=True)})
    with pytest.raises(ValueError, match=r"sites names 'y', which the guide does not draw"):
        plan(elbo, CASES["mixed"](), sites={"y": LeaveOneOut()})
    with pytest.raises(SiteError, match="with num_particles=1 there are no other particles"):
        plan(elbo, CASES["mixed"](), 1, sites={"z": LeaveOneOut()})
    with pytest.raises(TypeError, match="objective must be a function; got 3"):
        ProgrammedObjective(3)


# --- what is said ------------------------------------------------------------------------------------------------------


def test_explain_names_draws_and_parts():
    """A name holds for all draws of its site; a draw can be named alone."""

    def objective(model, guide):
        (z, first), (other, second) = guide.sample(), guide.sample()
        return 0.5 * (model.log_density(z) - first) + jnp.logaddexp(second, model.log_density(other))

    found = plan(objective, CASES["discrete"](), sites={"z": Score(), "c": LeaveOneOut(), "c#2": Score(-1.0)})
    assert "the objective objective a step; the gradient is unbiased" in found.title
    rows = {row.site: row for row in found.rows}
    assert {name: row.estimator for name, row in rows.items()} == {
        "z": "Score()",
        "c": "LeaveOneOut()",
        "b": "Enumerate()",
        "z#2": "Score()",
        "c#2": "Score(Constant)",
        "b#2": "Enumerate()",
    }
    assert [rows[name].why for name in ("z", "z#2", "c#2")] == [
        "named in sites",
        "'z' named in sites",
        "named in sites",
    ]
    assert rows["z"].terms == ("log p(z)", "log p(c)", "log p(x)", "log q(z)", "log q(c)")
    assert rows["c#2"].terms == ("value",)


# --- numbers that keep their parts -------------------------------------------------------------------------------------


def test_arithmetic_of_log_densities():
    """Sums, and multiples by constants, keep their parts; all else makes a number."""
    found = {}

    def objective(model, guide):
        z, log_q = guide.sample()
        log_p, q, p = model.log_density(z), jnp.asarray(log_q), jnp.asarray(model.log_density(z))
        pairs = [
            (2 - 3 * (log_p - log_q) / 4 + 1, 3 - 0.75 * (p - q)),
            (sum([log_p, -log_q]), p - q),
            (np.float64(2.0) * log_p, 2 * p),
            (log_p * q, p * q),
            (log_p * log_q, p * q),
            (log_p / log_q, p / q),
            (jnp.exp(log_p), jnp.exp(p)),
            (log_p + jnp.ones(2), p + jnp.ones(2)),
            (jax.lax.stop_gradient(log_p), p),
            (jnp.asarray(jax.vmap(lambda x: model.log_density(z) * x)(jnp.arange(3.0))), p * jnp.arange(3.0)),
        ]
        found.update(kept=[isinstance(a, LogDensity) for a, _ in pairs], shown=repr(log_p - log_q))
        for a, b in pairs:
            assert jnp.shape(jnp.asarray(a)) == jnp.shape(b)
        return sum(jnp.sum((jnp.asarray(a) - b) ** 2) for a, b in pairs)

    case = CASES["plated"]()
    loss = ProgrammedObjective(objective, 1, {"*": Score()})
    value = jax.jit(lambda p: loss.loss(jax.random.key(0), p, case.model, case.guide, *case.args))(case.params)
    np.testing.assert_allclose(value, 0.0, atol=1e-20)
    assert found["kept"] == [True] * 3 + [False] * 5 + [True, False]
    assert found["shown"] == "LogDensity(log p(z), log p(c), log p(x), log q(z), log q(c))"


# --- programs as users write them --------------------------------------------------------------------------------------


def same_as_elbo(case, sites=None):
    def value_and_gradient(loss):
        def value(params):
            return loss.loss(jax.random.key(3), params, case.model, case.guide, *case.args)

        return jax.jit(jax.value_and_grad(value))(case.params)

    found, exact = (
        value_and_gradient(kind(2, sites=sites)) for kind in (lambda *a, **k: ProgrammedObjective(elbo, *a, **k), ELBO)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-9), found, exact)


def subsampled():
    def model(x):
        g = numpyro.sample("g", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 6, subsample_size=2) as rows:
            b = numpyro.sample("b", dist.Bernoulli(0.3))
            numpyro.sample("x", dist.Normal(g + b, 1.0), obs=x[rows])

    def guide(x):
        numpyro.sample("g", dist.Normal(numpyro.param("m", jnp.array(0.3)), 0.7))
        logits = numpyro.param("logits", jnp.linspace(-1, 1, 6))
        with numpyro.plate("data", 6, subsample_size=2) as rows:
            numpyro.sample("b", dist.Bernoulli(logits=logits[rows]))

    params = {"m": jnp.array(0.3), "logits": jnp.linspace(-1, 1, 6)}
    return Case("subsampled", model, guide, (jnp.arange(6.0) / 3,), params)


def scanned():
    def model(y):
        def step(z, y):
            z = numpyro.sample("z", dist.Normal(0.9 * z, 1.0))
            numpyro.sample("y", dist.Normal(z, 1.0), obs=y)
            return z, None

        scan(step, 0.0, y)

    def guide(y):
        slope = numpyro.param("slope", jnp.array(0.2))

        def step(z, loc):
            z = numpyro.sample("z", dist.Normal(loc + slope * z, 0.5))
            return z, None

        scan(step, 0.0, numpyro.param("locs", jnp.zeros(3)))

    return Case("scan", model, guide, (jnp.arange(3.0),), {"locs": 0.3 * jnp.arange(3.0), "slope": jnp.array(0.2)})


def auto(name):
    def make():
        def model(x, y):
            scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
            slope = numpyro.sample("slope", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            with numpyro.plate("data", 3):
                numpyro.sample("y", dist.Normal(x @ slope, scale), obs=y)

        args = (jnp.array([[1.0, 0.2], [0.3, -1.0], [-0.7, 0.5]]), jnp.array([0.9, -0.6, 0.1]))
        guide = getattr(autoguide, name)(model)
        svi = SVI(model, guide, optax.adam(0.1), ELBO())
        return Case(name, model, guide, args, svi.get_params(svi.init(jax.random.key(0), *args)))

    return make


PROGRAMS = {
    "subsampled": subsampled,
    "scan": scanned,
    **{n: auto(n) for n in ("AutoNormal", "AutoDiagonalNormal", "AutoIAFNormal", "AutoDelta")},
}


@pytest.mark.parametrize(
    "name", [n if n == "subsampled" else pytest.param(n, marks=pytest.mark.sweep) for n in PROGRAMS]
)
def test_it_is_the_elbo_for(name):
    same_as_elbo(PROGRAMS[name]())


def test_functions_of_subsampled_log_densities_are_refused():
    case = subsampled()
    with pytest.raises(ValueError, match=r"log density over a random part of plate 'data' was made a number"):
        plan(lambda m, g: jnp.exp(elbo(m, g)), case)
    with pytest.raises(ValueError, match=r"Plate 'data' holds a random part of its elements.*no sum of multiples"):
        plan(lambda m, g: jnp.sum(g.sample()[0]["b"]), case)


def test_densities_without_an_inverse_say_so():
    flow = dist.transforms.PowerTransform(jnp.array(3.0))
    flow._inverse = lambda y: (_ for _ in ()).throw(NotImplementedError)

    def guide():
        numpyro.sample("z", dist.TransformedDistribution(dist.Exponential(1.0), flow))

    loss = ProgrammedObjective(lambda m, g: g.log_density(g.sample()[0]))
    with pytest.raises(SiteError, match=r"of guide: its density at a given value needs the inverse.*Use ELBO"):
        loss.plan(guide, guide)


def hvi(model, guide):
    z, log_q = marginal(guide, ["z"], 2, tables.proposal).sample()
    return model.log_density(z) - log_q


def test_parameters_of_a_proposal_are_trained_once_they_are_declared():
    case = tables.continuous()
    loss = ProgrammedObjective(hvi, 2, {"u": Score(MovingAverage(0.9))})
    undeclared = SVI(case.model, case.guide, optax.sgd(0.1), ProgrammedObjective(hvi, 2))
    start = undeclared.init(jax.random.key(0), *case.args)
    with pytest.raises(
        ValueError, match=r"Parameter 'r_base' belongs to a program inside.*loss\.guide\(model, guide\)"
    ):
        jax.eval_shape(undeclared.update, start, *case.args)
    guide = loss.guide(case.model, case.guide)
    svi = SVI(case.model, guide, optax.sgd(0.1), loss)
    state = svi.init(jax.random.key(0), *case.args)
    after, value = jax.jit(svi.update)(state, *case.args)
    assert jnp.isfinite(value)
    before, trained = svi.get_params(state), svi.get_params(after)
    assert set(trained) == set(case.params)
    assert all(jnp.any(before[name] != trained[name]) for name in case.params)
    assert set(after.mutable_state) == {"u$remembered", "u#2$remembered"}
    gradient = VariationalGradient(loss, case.model, guide, *case.args)
    start = gradient.start(jax.random.key(0))
    assert set(gradient.init(jax.random.key(0), start)) == {"u", "u#2"}
