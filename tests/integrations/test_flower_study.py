"""The two sides of a federated study, joined without a network: the law, the journal, and what a site needs to know."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.estimators.federated.surrogates import Natural
from ergodica.integrations.flower.client import site_words
from ergodica.integrations.flower.server import make_rounds, run_study, surrogate_arrays
from ergodica.integrations.flower.study import Study
from ergodica.run.checkpoint import CheckpointError
from ergodica.run.orders import Plan, Reply, Visit
from ergodica.run.rounds import Rounds, RoundsError, run_rounds
from ergodica.samplers.site import Site
from tests.integrations.federated_study import (
    NAMES,
    Direct,
    everyone,
    exact_law,
    exact_posterior,
    make,
    rows,
    sgld,
    study,
)
from tests.support.statistics import assert_mean


def expansions_at(spec, centre):
    return [spec.expand(make(rows(name)), i, centre) for i, name in enumerate(NAMES)]


def draws(datatree):
    return datatree.posterior["position"].values


@pytest.mark.sweep
def test_expansions_of_all_sites_add_up_to_the_posterior():
    spec, centre = study(), jnp.array([0.3, -0.2])
    found = expansions_at(spec, centre)
    mean, precision = exact_posterior()
    np.testing.assert_allclose(sum(e.precision for e in found), precision, rtol=1e-5)
    mode, length = spec.newton_step(centre, found)
    np.testing.assert_allclose(mode, mean, rtol=1e-4, atol=1e-5)
    away = np.asarray(centre) - mean
    assert length == pytest.approx(np.sqrt(away @ precision @ away), rel=1e-4)


@pytest.mark.parametrize("settings", [{"estimate_shares": "warmup"}, {"strength": 0.5}, {}])
@pytest.mark.sweep
def test_the_bounds_law_is_that_of_the_sites(settings):
    """Its drift is the mean gradient of the site's kernel, whose likelihood is quadratic, at two points."""
    spec, centre = study(**settings), jnp.array([0.8, -0.4])
    found = expansions_at(spec, centre)
    of_client = surrogate_arrays(centre, found)
    rounds = make_rounds(spec, centre, found, None)
    for client, name in enumerate(NAMES):
        own, total = Natural(*of_client[client][1:3]), Natural(*of_client[client][3:5])
        gradient = spec.gradient(make(rows(name)), 1 / 3, centre, own, total)
        for point in (jnp.array([0.5, 0.1]), jnp.array([1.3, -0.9])):
            drift = jax.grad(gradient.mean_log_density)(point, jnp.array(0))
            laws = rounds.bound.laws
            moved = np.asarray(point) + 2e-3 * np.asarray(drift)
            # the law of the shortest stretch that is kept, 10 steps, from the drift of one
            F = np.eye(2) - 2e-3 * -np.asarray(jax.hessian(gradient.mean_log_density)(point, jnp.array(0)))
            expected = np.asarray(point, float)
            for _ in range(10):
                expected = moved + F @ (expected - np.asarray(point))
            np.testing.assert_allclose(
                laws.transition[0, client] @ np.asarray(point) + laws.drift[0, client], expected, rtol=2e-4, atol=1e-5
            )


def test_the_same_keys_make_the_steps_of_the_sampler_in_one_process():
    """Orders with the chains' keys, over `Site`: every stored position is that of `ergodica.sample`, to rounding."""
    data, client = everyone()
    sampler = erg.fsgld(make(data), client, step_size=2e-3, local_steps=20, batch_size=20, probabilities="uniform")
    key, start = jax.random.key(11), jnp.array([0.9, -0.5])
    dt = erg.sample(
        key, sampler, num_samples=200, num_warmup=0, num_chains=2, initial=start, probes=False, progress=False
    )
    order = dt.sample_stats["client_index"].values[:, ::20]
    words = jax.random.key_data(jax.random.split(jax.random.split(key, 4)[2], 2))
    plan = Plan(np.full(3, 1 / 3), np.full(3, 1 / 3), 20, num_visits=10, num_chains=2, stride=1, keys="chain")
    sites = [Site(sampler.only(i), start) for i in range(3)]

    class Sites(Direct):
        def receive(self, seconds):
            out = []
            for v in self.sent:
                settings = {"num_steps": v.num_steps, "stride": v.stride, "first_step": v.first_step, "share": v.share}
                out.append(Reply(v.id, v.client, *sites[v.client].visit(v.words, v.state, **settings)))
            self.sent = []
            return out

    template = sites[0].template.leaves
    starts = [(np.asarray(start),)] * 2
    rounds = Rounds(plan, lambda c, v: int(order[c, v]), starts, template, chain_words=np.asarray(words))
    run_rounds(rounds, Sites(study()))
    found = np.stack([np.concatenate([p[0] for p in d.positions]) for d in rounds.draws])
    np.testing.assert_allclose(found, draws(dt), rtol=1e-4, atol=1e-5)


@pytest.mark.swept_after(1)
def test_the_law_and_the_journal(tmp_path):
    """Mean and variances are those of the exact law; a second call with the same journal makes no visit.

    36 visits of 400 steps see an error of 20% in the variance, and of 1% in the mean's first coefficient.
    """
    spec = study(num_visits=13, seed=9)
    transport = Direct(spec, secret=b"0123456789abcdef")
    found = run_study(spec, transport, tmp_path / "journal")
    assert transport.messages == 39
    mean, covariance = exact_law()
    by_visit = draws(found).reshape(36, 40, 2)
    assert_mean(by_visit.mean(1), mean, smallest_error=0.06)
    assert_mean(((by_visit - mean) ** 2).mean(1), np.diag(covariance), smallest_error=0.35)
    again = Direct(spec)
    np.testing.assert_array_equal(draws(run_study(spec, again, tmp_path / "journal")), draws(found))
    assert again.messages == 0
    with pytest.raises(CheckpointError, match="kernel differ"):
        run_study(study(num_visits=13, seed=9, batch_size=10), Direct(spec), tmp_path / "journal")


@pytest.mark.sweep
def test_momentum_travels_and_is_bounded():
    """With BAOA: the momentum's law is in the bound, which honest visits pass; a site that sends a large momentum is refused."""

    class Pushing(Direct):
        def receive(self, seconds):
            return [
                r._replace(state=(r.state[0], r.state[1] + np.float32(100.0), *r.state[2:])) if r.client == 1 else r
                for r in super().receive(seconds)
            ]

    spec = study(
        num_visits=8, num_chains=2, local_steps=50, kernel=lambda g: erg.samplers.BAOA(g, step_size=0.03, friction=2.0)
    )
    honest = run_study(spec, Direct(spec), None)
    assert honest.attrs["refused"] == "{}"
    pushed = run_study(spec, Pushing(spec), None)
    assert '"1: displaced": 3' in pushed.attrs["refused"]
    assert pushed.attrs["left_out"] == '["south"]'


def test_a_kernel_that_carries_its_gradient_has_no_bound():
    spec = study(kernel=lambda g: erg.samplers.BAOAB(g, step_size=0.03, friction=2.0))
    centre = spec.start()
    with pytest.raises(ValueError, match="carries its last gradient"):
        make_rounds(spec, centre, expansions_at(spec, centre), None)


def test_a_site_that_lies_about_its_data_is_named():
    class Lying(Direct):
        def ask(self, kind, theta, clients):
            found = super().ask(kind, theta, clients)
            for client, content in found:
                if client == 1:
                    content.array_records["expansion"]["1"].x *= -1
            return found

    with pytest.raises(RoundsError, match=r"'south' is refused.*positive definite"):
        run_study(study(), Lying(study()), None)


def test_a_surrogate_that_cannot_be_read_is_asked_for_again(caplog):
    class Stuttering(Direct):
        count = 0

        def ask(self, kind, theta, clients):
            found = super().ask(kind, theta, clients)
            for client, content in found:
                if client == 2 and self.count < 2:
                    self.count += 1
                    del content.array_records["expansion"][str(self.count)]
            return found

    spec, transport = study(num_visits=2, num_chains=1), Stuttering(study())
    run_study(spec, transport, None)
    assert transport.count == 2
    assert caplog.text.count("refused the surrogate of client 'west'") == 2


def test_a_secret_makes_keys_that_the_order_does_not_tell():
    order = Visit("0.1.0", 0, 0, np.array([1, 2], np.uint32), 0, 0, 10, 1, 0.5, ())
    first, again = site_words(order, b"a" * 16), site_words(order, b"a" * 16)
    assert first.tolist() == again.tolist()
    assert site_words(order, None).tolist() == [1, 2]
    others = [site_words(order, b"b" * 16), site_words(order._replace(words=np.array([1, 3], np.uint32)), b"a" * 16)]
    assert all(first.tolist() != other.tolist() for other in others)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_visits": 0}, "num_visits"),
        ({"shares": "sizes"}, "shares"),
        ({"shares": [0.5, 0.5]}, "clients|shape|broadcast"),
        ({"covariance": "low"}, "covariance"),
        ({"max_norm": 1.0}, "batch_size=None"),
        ({"noise_multiplier": 1.0}, "needs max_norm"),
        ({"keys": {"east": "…"}}, "east"),
    ],
)
def test_what_does_not_fit_is_said(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        study(**settings)


def test_names_must_differ():
    with pytest.raises(ValueError, match="differ"):
        Study(make, {}, sgld, ("a", "a"), num_visits=1)
