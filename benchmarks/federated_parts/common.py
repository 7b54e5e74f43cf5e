"""What the experiments share: clients with unequal labels, moments with errors, and scores that add up over clients."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import ergodica as erg
from ergodica.diagnostics import combine_held_out, held_out_sums
from ergodica.run.federated_bias import PredictedFederation

LOCAL_STEPS = (1, 20, 200)
AWAY = 100.0
THIN = 7  # no divisor of the lengths of visits: stored draws are spread over all places within a visit

Cell = tuple[str, Callable[[], dict[str, Any]]]


def label_skew(rng: np.random.Generator, labels: np.ndarray, num_clients: int, concentration: float) -> np.ndarray:
    """Client of each datum: those of one label are spread with proportions from a symmetric Dirichlet law."""
    client = np.zeros(len(labels), int)
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        share = rng.dirichlet(np.full(num_clients, concentration))
        ends = np.rint(np.cumsum(share)[:-1] * len(rows)).astype(int)
        client[rows] = np.repeat(np.arange(num_clients), np.diff(np.concatenate([[0], ends, [len(rows)]])))
    return client


def total_variation(labels: np.ndarray, client: np.ndarray) -> float:
    """Distance of a client's labels from everybody's, in total variation, on average over the data: 0 for alike clients."""
    names = np.unique(labels)
    overall = np.array([np.mean(labels == name) for name in names])
    distance = [
        0.5 * np.abs([np.mean(labels[client == s] == name) - p for name, p in zip(names, overall, strict=True)]).sum()
        for s in np.unique(client)
    ]
    sizes = np.unique(client, return_counts=True)[1]
    return float(np.average(distance, weights=sizes))


def draws(dt: Any) -> np.ndarray:
    """Draws of a position that is one vector: (chain, draw, D)."""
    return dt.posterior["position"].values.astype(float)


def moments(x: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and sd over all draws (D,), with standard errors between chains."""
    mean = x.mean((0, 1))
    squares = ((x - mean) ** 2).mean(1)
    root = np.sqrt(len(x))
    sd = np.sqrt(squares.mean(0))
    return {
        "mean": mean,
        "mean_se": x.mean(1).std(0, ddof=1) / root,
        "sd": sd,
        "sd_se": squares.std(0, ddof=1) / root / (2 * sd),
    }


def beside(prediction: PredictedFederation | None, found: dict[str, np.ndarray], mean: Any, sd: Any) -> dict[str, Any]:
    """Ratios of the sd to the true one, and shifts of the mean in true sds: predicted before the run, and measured."""
    measured = {
        "measured_sd": (found["sd"] / sd).tolist(),
        "measured_sd_se": (found["sd_se"] / sd).tolist(),
        "measured_shift": ((found["mean"] - mean) / sd).tolist(),
        "measured_shift_se": (found["mean_se"] / sd).tolist(),
    }
    if prediction is None:
        return measured
    return measured | {
        "predicted_sd": (1 + prediction.inflation).tolist(),
        "predicted_shift": prediction.shift.tolist(),
        "at_best": (1 + prediction.at_best).tolist(),
        "misfit": prediction.misfit.tolist(),
        "says": str(prediction),
    }


def predict(key: Any, sampler: Any, centre: Any) -> PredictedFederation | None:
    """Predict; None where the quadratic expansion at the mode has no stationary law."""
    try:
        return erg.predict_federated(key, sampler, centre)
    except ValueError as error:
        if "stationary law" not in str(error):
            raise
        return None


def num_lost(dt: Any) -> int:
    """Chains that end at infinity, or with a coordinate beyond AWAY, a hundred prior sds or more."""
    last = [v.values[:, -1].reshape(v.shape[0], -1) for v in dt.posterior.data_vars.values()]
    return int(np.sum(~(np.abs(np.concatenate(last, axis=1)) < AWAY).all(1)))


def lost(dt: Any, prediction: PredictedFederation | None) -> dict[str, Any]:
    """What is stored of a run that has lost chains: how many, and what was predicted."""
    found = {"unstable": str(dt.attrs["result_message"]), "lost": num_lost(dt), "chains": dt.posterior.sizes["chain"]}
    return found if prediction is None else found | {"predicted_sd": (1 + prediction.inflation).tolist()}


def run(key: Any, sampler: Any, num_chains: int, num_steps: int, num_warmup: int, initial: Any) -> Any:
    """Sample without probes, thinned so that all places within a visit are seen alike."""
    return erg.sample(
        key,
        sampler,
        num_samples=num_steps // THIN,
        num_warmup=num_warmup,
        num_chains=num_chains,
        thin=THIN,
        initial=initial,
        progress=False,
        probes=False,
        throw=False,
    )


def with_local_steps(sampler: Any, local_steps: int) -> Any:
    """The same sampler with visits of another length: one compiled program serves all lengths."""
    return erg.samplers.Federated(sampler.kernel, local_steps)


def scores_at_clients(dt: Any, shards: erg.Shards, held_out: Sequence[Any]) -> dict[str, float]:
    """Score held-out rows where they are: what is added up here is sums over a client's rows."""
    return combine_held_out([held_out_sums(dt, shards.only(s).posterior, rows) for s, rows in enumerate(held_out)])


def cells_of(methods: dict[str, Callable[[], Any]], of_one: Callable[[str, Any, int], dict]) -> Iterator[Cell]:
    """Every method at every length of visits; what a method needs is made once, when it is first used."""
    made: dict[str, Any] = {}

    def run_cell(method: str, steps: int) -> dict[str, Any]:
        if method not in made:
            made[method] = methods[method]()
        return of_one(method, made[method], steps)

    for method in methods:
        for steps in LOCAL_STEPS:
            yield f"{method}, {steps}", lambda m=method, t=steps: run_cell(m, t)


def key_of(part: int, cell: int) -> jax.Array:
    """A key for each cell of each part."""
    return jax.random.fold_in(jax.random.key(part), cell)
