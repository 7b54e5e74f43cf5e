"""What a server lets through: false alarms at the stated rate, jumps refused, and how far a hostile client gets."""

import numpy as np
import pytest
from scipy import stats

from ergodica.run.admission import DisplacementBound, SurrogateError, check_surrogate, reach
from ergodica.run.federated_law import ClientSteps, federated_law
from ergodica.run.orders import Reply
from ergodica.run.rounds import run_rounds
from tests.support.fake_clients import GaussianClients, Perfect, make_rounds, positions
from tests.support.statistics import REJECTION, assert_mean, z_scores

P = np.array([[3.0, 0.8], [0.8, 1.5]])
SHARES = np.full(3, 1 / 3)


def clients(noise=5.0):
    """Three clients with exact surrogates, so that all have one drift."""
    return GaussianClients(np.stack([P] * 3), np.tile([1.0, -0.5], (3, 1)), 0.05, np.stack([noise * np.eye(2)] * 3))


def bound_of(model, alpha=1e-6, slack=1.0, stride=5, local_steps=20):
    steps = np.full(3, local_steps)
    return DisplacementBound(model.steps(), steps, stride, model.size, false_rejection=alpha, slack=slack)


def rounds_of(model, bound, **settings):
    settings = {"num_visits": 40, "num_chains": 5, "seed": 2, "stride": 5, "patience": 5.0, **settings}
    return make_rounds(model, shares=SHARES, local_steps=20, bound=bound, **settings)


def test_residuals_are_standard_normal_and_alarms_come_at_the_rate():
    """At alpha = 0.2, 2000 honest visits: refused less often than alpha, and no less often than a single comparison would be."""
    model, bound = clients(), bound_of(clients(), alpha=0.2)
    rounds = rounds_of(model, None, num_chains=50)
    transport, found, refused = Perfect(model), [], []
    while not rounds.done:
        before = {c: chain.state for c, chain in enumerate(rounds.chains)}
        for order in rounds.issue({0, 1, 2}, 0.0):
            answer = transport.clients.answer(order)
            start = np.asarray(before[order.chain][0])
            arguments = (order.client, start, answer.positions[0], answer.state[0])
            found.append(bound.residuals(*arguments)[-1])
            refused.append(bound.verdict(*arguments) is not None)
            rounds.offer(answer)
    found, refused = np.array(found), np.array(refused, float)
    assert len(found) == 2000
    assert_mean(found[:, 0] ** 2, 1.0, smallest_error=0.2)
    assert_mean(found[:, 1] ** 2, 1.0, smallest_error=0.2)
    assert abs(z_scores(found[:, 0] * found[:, 1], 0.0)) < 5
    assert z_scores(refused, 0.2) < 5
    assert z_scores(refused, 0.2 / 4) > -5


def test_a_bound_without_the_batch_noise_refuses_honest_clients():
    """The mutant: a law without the noise of the gradients is too narrow, and that is seen."""
    noisy, quiet = clients(noise=400.0), bound_of(clients(noise=0.0), alpha=0.01)
    rounds = rounds_of(noisy, None)
    (order, *_) = rounds.issue({0, 1, 2}, 0.0)
    answer = noisy.answer(order)
    assert quiet.verdict(order.client, np.zeros(2), answer.positions[0], answer.state[0]) is not None
    assert bound_of(noisy, alpha=0.01).verdict(order.client, np.zeros(2), answer.positions[0], answer.state[0]) is None


class Pushing(Perfect):
    """One client moves the chain, at the end of each of its visits, by so many of the law's standard deviations from its mean."""

    def __init__(self, model, bound, radius, hostile=1):
        super().__init__(model)
        self.bound, self.radius, self.hostile = bound, radius, hostile

    def receive(self, seconds):
        out = []
        for visit in self.sent:
            reply = self.clients.answer(visit)
            if visit.client == self.hostile:
                laws, n = self.bound.laws, len(reply.positions[0])
                mean = laws.transition[:n, visit.client] @ visit.state[0] + laws.drift[:n, visit.client]
                way = self.bound.roots[0, :n, visit.client] @ np.array([1.0, 0.0]) * self.radius
                reply = Reply(visit.id, visit.client, (mean[-1] + way[-1], reply.state[1]), (mean + way,))
            out.append(reply)
        self.sent = []
        return out


def test_a_hostile_jump_is_refused_and_the_rest_of_the_run_is_right():
    model, bound = clients(), bound_of(clients())
    rounds = rounds_of(model, bound, num_chains=40)
    transport = Pushing(model, bound, radius=1.01 * bound.radius[1])
    run_rounds(rounds, transport, clock=transport.clock, poll=0.0)
    assert rounds.refused[1, "displaced"] == 3
    assert rounds.suspended == {1}
    ends = positions(rounds, slice(10, None)).mean(1)
    assert_mean(ends[:, 0], np.linalg.solve(P, [1.0, -0.5])[0], smallest_error=0.3)


def test_within_the_bound_it_moves_the_mean_as_far_as_the_formula_says():
    """One hostile client of three; 40 chains see an error of 10% of the shift, which honest clients would fail."""
    model, bound = clients(), bound_of(clients())
    rounds = rounds_of(model, bound, num_chains=40)
    transport = Pushing(model, bound, radius=0.999 * bound.radius[1])
    run_rounds(rounds, transport, clock=transport.clock, poll=0.0)
    assert not rounds.refused
    A, root = bound.laws.transition[-1, 1], bound.roots[0, -1, 1]
    shift = np.linalg.solve(np.eye(2) - A, root @ [0.999 * bound.radius[1] / 3, 0.0])
    ends = np.stack([[p[0][-1] for p in d.positions[10:]] for d in rounds.draws]).mean(1)
    centre = np.linalg.solve(P, [1.0, -0.5])
    # the order of visits is random, so chains that share it are not independent: each chain has its own
    assert_mean(ends[:, 0] - centre[0], shift[0], smallest_error=0.3)
    assert abs(z_scores(ends[:, 0], centre[0])) > REJECTION
    steps = model.steps()
    honest = federated_law(steps, SHARES, 20).visits.covariance
    in_sd = np.linalg.norm(np.linalg.solve(np.linalg.cholesky(honest), shift)) / 0.999
    assert in_sd <= bound.reach(1, 1 / 3) * (1 + 1e-9)
    assert in_sd > 0.8 * bound.reach(1, 1 / 3)


def test_a_steady_push_shows_in_the_running_mean():
    model, bound = clients(), bound_of(clients())
    rounds = rounds_of(model, bound)
    transport = Pushing(model, bound, radius=1.0)
    run_rounds(rounds, transport, clock=transport.clock, poll=0.0)
    z = np.abs(bound.push) * np.sqrt(bound.visits)[:, None]
    assert bound.visits.sum() == 200
    assert z[1, 0] > REJECTION - 1
    assert z[[0, 2]].max() < 5


def test_reach_of_one_parameter_is_the_closed_form():
    """p rho sqrt((1 + A) / (1 - A)): the longer the visits, the less of it."""
    for A in (0.1, 0.9):
        found = reach(np.array([[A]]), np.array([[0.3]]), 5.0, 0.25)
        assert found == pytest.approx(0.25 * 5 * np.sqrt((1 + A) / (1 - A)))


def test_momentum_is_bounded_too():
    transition = np.array([[1.0, 0.1], [-0.1, 0.8]])
    added = np.array([[0.01, 0.001], [0.001, 0.2]])
    steps = ClientSteps(transition[None], np.zeros((1, 2)), added[None])
    bound = DisplacementBound(steps, np.array([10]), 10, 1, false_rejection=1e-6)
    good = np.zeros(2)
    assert bound.verdict(0, np.zeros(2), good[None, :1], good) is None
    assert "momentum" in bound.verdict(0, np.zeros(2), good[None, :1], np.array([0.0, 50.0]))
    assert bound.radius[0] == pytest.approx(np.sqrt(stats.chi2.isf(0.5e-6, 1)))
    with pytest.raises(ValueError, match="carries its last gradient"):
        DisplacementBound(steps, np.array([10]), 10, 3)


EYE = np.eye(2)


@pytest.mark.parametrize(
    ("linear", "precision", "noise", "message"),
    [
        (np.zeros(2), EYE * np.nan, EYE, "finite"),
        (np.array([0.0, np.inf]), EYE, EYE, "finite"),
        (np.zeros(2), -EYE, EYE, "positive definite"),
        (np.zeros(2), np.diag([1.0, 0.0]), EYE, "positive definite"),
        (np.zeros(2), np.array([1.0, -1.0]), np.ones(2), "positive definite"),
        (np.zeros(2), np.array([[1.0, 0.5], [-0.5, 1.0]]), EYE, "symmetric"),
        (np.zeros(3), EYE, EYE, "shapes"),
        (np.zeros(2), np.ones((2, 3)), EYE, "shapes"),
        (np.zeros(2), EYE, -EYE, "noise"),
        (np.zeros(2), EYE.astype(int), EYE, "floating"),
        (np.zeros(2), EYE * 1e6, EYE, "largest allowed"),
    ],
)
def test_surrogates_that_are_none_are_refused(linear, precision, noise, message):
    with pytest.raises(SurrogateError, match=message):
        check_surrogate(linear, precision, noise, 2, largest=100.0)


def test_surrogates_of_honest_clients_pass():
    check_surrogate(np.zeros(2), P, np.zeros((2, 2)), 2, largest=100.0)
    check_surrogate(np.zeros(2, np.float32), P.astype(np.float32), np.outer([1.0, 2.0], [1.0, 2.0]), 2)
    check_surrogate(np.zeros(2), np.ones(2), np.zeros(2), 2)
