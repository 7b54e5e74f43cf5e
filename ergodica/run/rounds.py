"""The server's side of federated sampling, without a network: which chain is where, and which results are believed.

A chain's visit to a client is an order with an id. It is issued, perhaps issued again, and answered once: `Rounds` is the state
machine, `run_rounds` drives it over any `Transport`.
"""

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from ergodica.run import participation
from ergodica.run.admission import DisplacementBound
from ergodica.run.journal import Journal
from ergodica.run.orders import Plan, Reply, Transport, Visit, place_of, visit_words

logger = logging.getLogger("ergodica.rounds")


class Draws(NamedTuple):
    """Accepted visits of one chain: client, share and positions of each."""

    client: list[int]
    share: list[float]
    positions: list[tuple[np.ndarray, ...]]


@dataclass
class Chain:
    """Where a chain is: its state, the visit under way, the client that has it, and since when it has been sent, or waits."""

    state: tuple[np.ndarray, ...]
    visit: int = 0
    attempt: int = 0
    steps: int = 0
    client: int = -1
    share: float = 1.0
    sent: float | None = None
    absent: float | None = None


class RoundsError(RuntimeError):
    """A run that cannot go on. What was accepted is in the journal."""


@dataclass
class Rounds:
    r"""Which chain is where; takes replies, refuses those that cannot be right, and writes down what it accepts.

    Parameters
    ----------
    plan : Plan
    order : callable
        ``order(chain, visit) -> client``: whose visit it is, unless that client is absent or was refused.
    starts : sequence of tuples of arrays
        Leaves of a state for each chain, or of a position alone: then the first visit makes the rest, and has no bound.
    template : sequence of (shape, dtype)
        Of the leaves of a state; those of the position come first.
    num_leaves : int
        How many leaves a position has.
    journal : Journal, optional
        What it holds of this run is taken up.
    bound : DisplacementBound, optional
        Refuses results that the step's own law does not allow.
    chain_words : uint32 array (C, 2), optional
        The chains' keys, for ``keys="chain"``.

    Notes
    -----
    A visit's key, start and number of steps are functions of its id, so a site that is asked twice gives the same answer: it does
    not matter which of the two arrives, and no result can be chosen by sending an order again. An *attempt* is another client
    for the same visit; answers to the attempts before are refused as stale.

    With ``absent="wait"`` the order of visits is the planned one whatever the network does. With ``"redraw"`` the rates change, and
    have to be estimated; the law is right if a client's absence does not depend on where the chain is. A client that is gone
    for good is represented by its surrogate: with shares that are those actually made, the mean gradient over the others is
    that of the posterior with :math:`p(x_s \mid \theta)` replaced by :math:`q_s`.
    """

    plan: Plan
    order: Callable[[int, int], int]
    starts: Sequence[tuple[np.ndarray, ...]]
    template: Sequence[tuple[tuple[int, ...], Any]]
    num_leaves: int = 1
    journal: Journal | None = None
    bound: DisplacementBound | None = None
    chain_words: np.ndarray | None = None
    refused: Counter = field(default_factory=Counter)
    suspended: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        plan = self.plan
        if len(self.starts) != plan.num_chains:
            raise ValueError(f"starts must have one start a chain, {plan.num_chains}; got {len(self.starts)}.")
        if plan.keys == "chain" and self.chain_words is None:
            raise ValueError("keys='chain' needs chain_words, the chains' keys.")
        self.chains = [Chain(tuple(np.asarray(x) for x in start)) for start in self.starts]
        self.draws = [Draws([], [], []) for _ in self.chains]
        self.seen = participation.no_intervals(plan.num_chains, len(plan.shares))
        self._strikes = Counter()
        self._replaying = False
        for c in range(plan.num_chains):
            self._assign(c)
        if self.journal is not None:
            self._replay(self.journal.records)

    @property
    def done(self) -> bool:
        """Whether every chain has made all its visits."""
        return all(chain.visit == self.plan.num_visits for chain in self.chains)

    @property
    def shares(self) -> np.ndarray:
        """What gradients are divided by, of visits that are issued now."""
        if self.plan.estimate_shares == "never":
            return self.plan.shares
        return participation.shares(self.seen, self.plan.local_steps, self.plan.shares)

    def issue(self, available: set[int], now: float) -> list[Visit]:
        """Give the orders that are to be sent to clients that are there."""
        if len(self.suspended) == len(self.plan.shares):
            raise RoundsError("All clients were left out, since their results were refused; see the log.")
        found = []
        for c, chain in enumerate(self.chains):
            if chain.visit < self.plan.num_visits and chain.sent is None and chain.client in available:
                chain.sent = now
                found.append(self._visit(c))
        return found

    def expire(self, available: set[int], now: float) -> None:
        """Send again, or give to another client, what has had no answer for too long."""
        others = available - self.suspended
        for c, chain in enumerate(self.chains):
            if chain.visit == self.plan.num_visits:
                continue
            if chain.sent is not None or chain.client in available:
                chain.absent = None
            elif chain.absent is None:
                chain.absent = now
            since = chain.absent if chain.sent is None else chain.sent
            if since is None or now - since < self.plan.patience:
                continue
            if self.plan.absent == "redraw" and others:
                self._reassign(c, "no answer", others)
            chain.sent = chain.absent = None

    def offer(self, reply: Reply) -> str:
        """Take a reply: ``"accepted"``, or why it is refused."""
        place = place_of(reply.id, self.plan)
        if place is None:
            return self._refuse(reply, "unknown", "no such visit was issued")
        c, visit, attempt = place
        chain = self.chains[c]
        if reply.lost:
            if (visit, attempt) == (chain.visit, chain.attempt):
                chain.sent = None
            return "lost"
        if visit < chain.visit:
            return self._refuse(reply, "duplicate", "that visit is over")
        if visit > chain.visit or attempt > chain.attempt:
            return self._refuse(reply, "unknown", "no such visit was issued")
        if attempt < chain.attempt:
            return self._refuse(reply, "stale", "the visit was given to another client")
        if reply.client != chain.client:
            return self._refuse(reply, "wrong client", f"the visit is client {chain.client}'s")
        problem = self._problem(c, reply)
        if problem is not None:
            verdict = self._refuse(reply, *problem)
            if not self._strike(reply.client):  # else all its visits have been given to others
                among = self._trusted()
                self._reassign(c, verdict, among - {reply.client} or among)  # the same client would answer the same
            return verdict
        share = chain.share
        if self.journal is not None:
            entry = {
                "kind": "accept",
                "id": reply.id,
                "client": chain.client,
                "share": share,
                "leaves": len(reply.state),
            }
            self.journal.append(entry, [*reply.state, *reply.positions])
        self._accept(c, reply.state, reply.positions, share)
        return "accepted"

    def _accept(self, c: int, state: tuple, positions: tuple, share: float) -> None:
        chain, plan = self.chains[c], self.plan
        if self.bound is not None and self._bounds(chain):
            before, after = self._vector(chain.state), self._vector(state)
            self.bound.admit(chain.client, before, self._rows(positions), after)
        self._strikes[chain.client] = 0
        if plan.estimate_shares == "always" or chain.visit < plan.num_warmup:
            self.seen = participation.observe(self.seen, c, chain.client, chain.steps)
        kept = self.draws[c]
        kept.client.append(chain.client)
        kept.share.append(share)
        kept.positions.append(positions)
        chain.steps += int(plan.local_steps[chain.client])
        chain.state, chain.visit, chain.attempt, chain.sent = state, chain.visit + 1, 0, None
        self._assign(c)

    def _assign(self, c: int) -> None:
        """Find whose the next visit is; one that was left out is passed over."""
        chain = self.chains[c]
        if chain.visit < self.plan.num_visits:
            chain.client = int(self.order(c, chain.visit))
            if chain.client in self.suspended and len(self.suspended) < len(self.plan.shares):
                self._reassign(c, "left out", self._trusted())
            chain.share = float(
                self.shares[chain.client]
            )  # fixed here, so that an order is the same when it is sent again

    def _reassign(self, c: int, reason: str, among: set[int]) -> None:
        chain, plan = self.chains[c], self.plan
        chain.attempt, chain.sent = chain.attempt + 1, None
        if not among:
            return
        rng = np.random.default_rng([plan.seed, c, chain.visit, chain.attempt])
        clients = sorted(among)
        p = plan.probabilities[clients]
        chain.client = int(rng.choice(clients, p=p / p.sum()))
        chain.share = float(self.shares[chain.client])
        if not self._replaying:
            logger.info("chain %d: visit %d goes to client %d (%s)", c, chain.visit, chain.client, reason)
            if self.journal is not None:
                entry = {"chain": c, "visit": chain.visit, "attempt": chain.attempt, "client": chain.client}
                self.journal.append({"kind": "reassign", **entry, "reason": reason})

    def _refuse(self, reply: Reply, verdict: str, why: str) -> str:
        self.refused[reply.client, verdict] += 1
        logger.warning("refused a result of client %d for visit %s, %s: %s", reply.client, reply.id, verdict, why)
        return verdict

    def _strike(self, client: int) -> bool:
        """Count a refusal; leave the client out, and say so, where there were too many in a row."""
        self._strikes[client] += 1
        if self._strikes[client] < self.plan.max_refusals:
            return False
        self.suspended.add(client)
        logger.error("client %d is left out: %d results in a row were refused", client, self._strikes[client])
        if self.journal is not None:
            self.journal.append({"kind": "suspend", "client": client})
        for c, chain in enumerate(self.chains):
            if chain.client == client and chain.visit < self.plan.num_visits:
                self._reassign(c, "left out", self._trusted())
        return True

    def _problem(self, c: int, reply: Reply) -> tuple[str, str] | None:
        """Say what is wrong with the content of a reply."""
        chain, plan = self.chains[c], self.plan
        if reply.error is not None:
            return "failed", reply.error
        count = int(plan.local_steps[chain.client]) // plan.stride
        of_positions = [((count, *shape), dtype) for shape, dtype in self.template[: self.num_leaves]]
        got = [(x.shape, x.dtype) for x in (*reply.state, *reply.positions)]
        if got != [(tuple(s), np.dtype(d)) for s, d in (*self.template, *of_positions)]:
            return "malformed", f"its arrays are {got}"
        floating = [x for x in (*reply.state, *reply.positions) if np.issubdtype(x.dtype, np.floating)]
        if not all(np.all(np.isfinite(x)) for x in floating):
            return "nonfinite", "it holds NaN or infinity"
        if not all(np.array_equal(x[-1], y) for x, y in zip(reply.positions, reply.state, strict=False)):
            return "inconsistent", "its last position is not that of its state"
        expected = chain.steps + int(plan.local_steps[chain.client])
        if any(np.any(x != expected) for x in reply.state if np.issubdtype(x.dtype, np.integer)):
            return "inconsistent", f"it does not count {expected} steps"
        if self.bound is not None and self._bounds(chain):
            before, after = self._vector(chain.state), self._vector(reply.state)
            why = self.bound.verdict(chain.client, before, self._rows(reply.positions), after)
            if why is not None:
                return "displaced", why
        return None

    def _trusted(self) -> set[int]:
        return set(range(len(self.plan.shares))) - self.suspended

    def _bounds(self, chain: Chain) -> bool:
        """Whether there is a bound for a visit that starts so; a first one may start without its momentum."""
        return self.bound is not None and self._vector(chain.state).size == self.bound.laws.drift.shape[-1]

    def _vector(self, state: tuple) -> np.ndarray:
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in state if np.issubdtype(x.dtype, np.floating)])

    def _rows(self, positions: tuple) -> np.ndarray:
        return np.concatenate([np.asarray(x, np.float64).reshape(len(x), -1) for x in positions], axis=1)

    def _visit(self, c: int) -> Visit:
        chain, plan = self.chains[c], self.plan
        by_chain = plan.keys == "chain"
        words = self.chain_words[c] if by_chain else visit_words(plan.seed, c, chain.visit)  # pyright: ignore[reportOptionalSubscript]
        return Visit(
            id=f"{c}.{chain.visit}.{chain.attempt}",
            chain=c,
            client=chain.client,
            words=np.asarray(words, np.uint32),
            first_step=chain.steps if by_chain else 0,
            count=chain.steps,
            num_steps=int(plan.local_steps[chain.client]),
            stride=plan.stride,
            share=chain.share,
            state=chain.state,
        )

    def _replay(self, records: Iterable[tuple[dict, list[np.ndarray]]]) -> None:
        self._replaying = True
        for entry, arrays in records:
            if entry.get("kind") == "accept":
                c, _, _ = (int(x) for x in entry["id"].split("."))
                self.chains[c].client = entry["client"]
                leaves = entry["leaves"]
                self._accept(c, tuple(arrays[:leaves]), tuple(arrays[leaves:]), entry["share"])
            elif entry.get("kind") == "reassign":
                chain = self.chains[entry["chain"]]
                chain.attempt, chain.client = entry["attempt"], entry["client"]
                chain.share = float(self.shares[chain.client])
            elif entry.get("kind") == "suspend":
                self.suspended.add(entry["client"])
        self._replaying = False


def run_rounds(
    rounds: Rounds,
    transport: Transport,
    *,
    clock: Callable[[], float] = time.monotonic,
    poll: float = 0.2,
    give_up_after: float = 3600.0,
) -> None:
    """Send and receive until every chain has made its visits.

    Parameters
    ----------
    rounds : Rounds
    transport : Transport
    clock : callable
        Seconds.
    poll : float
        Seconds to wait for replies at a time.
    give_up_after : float
        Seconds without a single accepted result after which the run is given up.

    Raises
    ------
    RoundsError
        If it is given up. A run with the same journal goes on where this one ended.
    """
    progress = clock()
    while not rounds.done:
        now = clock()
        available = transport.available()
        rounds.expire(available, now)
        orders = rounds.issue(available, now)
        if orders:
            transport.send(orders)
        for reply in transport.receive(poll):
            if rounds.offer(reply) == "accepted":
                progress = clock()
        if clock() - progress > give_up_after:
            raise RoundsError(
                f"No result was accepted for {give_up_after:.0f} s; clients that can be reached: {sorted(available)}. Run the "
                "same again when they are back: what was accepted is in the journal."
            )
