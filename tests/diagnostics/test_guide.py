"""The check of a guide against closed forms: tails of known index, known evidence, known ESS."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro.infer import autoguide
from scipy import stats

from ergodica.diagnostics import check_guide
from ergodica.diagnostics.guide import draws_needed, judge_weights, reliable_below

pytestmark = pytest.mark.usefixtures("numpyro_promotion")
S = 4000
TAIL = int(3 * S**0.5)


# --- tails -----------------------------------------------------------------------------------------------------------


def pareto_log_weights(k, seed, num=S):
    """Guide Exponential(1), target Exponential(1 - k): the weights have exactly a Pareto law, of index k."""
    return np.log1p(-k) + k * np.random.default_rng(seed).exponential(size=num)


def mean_pareto_k(log_weights_of, k, repeats=40):
    found = [judge_weights(log_weights_of(k, seed)).pareto_k for seed in range(repeats)]
    return float(np.mean(found)), (1 + k) / np.sqrt(TAIL * repeats)


@pytest.mark.parametrize("k", [0.2, 0.5, 0.8, 0.95])
def test_index_of_an_exact_pareto_tail(k):
    """The prior of the fit pulls the index towards one half, by 10 in TAIL + 10; the smallest error seen is about .1."""
    found, error = mean_pareto_k(pareto_log_weights, k)
    shrunk = (TAIL * k + 10 * 0.5) / (TAIL + 10)
    assert abs(found - shrunk) < 5 * error
    assert 5 * error < 0.12


def test_mutant_that_fits_the_other_tail():
    """ArviZ takes negative log weights (log likelihoods); with the wrong sign the index is that of the smallest weights."""
    found, error = mean_pareto_k(lambda k, seed: -pareto_log_weights(k, seed), 0.8)
    assert abs(found - 0.8) > 8 * error


def normal_log_weights(s, z):
    """Target N(0, 1), guide N(0, s²) at x = s z: P(w > t) falls as t^(-1/(1 - s²)), so k = 1 - s²."""
    return np.log(s) + 0.5 * (1 - s**2) * z**2


@pytest.mark.parametrize("s", [0.3, 0.5])
def test_index_of_a_guide_that_is_too_narrow(s):
    """Against the fit to exact quantiles, which is below the limit 1 - s² (the tail of z² is not exponential) and tends to it."""
    at_quantiles = [
        judge_weights(normal_log_weights(s, stats.norm.ppf((np.arange(n) + 0.5) / n))).pareto_k for n in (S, 250 * S)
    ]
    assert 0.8 * (1 - s**2) < at_quantiles[0] < at_quantiles[1] < 1 - s**2

    def log_weights(s, seed):
        return normal_log_weights(s, np.random.default_rng(seed).normal(size=S))

    found, _ = mean_pareto_k(log_weights, s)
    assert abs(found - at_quantiles[0]) < 5 * (2 - s**2) / np.sqrt(40 * TAIL)


def test_what_is_said_of_each_tail():
    verdicts = {k: judge_weights(np.log1p(-k) + k * _exponential_quantiles(S)) for k in (0.1, 0.55, 0.9)}
    assert [(v.status, v.verdict) for v in verdicts.values()] == [
        ("passed", "close"),
        ("passed", "usable with weights"),
        ("failed", "far"),
    ]
    few = judge_weights(np.log1p(-0.6) + 0.6 * _exponential_quantiles(200))
    assert (few.status, few.verdict) == ("undecided", "too few draws")
    assert draws_needed(reliable_below(500)) == pytest.approx(500)
    assert reliable_below(2155) == 0.7
    assert reliable_below(2150) < 0.7


def _exponential_quantiles(num):
    return stats.expon.ppf((np.arange(num) + 0.5) / num)


def test_few_values_and_none():
    few = judge_weights(np.where(np.arange(S) < 40, 5.0, 0.0))
    assert (few.status, few.verdict) == ("undecided", "too few values")
    assert few.ess == pytest.approx((40 * np.e**5 + S - 40) ** 2 / (40 * np.e**10 + S - 40))
    two = judge_weights(np.log(np.where(np.arange(S) < S // 4, 3.0, 1 / 3)))  # the larger value fills the tail
    assert two.pareto_k == -np.inf
    assert two.verdict == "usable with weights"  # sd 2 / sqrt(3): means may be off by more than half of one
    for weights in (np.full(S, -np.inf), np.append(np.zeros(S - 1), np.nan)):
        assert judge_weights(weights).verdict == "not finite"
    some = judge_weights(np.append(pareto_log_weights(0.2, 0)[1:], -np.inf))  # no density at one draw: a weight of 0
    assert some.status == "passed"
    assert some.elbo == -np.inf


# --- programs --------------------------------------------------------------------------------------------------------

Y = jnp.array([0.3, -0.4, 1.2, 0.9, 2.0])


def conjugate(y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


LOG_EVIDENCE = float(stats.multivariate_normal(np.zeros(5), np.eye(5) + 1).logpdf(np.asarray(Y)))
POSTERIOR = {"loc": jnp.sum(Y) / 6, "scale": jnp.asarray(6**-0.5)}


def normal_guide(y):
    loc = numpyro.param("loc", jnp.array(0.0))
    scale = numpyro.param("scale", jnp.array(1.0), constraint=dist.constraints.positive)
    numpyro.sample("mean", dist.Normal(loc, scale))


def check_scale(factor, seed=0, **kwargs):
    params = {"loc": POSTERIOR["loc"], "scale": factor * POSTERIOR["scale"]}
    return check_guide(jax.random.key(seed), conjugate, normal_guide, params, Y, **kwargs)


def test_the_posterior_itself_has_weights_without_variance():
    found = check_scale(1.0)
    assert (found.status, found.verdict, found.pareto_k) == ("passed", "close", -np.inf)
    assert found.ess == pytest.approx(S, rel=1e-6)
    assert found.log_evidence == pytest.approx(LOG_EVIDENCE, abs=1e-5)
    assert found.log_evidence_error < 1e-6
    assert "Pareto k" in str(found)
    assert "-inf" in str(found)


def test_too_narrow_fails_and_too_wide_passes():
    narrow, wide = check_scale(0.1, num_draws=100_000), check_scale(2.0)
    assert (narrow.status, narrow.verdict) == ("failed", "far")
    assert narrow.pareto_k > 0.7
    assert (wide.status, wide.verdict) == ("passed", "usable with weights")
    share = 7**0.5 / 4  # sqrt(2 s² - 1) / s²
    assert wide.ess / S == pytest.approx(share, abs=5 * 0.5 / S**0.5)
    assert wide.mean_error == pytest.approx((1 / share - 1) ** 0.5, abs=0.05)
    assert abs(wide.log_evidence - LOG_EVIDENCE) < 5 * wide.log_evidence_error < 0.06
    elbo = LOG_EVIDENCE - (0.5 * (4 - 1) - np.log(2))  # less the divergence of N(0, 4) from N(0, 1)
    assert abs(wide.elbo - elbo) < 5 * wide.elbo_error < 0.2


def test_same_tail_as_numpyro():
    from numpyro.infer import psis_diagnostic

    found = check_scale(0.5, seed=3)
    params = {"loc": POSTERIOR["loc"], "scale": 0.5 * POSTERIOR["scale"]}
    peer = psis_diagnostic(jax.random.key(3), params, conjugate, normal_guide, Y, num_particles=S)
    assert found.pareto_k == pytest.approx(peer, abs=0.01)  # its tail has one draw more


def test_discrete_sites_in_a_plate():
    """Bits beside a normal; every factor of the weights' second moment is known."""
    p, q = np.array([0.3, 0.3, 0.3]), np.array([0.2, 0.5, 0.3])

    def model():
        numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("bits", 3):
            z = numpyro.sample("z", dist.Bernoulli(0.3))
            numpyro.factor("f", 0.5 * z)

    def guide():
        numpyro.sample("w", dist.Normal(0.0, numpyro.param("scale", jnp.array(1.0))))
        with numpyro.plate("bits", 3):
            numpyro.sample("z", dist.Bernoulli(jnp.asarray(q, jnp.float32)))

    found = check_guide(jax.random.key(1), model, guide, {"scale": jnp.array(1.5)}, num_draws=8000)
    on, off = p * np.exp(0.5), 1 - p
    evidence = np.prod(on + off)
    second = np.prod(on**2 / q + off**2 / (1 - q)) * 1.5**2 / (2 * 1.5**2 - 1) ** 0.5
    assert abs(found.log_evidence - np.log(evidence)) < 5 * found.log_evidence_error < 0.05
    assert found.ess / 8000 == pytest.approx(evidence**2 / second, abs=0.03)
    assert found.status == "passed"


def test_autoguides():
    """With sites that are functions of an auxiliary one, whose Jacobian counts: the posterior of the logarithm is normal."""

    def model(y):
        rate = numpyro.sample("rate", dist.LogNormal(0.0, 1.0))
        with numpyro.plate("data", 5):
            numpyro.sample("y", dist.Normal(jnp.log(rate), 1.0), obs=y)

    loc, scale = POSTERIOR.values()
    guides = {
        autoguide.AutoDiagonalNormal(model): {"auto_loc": loc[None], "auto_scale": scale[None]},
        autoguide.AutoNormal(model): {"rate_auto_loc": loc, "rate_auto_scale": scale},
    }
    for guide, params in guides.items():
        found = check_guide(jax.random.key(0), model, guide, params, Y, num_draws=100)
        assert (found.verdict, found.pareto_k) == ("close", -np.inf)
        assert found.log_evidence == pytest.approx(LOG_EVIDENCE, abs=1e-5)
    with pytest.raises(ValueError, match=r"'rate' at one point.*AutoNormal"):
        check_guide(jax.random.key(0), model, autoguide.AutoDelta(model), {"rate_auto_loc": jnp.array(1.0)}, Y)


# --- errors ----------------------------------------------------------------------------------------------------------


def test_what_gives_no_weights_is_an_error():
    key = jax.random.key(0)

    def empty(y):
        pass

    def another(y):
        normal_guide(y)
        numpyro.sample("extra", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"model draws 'mean'.*guide does not"):
        check_guide(key, conjugate, empty, {}, Y)
    with pytest.raises(ValueError, match=r"guide draws 'extra'.*is_auxiliary"):
        check_guide(key, conjugate, another, POSTERIOR, Y)
    with pytest.raises(ValueError, match=r"params lacks 'scale'.*it has 'loc'"):
        check_guide(key, conjugate, normal_guide, {"loc": POSTERIOR["loc"]}, Y)
    with pytest.raises(ValueError, match=r"params\['scale'\] is outside of its constraint"):
        check_guide(key, conjugate, normal_guide, POSTERIOR | {"scale": jnp.array(-0.9)}, Y)
    with pytest.raises(TypeError, match=r"params must be a dict"):
        check_guide(key, conjugate, normal_guide, None, Y)
    with pytest.raises(ValueError, match=r"num_draws must be at least 100"):
        check_scale(1.0, num_draws=50)
    with pytest.raises(TypeError, match="typed key"):
        check_guide(jax.random.PRNGKey(0), conjugate, normal_guide, POSTERIOR, Y)


def test_a_subsampled_plate_is_an_error():
    def model(y):
        mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", 5, subsample_size=2) as rows:
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[rows])

    with pytest.raises(ValueError, match=r"'data' is subsampled, 2 of 5"):
        check_guide(jax.random.key(0), model, normal_guide, POSTERIOR, Y)
