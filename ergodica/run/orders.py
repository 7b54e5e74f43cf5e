"""What passes between a server and its clients in federated sampling, and what a run of it is."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np

from ergodica.core import check


class Visit(NamedTuple):
    """What a client is asked to do.

    Attributes
    ----------
    id : str
        ``"chain.visit.attempt"``.
    chain, client : int
    words : uint32 array (2,)
        The key of the visit, or the chain's (`Plan.keys`).
    first_step : int
        Number of the first step, for the keys.
    count : int
        Steps that the chain has made.
    num_steps, stride : int
        Steps to make, and steps from one stored position to the next.
    share : float
        What the client's gradient is divided by.
    state : tuple of arrays
        Leaves of the inner kernel's state without its gradient; of the position alone, for a chain's first visit.
    """

    id: str
    chain: int
    client: int
    words: np.ndarray
    first_step: int
    count: int
    num_steps: int
    stride: int
    share: float
    state: tuple[np.ndarray, ...]


class Reply(NamedTuple):
    """What a client answers; ``error`` says why there is no result.

    Attributes
    ----------
    id : str
    client : int
        Who has answered, as the transport knows it, whatever the message says.
    state : tuple of arrays
    positions : tuple of arrays
        The stored positions, leaf by leaf, with the steps along the leading axis.
    error : str or None
    lost : bool
        Whether the transport knows that no answer will come: the client's connection broke.
    """

    id: str
    client: int
    state: tuple[np.ndarray, ...] = ()
    positions: tuple[np.ndarray, ...] = ()
    error: str | None = None
    lost: bool = False


class Transport(Protocol):
    """Carries visits to clients and replies back; it may lose, repeat, delay and reorder them."""

    def available(self) -> set[int]:
        """Clients that can be reached now."""
        ...

    def send(self, visits: Sequence[Visit]) -> None:
        """Send orders off; they need not arrive."""
        ...

    def receive(self, seconds: float) -> Iterable[Reply]:
        """Give replies that have come, after at most some seconds."""
        ...


@dataclass(frozen=True)
class Plan:
    """What a run of visits is.

    Parameters
    ----------
    probabilities : array (S,)
        Of *visits*; also of those that are drawn in place of an absent client's.
    shares : array (S,)
        Of *steps*: what gradients are divided by.
    local_steps : int array (S,)
        Steps of a visit.
    num_visits, num_warmup : int
        Visits of each chain in all, and how many of them at the start are dropped from the draws.
    num_chains : int
    stride : int
        Steps from one stored position to the next; divides the steps of every visit.
    seed : int
        Of keys, and of the clients that are drawn in place of absent ones.
    keys : {"visit", "chain"}
        A key for each visit, or one for each chain, by which sites make the steps that `ergodica.sample` would. With the
        chain's key, a client knows the noise of all other clients' steps, and so their gradients: for tests.
    absent : {"wait", "redraw"}
        Whether a visit waits for its client, or is given to one that is there after ``patience`` seconds.
    estimate_shares : {"never", "warmup", "always"}
        Whether shares are estimated from who takes part (`ergodica.run.participation`), and for how long.
    patience : float
        Seconds after which a visit without an answer is sent again, or redrawn. More than the longest visit takes: a site that is
        still at work would be asked again and again, and its answers come too late.
    max_refusals : int
        Results refused one after the other, after which a client is left out for the rest of the run.
    """

    probabilities: np.ndarray
    shares: np.ndarray
    local_steps: np.ndarray
    num_visits: int
    num_warmup: int = 0
    num_chains: int = 1
    stride: int = 1
    seed: int = 0
    keys: Literal["visit", "chain"] = "visit"
    absent: Literal["wait", "redraw"] = "wait"
    estimate_shares: Literal["never", "warmup", "always"] = "never"
    patience: float = 60.0
    max_refusals: int = 3

    def __post_init__(self) -> None:
        for name in ("probabilities", "shares"):
            object.__setattr__(self, name, np.asarray(check.positive(name, getattr(self, name)), np.float64))
        steps = np.broadcast_to(np.asarray(self.local_steps), self.probabilities.shape)
        object.__setattr__(self, "local_steps", steps)
        check.integer("num_visits", self.num_visits)
        check.integer("num_warmup", self.num_warmup, least=0, most=self.num_visits - 1)
        check.integer("num_chains", self.num_chains)
        check.integer("stride", self.stride)
        check.one_of("keys", self.keys, ("visit", "chain"))
        check.one_of("absent", self.absent, ("wait", "redraw"))
        check.one_of("estimate_shares", self.estimate_shares, ("never", "warmup", "always"))
        if self.shares.shape != self.probabilities.shape:
            raise ValueError(
                f"shares must have one entry a client, {self.probabilities.shape}; got {self.shares.shape}."
            )
        if np.any(steps % self.stride):
            raise ValueError(
                f"stride must divide the steps of every visit; got {self.stride} for {sorted(set(steps.tolist()))}."
            )
        if self.estimate_shares == "warmup" and not self.num_warmup:
            raise ValueError("estimate_shares='warmup' needs a warm-up to estimate in; give num_warmup.")


def visit_words(seed: int, chain: int, visit: int) -> np.ndarray:
    """Key of a visit (uint32 words); the same for all of its attempts."""
    return np.random.SeedSequence([seed, chain, visit]).generate_state(2, np.uint32)


def place_of(id: str, plan: Plan) -> tuple[int, int, int] | None:
    """Read chain, visit and attempt off an id; ``None`` where it is none of this run's."""
    parts = id.split(".") if isinstance(id, str) else []
    if len(parts) != 3 or not all(p.isascii() and p.isdigit() and len(p) < 10 for p in parts):
        return None
    chain, visit, attempt = (int(p) for p in parts)
    return (chain, visit, attempt) if chain < plan.num_chains and visit < plan.num_visits else None
