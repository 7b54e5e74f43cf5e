"""Clients of a Gaussian model in plain NumPy, and transports that misbehave, for the server of `ergodica.run.rounds`."""

import numpy as np

from ergodica.run.federated_law import ClientSteps
from ergodica.run.orders import Plan, Reply
from ergodica.run.rounds import Rounds

FLOAT, INT = np.dtype(np.float64), np.dtype(np.int32)


class GaussianClients:
    """SGLD on gradients ``b_s - P_s theta`` of a position with D numbers, whose state is the position and a count."""

    def __init__(self, curvature, drift, step_size, noise=None):
        self.P, self.b = np.asarray(curvature, float), np.asarray(drift, float)
        self.h, self.size = step_size, self.b.shape[1]
        self.noise = np.zeros_like(self.P) if noise is None else np.asarray(noise, float)

    @property
    def template(self):
        return [((self.size,), FLOAT), ((), INT)]

    def steps(self):
        eye = np.eye(self.size)
        added = 2 * self.h * eye + self.h**2 * self.noise
        return ClientSteps(eye - self.h * self.P, self.h * self.b, added)

    def answer(self, visit):
        """Do what an honest client does; a function of the order alone."""
        theta, root = np.asarray(visit.state[0], float), np.linalg.cholesky(self.steps().added[visit.client])
        P, b = self.P[visit.client], self.b[visit.client]
        noise = np.random.default_rng([*visit.words.tolist(), visit.first_step]).normal(
            size=(visit.num_steps, self.size)
        )
        stored = []
        for i in range(visit.num_steps):
            theta = theta + self.h * (b - P @ theta) + root @ noise[i]
            if (i + 1) % visit.stride == 0:
                stored.append(theta)
        count = np.asarray(visit.count + visit.num_steps, np.int32)
        return Reply(visit.id, visit.client, (theta, count), (np.stack(stored),))


def federated(curvatures, means, prior, step_size, shares, surrogates=None):
    """Clients with likelihoods N(mean_s, 1/curvature_s) and, where given, surrogates (precision_s, mean_s); one parameter."""
    L, m, f = (np.asarray(x, float) for x in (curvatures, means, shares))
    P, b = prior + L / f, L * m / f
    if surrogates is not None:
        Lq, mq = (np.asarray(x, float) for x in surrogates)
        P, b = P + Lq.sum() - Lq / f, b + (Lq * mq).sum() - Lq * mq / f
    return GaussianClients(P[:, None, None], b[:, None], step_size)


class Perfect:
    """Every order arrives, and is answered at once."""

    def __init__(self, clients, present=None):
        self.clients, self.time = clients, 0.0
        self.present = set(range(len(clients.b))) if present is None else present
        self.sent = []

    def clock(self):
        return self.time

    def available(self):
        self.time += 1.0
        return set(self.present)

    def send(self, visits):
        self.sent.extend(visits)

    def receive(self, seconds):
        out, self.sent = [self.clients.answer(v) for v in self.sent], []
        return out


class Chaotic(Perfect):
    """Loses orders and answers, repeats them, delays them out of order, and lets clients come and go."""

    def __init__(self, clients, seed, loss=0.2, repeat=0.3, delay=6, absence=0.2):
        super().__init__(clients)
        self.rng, self.loss, self.repeat, self.delay, self.absence = (
            np.random.default_rng(seed),
            loss,
            repeat,
            delay,
            absence,
        )
        self.under_way, self.old = [], []

    def available(self):
        self.time += 1.0
        return {s for s in self.present if self.rng.random() > self.absence}

    def receive(self, seconds):
        for visit in self.sent:
            if self.rng.random() < self.loss:
                continue
            for _ in range(1 + (self.rng.random() < self.repeat)):
                self.under_way.append((self.time + self.rng.integers(0, self.delay), self.clients.answer(visit)))
        self.sent = []
        due = [r for t, r in self.under_way if t <= self.time]
        self.under_way = [(t, r) for t, r in self.under_way if t > self.time]
        if self.old and self.rng.random() < 0.3:
            due.append(self.old[self.rng.integers(len(self.old))])  # a result from long ago
        self.old.extend(due)
        self.rng.shuffle(due)
        return [r for r in due if self.rng.random() > self.loss]


def make_rounds(clients, *, shares, local_steps=10, order=None, starts=None, **settings):
    """Rounds over such clients, with independent visits at rates that give the shares of steps."""
    known = {k: settings.pop(k) for k in ("journal", "bound") if k in settings}
    shares = np.asarray(shares, float)
    steps = np.broadcast_to(np.asarray(local_steps), shares.shape)
    rate = shares / steps / (shares / steps).sum()
    plan = Plan(probabilities=rate, shares=shares, local_steps=steps, **settings)
    if order is None:

        def order(chain, visit):
            return np.random.default_rng([99, plan.seed, chain, visit]).choice(len(rate), p=rate)

    starts = [(np.zeros(clients.size),)] * plan.num_chains if starts is None else starts
    return Rounds(plan, order, starts, clients.template, **known)


def positions(rounds, visits=slice(None)):
    """All stored positions (chain, draw, D)."""
    return np.stack([np.concatenate([p[0] for p in d.positions[visits]]) for d in rounds.draws])
