"""Shares from intervals: 1/f without bias, where a frequency is biased, and what that does to a posterior."""

import numpy as np
import pytest

from ergodica.run.federated_law import federated_law
from ergodica.run.participation import no_intervals, observe, shares
from ergodica.run.rounds import run_rounds
from tests.support.fake_clients import Perfect, federated, make_rounds
from tests.support.statistics import REJECTION, assert_mean, z_scores

RATES = np.array([0.1, 0.3, 0.6])
STEPS = np.array([20, 10, 10])
SHARES = RATES * STEPS / (RATES @ STEPS)


def visits_until(rng, client, intervals):
    """Clients of one chain's visits, until one of them has been visited so often that it has some intervals."""
    found, left = [], intervals + 1
    while left:
        found.append(int(rng.choice(3, p=RATES)))
        left -= found[-1] == client
    return found


def seen_after(visits):
    seen, step = no_intervals(1, 3), 0
    for client in visits:
        seen = observe(seen, 0, client, step)
        step += STEPS[client]
    return seen


@pytest.fixture(scope="module")
def orders():
    rng = np.random.default_rng(0)
    return [visits_until(rng, 0, 3) for _ in range(1500)]


def test_inverse_shares_have_no_bias(orders):
    """From 3 intervals each; an error of 15% would be seen."""
    inverse = np.array([1 / shares(seen_after(v), STEPS, SHARES, weight=0)[0] for v in orders])
    assert_mean(inverse, 1 / SHARES[0], smallest_error=0.15)


def test_a_frequency_is_rejected(orders):
    """The mutant: steps at a client over all steps, inverted, after a number of visits that is fixed beforehand."""

    def inverse(rng):
        visits = rng.choice(3, size=40, p=RATES)
        at = STEPS[visits[visits == 0]].sum()
        return STEPS[visits].sum() / at if at else np.nan

    rng = np.random.default_rng(1)
    found = np.array([inverse(rng) for _ in range(3000)])
    assert abs(z_scores(found[np.isfinite(found)], 1 / SHARES[0])) > REJECTION


def test_intervals_pool_over_chains_but_do_not_run_between_them():
    seen = no_intervals(2, 2)
    for chain, client, step in [(0, 0, 0), (1, 0, 5), (0, 1, 10), (1, 0, 25), (0, 0, 30)]:
        seen = observe(seen, chain, client, step)
    assert seen.total.tolist() == [50, 0]
    assert seen.count.tolist() == [2, 0]


def test_before_anything_is_seen_the_prior_holds():
    for weight in (0.0, 2.0):
        np.testing.assert_allclose(shares(no_intervals(2, 3), STEPS, SHARES, weight), SHARES)


def test_they_converge_to_the_shares_of_steps():
    rng = np.random.default_rng(2)
    np.testing.assert_allclose(
        shares(seen_after(rng.choice(3, size=20000, p=RATES)), STEPS, np.full(3, 1 / 3)), SHARES, rtol=0.06
    )


def law(divided_by, surrogates=None):
    clients = federated([2.0, 4.0, 6.0], [-2.0, 0.5, 1.0], 0.1, 0.01, divided_by, surrogates)
    steps = clients.steps()
    return federated_law(steps._replace(added=np.broadcast_to(steps.added, steps.transition.shape)), RATES, STEPS).steps


def test_what_estimated_shares_do_to_the_posterior():
    """The exact law, given shares that were frozen after a warm-up, against that of known shares.

    Without surrogates the mean is off until the shares are right; with exact ones it never is. The bias falls with the visits.
    """
    posterior = (2 * -2 + 4 * 0.5 + 6 * 1) / 12.1
    exact = ([2.0, 4.0, 6.0], [-2.0, 0.5, 1.0])
    assert law(SHARES).mean[0] == pytest.approx(posterior, abs=0.05)
    rng, error = np.random.default_rng(3), {}
    for count in (20, 320):
        estimates = [
            shares(seen_after(rng.choice(3, size=count, p=RATES)), STEPS, np.full(3, 1 / 3)) for _ in range(60)
        ]
        error[count] = np.sqrt(np.mean([(law(f).mean[0] - law(SHARES).mean[0]) ** 2 for f in estimates]))
        for f in estimates[:5]:
            assert law(f, exact).mean[0] == pytest.approx(posterior, abs=1e-9)
    assert error[320] < 0.4 * error[20]


def test_a_run_with_unknown_rates_finds_them():
    """Visits of absent clients are redrawn among those there; shares of steps come out as they were made."""

    class Moody(Perfect):
        rng = np.random.default_rng(4)

        def available(self):
            self.time += 1.0
            return {s for s in range(3) if self.rng.random() < (0.2, 1.0, 1.0)[s]}

    clients = federated([2.0, 4.0, 6.0], [-2.0, 0.5, 1.0], 0.1, 0.01, SHARES)
    rounds = make_rounds(
        clients, shares=np.full(3, 1 / 3), local_steps=10, num_visits=400, num_warmup=300, num_chains=4, seed=1, stride=10,
        absent="redraw", estimate_shares="warmup", patience=1.0,
    )  # fmt: skip
    transport = Moody(clients)
    run_rounds(rounds, transport, clock=transport.clock, poll=0.0)
    made = np.bincount(np.concatenate([d.client for d in rounds.draws]), minlength=3) / 1600
    assert made[0] < 0.25, "the first client is often absent"
    np.testing.assert_allclose(rounds.shares, made, rtol=0.2)
    for d in rounds.draws:  # and the estimate rests, from when all chains are through the warm-up
        assert len({share for share, client in zip(d.share[320:], d.client[320:], strict=True) if client == 1}) == 1
