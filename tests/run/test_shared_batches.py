"""One batch a step for all chains: what is common to them, what is not, and what the runner says of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.run import chains as runner
from tests.support.problems import gaussian_mean
from tests.support.statistics import THRESHOLD, standard_error


def run(sampler, num_samples=20, **options):
    arguments = {"num_warmup": 8, "num_chains": 3, "progress": False, "shared_batches": True} | options
    return erg.sample(jax.random.key(5), sampler, num_samples, **arguments)


def sgld(scheme="blocks", step_size=1e-3, **options):
    posterior = gaussian_mean()
    return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 10, scheme), step_size, **options)


@pytest.mark.parametrize("scheme", ["blocks", "uniform"])
@pytest.mark.swept_after(1)
def test_without_noise_of_their_own_chains_are_one(scheme):
    """At temperature 0 only the batches move a chain."""
    cold = sgld(scheme, temperature=0.0)
    shared, own = (run(cold, shared_batches=flag).posterior["position"].values for flag in (True, False))
    np.testing.assert_array_equal(shared, np.broadcast_to(shared[:1], shared.shape))
    assert len(np.unique(own[:, -1])) == 3
    assert len(np.unique(shared[0])) == 20


def test_an_epoch_visits_each_block_once():
    """20 steps of temperature 0 with a tiny step move by the full gradient, whatever the order."""
    sampler = sgld(step_size=1e-9, temperature=0.0)
    dt = run(sampler, 1, num_warmup=0, thin=20)
    full = jax.grad(sampler.posterior.log_density)(jnp.array(0.0))
    np.testing.assert_allclose(dt.posterior["position"].values[:, 0], 20 * 1e-9 * full, rtol=1e-4)


@pytest.mark.sweep
def test_law_of_each_and_correlation_between():
    r"""With i.i.d. batches: Var as for chains of their own, and correlation :math:`h s^2 / (2T + h s^2)` between chains."""
    posterior, h, groups = gaussian_mean(), 1e-3, 250
    x = np.asarray(posterior.data, np.float64)
    precision, noise = len(x) / 2.0 + 1 / 25.0, (len(x) / 2.0) ** 2 * x.var() / 10
    variance = (2 + h * noise) / (precision * (2 - h * precision))
    centre = (x.sum() / 2.0) / precision
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 10, "uniform"), h)
    dt = run(sampler, 40 * groups, num_chains=4, thin=40, num_warmup=200)
    draws = (dt.posterior["position"].values - centre).reshape(4, groups, 40)
    second = np.mean(draws**2, axis=(0, 2))
    cross = np.mean((draws.sum(axis=0) ** 2 - (draws**2).sum(axis=0)) / 12, axis=1)
    for name, found, exact in (
        ("variance", second, variance),
        ("covariance between chains", cross, variance * h * noise / (2 + h * noise)),
    ):
        error = standard_error(found)
        assert THRESHOLD * error < 0.1 * exact, f"{name}: the smallest error that could be seen is above 10%"
        assert abs(found.mean() - exact) < THRESHOLD * error, name
    assert cross.mean() > THRESHOLD * standard_error(cross)  # chains of their own have none


def test_resumes_to_the_bit(tmp_path, monkeypatch):
    sampler = erg.samplers.BAOAB(erg.estimators.Minibatch(gaussian_mean(), 10), 0.01)
    whole = run(sampler)

    class Interrupted:
        def __enter__(self):
            calls = iter(range(1000))
            return lambda: next(calls) >= 3

        def __exit__(self, *_):
            return None

    with monkeypatch.context() as patch:
        patch.setattr(runner, "interruptible", Interrupted)
        patch.setattr(runner, "_CHUNK_SECONDS", 1e-9)
        part = run(sampler, checkpoint=tmp_path / "run")
    assert part.attrs["result"] == "interrupted"
    resumed = run(sampler, checkpoint=tmp_path / "run")
    np.testing.assert_array_equal(resumed.posterior["position"], whole.posterior["position"])
    with pytest.raises(erg.run.checkpoint.CheckpointError, match="shared_batches"):
        run(sampler, checkpoint=tmp_path / "run", shared_batches=False)


def test_is_recorded_and_told():
    dt = run(sgld())
    assert dt.attrs["shared_batches"] == 1
    sentence = erg.diagnose(dt)["chains"].sentence
    assert "same batch" in sentence
    assert "same batch" not in erg.diagnose(run(sgld(), shared_batches=False))["chains"].sentence


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (
            lambda p: erg.samplers.SGLD(erg.estimators.Minibatch(p, scheme="full"), 1e-3),
            "needs a sampler whose gradient draws batches",
        ),
        (
            lambda p: erg.samplers.SGLD(erg.estimators.SAGA(erg.estimators.Minibatch(p, 10), centre=p.initial), 1e-3),
            "SAGA takes no batch that is handed over",
        ),
        (
            lambda p: erg.samplers.AMAGOLD(erg.estimators.Minibatch(p, 10, "uniform"), 1e-3, 2),
            "batch= cannot be handed over",
        ),
    ],
)
def test_what_cannot_share_says_so(make, error):
    with pytest.raises(ValueError, match=error):
        run(make(gaussian_mean()))


@pytest.mark.parametrize("wrapper", ["ControlVariate", "SVRG"])
@pytest.mark.swept_after(1)
def test_wrapped_estimators_share(wrapper):
    posterior = gaussian_mean()
    gradient = getattr(erg.estimators, wrapper)(erg.estimators.Minibatch(posterior, 10), centre=posterior.initial)
    sampler = erg.samplers.Averaged(erg.samplers.SGLD(gradient, 1e-3, temperature=0.0))
    draws = run(sampler).posterior["position"].values
    np.testing.assert_array_equal(draws, np.broadcast_to(draws[:1], draws.shape))
