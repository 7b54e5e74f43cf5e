"""Every combination of estimators on discrete, continuous, plated, nested and mixed programs, against exact gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO

import ergodica as erg
from ergodica.estimators import ELBO, IWELBO, VIMCO, Enumerate, LeaveOneOut, Reparam, Score
from ergodica.estimators.variational.facts import Downstream
from ergodica.estimators.variational.site import AbstractSiteEstimator, score_surrogate
from tests.support.exact_programs import CASES, Exact, exact_elbo, exact_iwelbo
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

STL = Reparam(stl=True)
LOCAL = {"discrete": "c", "plated": "c", "nested": "e", "mixed": "c", "mixed-chain": "c"}
GLOBAL = {"discrete": "z", "plated": "z", "nested": "r", "mixed": "z", "mixed-chain": "z"}
NORMAL = {"continuous": ("u", "w"), "mixed": ("w",), "mixed-chain": ("w",)}


def sites_of(name):
    """Combinations of estimators under the ELBO, by what they are called."""
    stuck = dict.fromkeys(NORMAL.get(name, ()), STL)
    if name == "continuous":
        return {
            "auto": {},
            "stl": stuck,
            "score": {"*": Score()},
            "leave-one-out": {"*": LeaveOneOut()},
            "score above": {"u": LeaveOneOut(), "w": STL},
            "score below": {"u": STL, "w": LeaveOneOut()},
        }
    local, top = LOCAL[name], GLOBAL[name]
    combinations = {
        "auto": {},
        "leave-one-out": {"*": LeaveOneOut()},
        "score": {"*": Score(-2.0)},
        "enumerated above": {top: Enumerate(), local: LeaveOneOut()},
        "enumerated below": {top: LeaveOneOut(), local: Enumerate()},
        "one without baseline": {top: Score(), local: LeaveOneOut()},
    }
    if stuck:
        combinations |= {"stl": stuck, "leave-one-out, stl": {top: LeaveOneOut(), local: LeaveOneOut()} | stuck}
    return combinations


def weighted_sites_of(name):
    """The same under IWELBO."""
    stuck = dict.fromkeys(NORMAL.get(name, ()), STL)
    if name == "continuous":
        return {"auto": {}, "doubly": stuck, "vimco": {"*": VIMCO()}, "score above": {"u": VIMCO(), "w": STL}}
    combinations = {"auto": {}, "leave-one-out": {"*": LeaveOneOut()}, "score": {"*": Score(-2.0)}}
    if stuck and name != "mixed-chain":
        combinations |= {"doubly": stuck}
    return combinations


FAST = [("plated", "enumerated below"), ("continuous", "stl")]
ALL = [(name, label) for name in CASES for label in sites_of(name)]
ALL_WEIGHTED = [(name, label) for name in CASES for label in weighted_sites_of(name)]
FAST_WEIGHTED = [("plated", "auto")]


def marked(every, fast):
    return [pytest.param(*c, marks=() if c in fast else pytest.mark.sweep) for c in every]


def check_elbo(loss, name, num_repeats=12_000, smallest_error=0.35):
    replicates, exact = gradients(loss, CASES[name](), num_repeats), exact_gradient(CASES[name], exact_elbo)
    if np.max(replicates.std(axis=0)) < 1e-12:
        np.testing.assert_allclose(replicates.mean(axis=0), exact, rtol=1e-10, atol=1e-12)
    else:
        noisy = replicates.std(axis=0) > 1e-12
        np.testing.assert_allclose(replicates.mean(axis=0)[~noisy], exact[~noisy], rtol=1e-10, atol=1e-12)
        assert_mean(replicates[:, noisy], exact[noisy], smallest_error=smallest_error)


@pytest.mark.parametrize(("name", "label"), marked(ALL, FAST))
@pytest.mark.swept_after(1)
def test_elbo(name, label):
    """Sees an error of 35% of the largest entry, and far less where sites are enumerated."""
    check_elbo(ELBO(2, sites_of(name)[label]), name)


@pytest.mark.parametrize(("name", "label"), marked(ALL_WEIGHTED, FAST_WEIGHTED))
def test_iwelbo(name, label):
    """K = 2, against all pairs of grid points. Sees an error of 60% of the largest entry."""
    num_repeats = 40_000 if label == "score" else 15_000  # that baseline is a guess
    replicates = gradients(IWELBO(2, weighted_sites_of(name)[label]), CASES[name](), num_repeats)
    assert_mean(replicates, exact_gradient(CASES[name], exact_iwelbo), smallest_error=0.6)


@pytest.mark.parametrize(
    ("name", "num_particles"),
    [
        ("mixed-chain", 3),
        *(pytest.param(n, k, marks=pytest.mark.sweep) for n in ("plated", "nested", "mixed-chain") for k in (1, 2)),
    ],
)
@pytest.mark.swept_after(1)
def test_without_baselines_it_is_tracegraph_to_rounding(name, num_particles):
    case = CASES[name]()
    discrete = dict.fromkeys([GLOBAL[name], LOCAL[name]], Score())

    def value_and_gradient(loss):
        return jax.jit(
            jax.value_and_grad(lambda p: loss.loss(jax.random.key(5), p, case.model, case.guide, *case.args))
        )(case.params)

    ours, theirs = value_and_gradient(ELBO(num_particles, discrete)), value_and_gradient(TraceGraph_ELBO(num_particles))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-11, atol=1e-11), ours, theirs)


@pytest.mark.sweep
def test_one_particle_of_iwelbo_is_elbo():
    case = CASES["mixed"]()
    sites = {"z": Score(), "c": Score(), "w": STL}

    def value(loss):
        return loss.loss(jax.random.key(5), case.params, case.model, case.guide, *case.args)

    np.testing.assert_allclose(value(IWELBO(1, sites)), value(ELBO(1, sites)), rtol=1e-12)


def test_sticking_the_landing_has_no_noise_where_the_guide_is_exact():
    """Conjugate normals, a chain of two latents whose posterior the guide has: zero for every draw, not on average."""
    from numpyro import distributions as dist

    def model():
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        w = numpyro.sample("w", dist.Normal(u, 1.0))
        numpyro.sample("x", dist.Normal(w, 1.0), obs=1.5)

    def guide():
        w_mean, w_sd = numpyro.param("m", jnp.array(1.0)), numpyro.param("s", jnp.sqrt(2.0 / 3.0))
        w = numpyro.sample("w", dist.Normal(w_mean, w_sd))
        numpyro.sample("u", dist.Normal(numpyro.param("a", jnp.array(0.5)) * w, jnp.sqrt(0.5)))

    params = {"m": jnp.array(1.0), "s": jnp.sqrt(2.0 / 3.0), "a": jnp.array(0.5)}

    def gradient(loss):
        return jax.jit(jax.grad(lambda p: loss.loss(jax.random.key(1), p, model, guide)))(params)

    for loss in (ELBO(2, {"*": STL}), IWELBO(2, {"*": STL})):
        assert max(abs(float(g)) for g in gradient(loss).values()) < 1e-12
    assert max(abs(float(g)) for g in gradient(ELBO(2)).values()) > 1e-2


# --- mutants and negative controls ---------------------------------------------------------------------------------


class WithOwnParticle(AbstractSiteEstimator):
    """Baseline that includes the particle itself: too small by the factor 1 - 1/K."""

    draw = LeaveOneOut.draw

    def surrogate(self, site, downstream: Downstream):
        return score_surrogate(downstream.log_prob, downstream.cost - jnp.mean(downstream.cost, axis=0, keepdims=True))


class WrongSign(AbstractSiteEstimator):
    """The cost with the wrong sign."""

    draw = LeaveOneOut.draw

    def surrogate(self, site, downstream: Downstream):
        return score_surrogate(downstream.log_prob, downstream.others - downstream.cost)


class Unweighted(AbstractSiteEstimator):
    """Enumeration whose weights carry no derivative."""

    entropy = "keep"
    num_branches = Enumerate.num_branches
    draw = Enumerate.draw

    def log_weights(self, log_prob, record):
        return jax.lax.stop_gradient(log_prob)


@pytest.mark.parametrize("mutant", [WithOwnParticle(), WrongSign(), Unweighted()], ids=lambda m: type(m).__name__)
@pytest.mark.swept_after(2)
def test_mutants_are_rejected(mutant):
    case = CASES["plated"]()
    replicates, exact = gradients(ELBO(2, {"c": mutant}), case, 4_000), exact_gradient(CASES["plated"], exact_elbo)
    noisy = np.maximum(replicates.std(axis=0), 1e-9)
    z = (replicates.mean(axis=0) - exact) / (noisy / np.sqrt(len(replicates)))
    assert np.max(np.abs(z)) > REJECTION


def test_weights_must_be_squared_at_doubly_reparameterised_sites():
    """Sticking the landing under IWELBO as if it were the ELBO: the derivative of the weights is lost."""

    class Single(IWELBO):
        def combine(self, run):
            log_weights, _ = self.weights(run)
            normalised = jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))
            direct = {t: x for t, x in run.particles.terms.items() if not t.startswith("-log q")}
            path = normalised * self._reduce(run, run.particles.held)
            return jnp.sum(path) + jnp.sum(normalised * self._reduce(run, direct))

    replicates = gradients(Single(2, {"*": STL}), CASES["continuous"](), 15_000)
    assert np.max(np.abs(z_scores(replicates, exact_gradient(CASES["continuous"], exact_iwelbo)))) > REJECTION


@pytest.mark.parametrize(
    ("loss", "exact"), [(Trace_ELBO(2), exact_elbo), (RenyiELBO(0, 2), exact_iwelbo)], ids=["Trace_ELBO", "RenyiELBO"]
)
@pytest.mark.swept_after(1)
def test_numpyros_gradients_of_discrete_guides_are_found_wrong(loss, exact):
    replicates = gradients(loss, CASES["plated"](), 4_000)
    assert np.max(np.abs(z_scores(replicates, exact_gradient(CASES["plated"], exact)))) > REJECTION


@pytest.mark.sweep
def test_comparison_of_gradients_says_so():
    """`compare_gradients` against the exact gradient: ours unbiased, NumPyro's loss for continuous guides biased."""
    case = CASES["plated"]()

    class AsLoss(ELBO):
        """NumPyro's estimator in the place of ours."""

        def evaluate(self, key, params, program, state, learned):
            from ergodica.estimators.variational.objectives.objective import Evaluation

            return Evaluation(-Trace_ELBO(4).loss(key, params, case.model, case.guide, *case.args), {}, {}, 4)

    estimators = {
        label: erg.estimators.VariationalGradient(loss, case.model, case.guide, *case.args)
        for label, loss in {"ours": ELBO(4, {"z": LeaveOneOut()}), "NumPyro": AsLoss(4)}.items()
    }
    estimators["quadrature"] = Exact(lambda params: exact_elbo(case, params))
    table = erg.compare_gradients(
        jax.random.key(0), estimators, case.params, reference="quadrature", num_repeats=3000, num_timings=0
    )
    verdicts = dict(zip(table.estimator.values, table.verdict.sel(point=0).values, strict=True))
    assert verdicts == {"ours": "unbiased", "NumPyro": "biased", "quadrature": "unbiased"}
