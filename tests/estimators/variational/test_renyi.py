"""Rényi's bound: against all pairs of grid points, against IWELBO and ELBO, and on plates; mutants, and NumPyro's."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.infer import SVI, RenyiELBO

import ergodica as erg
from ergodica.estimators import ELBO, IWELBO, VIMCO, LeaveOneOut, RenyiBound, Reparam, Score, VariationalGradient
from ergodica.estimators.variational.objectives.objective import Evaluation
from ergodica.estimators.variational.structure import GUIDE
from tests.support.exact_programs import CASES, Case, Exact, exact_renyi, on_grid
from tests.support.replicates import exact_gradient, gradients
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("numpyro_promotion", "x64")

STL = Reparam(stl=True)
DOUBLY = {"continuous": {"*": STL}, "mixed": {"w": STL}}
SITES = {
    "discrete": {"vimco": {}, "leave-one-out": {"*": LeaveOneOut()}},
    "plated": {"vimco": {}, "score": {"*": Score(-2.0)}},
    "nested": {"vimco": {}},
    "continuous": {
        "auto": {},
        "doubly": DOUBLY["continuous"],
        "vimco": {"*": VIMCO()},
        "score above": {"u": VIMCO(), "w": STL},
    },
    "mixed": {"auto": {}, "doubly": DOUBLY["mixed"]},
    "mixed-chain": {"auto": {}},
}
FAST = [("plated", "vimco", -1.0), ("continuous", "doubly", 0.5)]
ALL = [(name, label, alpha) for name in SITES for label in SITES[name] for alpha in (-1.0, 0.5, 2.0)]


def value_and_gradient(loss, case, key=5):
    def value(params):
        return -loss.loss(jax.random.key(key), params, case.model, case.guide, *case.args)

    return jax.jit(jax.value_and_grad(value))(case.params)


@pytest.mark.parametrize(
    ("name", "label", "alpha"), [pytest.param(*c, marks=() if c in FAST else pytest.mark.sweep) for c in ALL]
)
def test_gradients_are_unbiased(name, label, alpha):
    """K = 2, below, between and above the orders of the importance-weighted bound and the ELBO. Sees 60% of the largest entry."""
    found = gradients(RenyiBound(alpha, 2, SITES[name][label]), CASES[name](), 15_000)
    assert_mean(found, exact_gradient(CASES[name], exact_renyi(alpha)), smallest_error=0.6)


@pytest.mark.parametrize("name", ["mixed", pytest.param("continuous", marks=pytest.mark.sweep)])
def test_order_zero_is_iwelbo_to_the_last_digit(name):
    found, expected = (
        value_and_gradient(loss, CASES[name]()) for loss in (RenyiBound(0.0, 3, DOUBLY[name]), IWELBO(3, DOUBLY[name]))
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "sites", [DOUBLY["continuous"], pytest.param({}, marks=pytest.mark.sweep)], ids=["stuck", "plain"]
)
def test_orders_near_one_are_the_elbo(sites):
    """Draw for draw: equal weights, with and without sticking the landing."""
    case = CASES["continuous"]()
    found, expected = (value_and_gradient(loss, case) for loss in (RenyiBound(1 - 1e-6, 3, sites), ELBO(3, sites)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-5), found, expected)


def test_side_of_the_evidence():
    """What the documentation says of orders and particles, on all grid points: exact."""
    case = CASES["discrete"]()
    log_q, log_w = jax.jit(lambda params: on_grid(case, params))(case.params)
    evidence = float(jax.nn.logsumexp(log_q + log_w))

    def limit(alpha):
        return float(jax.nn.logsumexp(log_q + (1 - alpha) * log_w) / (1 - alpha))

    def of_two(alpha):
        powers = (1 - alpha) * log_w
        pairs = (jnp.logaddexp(powers[:, None], powers[None, :]) - jnp.log(2.0)) / (1 - alpha)
        return float(jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pairs))

    elbo, two = float(jnp.sum(jnp.exp(log_q) * log_w)), {alpha: of_two(alpha) for alpha in (-1.0, 0.0, 0.5, 2.0)}
    np.testing.assert_allclose(limit(0.0), evidence, rtol=1e-12)
    assert limit(2.0) < two[2.0] < elbo < two[0.5] < limit(0.5) < evidence
    assert elbo < two[-1.0] < evidence < limit(-1.0)  # no bound: it passes the evidence on its way


def test_orders_below_zero_lead_away_from_the_posterior():
    """One bit whose evidence is 1, every number of particles by its counts: where the posterior stops to be the maximum."""
    p, q = np.array([0.6, 0.4]), np.array([0.57, 0.43])

    def bound(alpha, num_particles):
        n, power = np.arange(num_particles + 1), 1 - alpha
        ways = np.array([math.comb(num_particles, int(i)) for i in n]) * q[1] ** n * q[0] ** (num_particles - n)
        powers = ((num_particles - n) * (p[0] / q[0]) ** power + n * (p[1] / q[1]) ** power) / num_particles
        return ways @ np.log(powers) / power

    variance = q @ (p / q) ** 2 - 1
    for alpha, num_particles in itertools.product((-1.0, -0.25, 0.5, 2.0), (1, 2, 4, 8)):
        expected = -0.5 * (alpha + (1 - alpha) / num_particles) * variance  # as the docstring says
        np.testing.assert_allclose(bound(alpha, num_particles), expected, atol=0.1 * variance)
    assert bound(-1.0, 3) > 0 > bound(-1.0, 1)
    assert bound(-0.25, 6) > 0 > bound(-0.25, 4)
    assert "With more than 5 particles the posterior is not its maximum" in RenyiBound(-0.25, 4).notes[1]


@pytest.mark.sweep
def test_orders_can_be_mapped_over():
    case, alphas = CASES["plated"](), jnp.array([-0.5, 0.3, 2.0])

    @jax.jit
    def gradient(alpha):
        loss = RenyiBound(alpha, 3)
        return jax.grad(lambda p: loss.loss(jax.random.key(1), p, case.model, case.guide, *case.args))(case.params)

    together = jax.vmap(gradient)(alphas)
    for i, alpha in enumerate(alphas):
        jax.tree.map(
            lambda x, y, i=i: np.testing.assert_allclose(x[i], y, rtol=1e-9, atol=1e-12), together, gradient(alpha)
        )


# --- plates --------------------------------------------------------------------------------------------------------------------

X, LOGITS = jnp.array([0.2, 1.3, -0.4, 0.9]), jnp.array([0.3, -0.2, 0.5, 0.1])


def local_program(size=4):
    """A bit for each of four data, of which ``size`` are in the program."""

    def model(x):
        with numpyro.plate("data", 4, subsample_size=size) as rows:
            z = numpyro.sample("z", dist.Bernoulli(0.4))
            numpyro.sample("x", dist.Normal(1.0 * z, 0.8), obs=x[rows])

    def guide(x):
        logits = numpyro.param("logits", jnp.zeros(4))
        with numpyro.plate("data", 4, subsample_size=size) as rows:
            numpyro.sample("z", dist.Bernoulli(logits=logits[rows]))

    return Case("local", model, guide, (X,), {"logits": LOGITS})


def exact_local(logits, alpha):
    """The sum over data of the bound of two particles, by enumeration of pairs of bits."""
    bits = jnp.arange(2.0)[:, None]
    log_q = dist.Bernoulli(logits=logits).log_prob(bits)
    powers = (1 - alpha) * (dist.Bernoulli(0.4).log_prob(bits) + dist.Normal(bits, 0.8).log_prob(X) - log_q)
    pairs = (jnp.logaddexp(powers[:, None], powers[None, :]) - jnp.log(2.0)) / (1 - alpha)
    return jnp.sum(jnp.exp(log_q[:, None] + log_q[None, :]) * pairs)


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.sweep)])
@pytest.mark.swept_after(1)
def test_common_plates_have_a_bound_for_each_element(size):
    """Subsampled or whole, against the whole plate. Sees 20% of the largest entry."""
    found = gradients(RenyiBound(-0.5, 2), local_program(size), 12_000)
    assert_mean(found, np.asarray(jax.grad(exact_local)(LOGITS, -0.5)), smallest_error=0.2)


def test_other_subsampled_plates_are_refused():
    def model():
        u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 4, subsample_size=2) as rows:
            numpyro.sample("x", dist.Normal(u, 1.0), obs=X[rows])

    def guide():
        numpyro.sample("u", dist.Normal(numpyro.param("m", jnp.array(0.1)), 1.0))

    with pytest.raises(ValueError, match=r"Plate 'data' of log p\(x\) is subsampled and does not enclose every site"):
        RenyiBound(0.5, 2).plan(model, guide)
    one = RenyiBound(0.5, 1).loss(jax.random.key(0), {"m": jnp.array(0.1)}, model, guide)  # the ELBO
    np.testing.assert_allclose(one, ELBO(1).loss(jax.random.key(0), {"m": jnp.array(0.1)}, model, guide), rtol=1e-12)


# --- mutants and negative controls ---------------------------------------------------------------------------------------------


class WithoutOwnTerm(RenyiBound):
    """The weights' own derivative is missing at score-function sites."""

    def combine(self, run):
        stop = {GUIDE.format(name) for name in run.structure.sites}
        terms = {t: jax.lax.stop_gradient(x) if t in stop else x for t, x in run.particles.terms.items()}
        return super().combine(run._replace(particles=run.particles._replace(terms=terms)))


class SignalOfWeights(RenyiBound):
    """The signal is the bound of the weights, not of their powers."""

    def cost(self, run, name):
        return IWELBO(self.num_particles).cost(run, name)


class SquaredWeights(RenyiBound):
    """Doubly reparameterised as if the order were 0."""

    def combine(self, run):
        log_weights, _ = self.weights(run)
        normalised = jax.lax.stop_gradient(jax.nn.softmax(log_weights, axis=0))
        direct = {t: x for t, x in run.particles.terms.items() if not t.startswith("-log q")}
        return jnp.sum(normalised * self._reduce(run, direct)) + jnp.sum(
            normalised**2 * self._reduce(run, run.particles.held)
        )


@pytest.mark.parametrize(
    ("mutant", "name", "sites"),
    [
        (WithoutOwnTerm, "plated", {}),
        (SquaredWeights, "continuous", DOUBLY["continuous"]),
        pytest.param(SignalOfWeights, "plated", {}, marks=pytest.mark.sweep),
    ],
    ids=lambda x: x.__name__ if isinstance(x, type) else "",
)
def test_mutants_are_rejected(mutant, name, sites):
    found = gradients(mutant(-1.0, 2, sites), CASES[name](), 15_000)
    assert np.max(np.abs(z_scores(found, exact_gradient(CASES[name], exact_renyi(-1.0))))) > REJECTION


@pytest.mark.sweep
def test_comparison_finds_numpyros_bound_wrong_for_a_discrete_guide():
    """`compare_gradients` against the exact gradient: here unbiased, and NumPyro's biased, with a sign of it reversed."""
    case = CASES["plated"]()

    class AsLoss(RenyiBound):
        """NumPyro's estimator in the place of ours."""

        def evaluate(self, key, params, program, state, learned):
            return Evaluation(-RenyiELBO(0.5, 2).loss(key, params, case.model, case.guide, *case.args), {}, {}, 2)

    estimators = {
        label: VariationalGradient(loss, case.model, case.guide, *case.args)
        for label, loss in {"ours": RenyiBound(0.5, 2), "NumPyro": AsLoss(0.5, 2)}.items()
    }
    estimators["enumeration"] = Exact(lambda params: exact_renyi(0.5)(case, params))
    table = erg.compare_gradients(
        jax.random.key(0), estimators, case.params, reference="enumeration", num_repeats=16_000, num_timings=0
    )
    verdicts = dict(zip(table.estimator.values, table.verdict.sel(point=0).values, strict=True))
    assert verdicts == {"ours": "unbiased", "NumPyro": "biased", "enumeration": "unbiased"}
    exact, wrong = exact_gradient(CASES["plated"], exact_renyi(0.5)), gradients(RenyiELBO(0.5, 2), case, 4_000)
    assert np.any((exact * wrong.mean(axis=0) < 0) & (np.abs(z_scores(wrong, 0.0)) > REJECTION))


# --- as users meet it ----------------------------------------------------------------------------------------------------------


def test_bad_orders_raise():
    with pytest.raises(ValueError, match=r"alpha must not be 1, where the bound is the ELBO: use ELBO"):
        RenyiBound(1, 4)
    with pytest.raises(TypeError, match="alpha must be a number; got 'half'"):
        RenyiBound("half")
    with pytest.raises(ValueError, match="alpha must be finite; got nan"):
        RenyiBound(float("nan"))
    with pytest.raises(ValueError, match=r"alpha must be one number; got shape \(2,\)"):
        RenyiBound(jnp.array([0.2, 0.5]))


def test_explain_names_the_order_and_the_side(capsys):
    case = CASES["mixed"]()
    for alpha, words in (
        (0.5, "a lower bound of the evidence, above the ELBO"),
        (-1, "is no bound"),
        (2, "below the ELBO"),
    ):
        RenyiBound(alpha, 4, DOUBLY["mixed"]).explain(case.model, case.guide, *case.args)
        printed = capsys.readouterr().out
        assert (
            f"RenyiBound({alpha}), 4 particles: 4 runs of model and guide a step; the gradient is unbiased" in printed
        )
        assert words in printed
        assert "Reparam(stl=True)" in printed


def test_goes_into_svi():
    """The fitted bits are those of the posterior, which every order from 0 on has as its optimum."""
    case = local_program()
    fit = SVI(case.model, case.guide, optax.adam(optax.cosine_decay_schedule(0.1, 1500)), RenyiBound(0.5, 4)).run(
        jax.random.key(0), 1500, *case.args, progress_bar=False
    )
    log_odds = jnp.log(0.4 / 0.6) + dist.Normal(1.0, 0.8).log_prob(X) - dist.Normal(0.0, 0.8).log_prob(X)
    np.testing.assert_allclose(fit.params["logits"], log_odds, atol=0.2)
