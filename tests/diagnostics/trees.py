"""Results built by hand, in the format of `ergodica.sample`, whose temperatures are known."""

import json

import numpy as np
import xarray as xr
from scipy.signal import lfilter

SGLD_SETTINGS = {
    "class": "SGLD",
    "step_size": 0.01,
    "temperature": 1.0,
    "gradient": {"class": "Minibatch", "batch_size": 10, "scheme": "uniform", "num_blocks": 100},
}


def ar1(rng, shape, correlation, sd):
    """Stationary AR(1) series along axis 1, of standard deviation ``sd`` (last axis)."""
    noise = rng.normal(size=shape)
    noise[:, 1:] *= np.sqrt(1 - correlation**2)
    return lfilter([1.0], [1.0, -correlation], noise, axis=1) * sd


def gaussian_run(
    seed=0,
    ratios=(1.0, 1.0, 1.0),
    *,
    chains=4,
    draws=1000,
    correlation=0.5,
    run_temperature=1.0,
    gradient_noise=0.0,
    grad_noise=None,
    settings=SGLD_SETTINGS,
    exact="approximate",
):
    """Draws from N(0, ratio T) in each coordinate where N(0, T) is right, with probe gradients of N(0, 1)'s density."""
    rng = np.random.default_rng(seed)
    ratios = np.asarray(ratios, float)
    theta = ar1(rng, (chains, draws, len(ratios)), correlation, np.sqrt(ratios * run_temperature))
    gradient = -theta + gradient_noise * rng.normal(size=theta.shape)
    centre = np.full(len(ratios), 0.1)
    names = [f"beta[{i}]" for i in range(len(ratios))]
    dims = ("chain", "draw")
    coords = {"chain": np.arange(chains), "draw": np.arange(draws)}
    stats = {
        "step_size": (dims, np.full((chains, draws), 0.01)),
        "temperature": (dims, np.full((chains, draws), run_temperature)),
        "diverging": (dims, np.zeros((chains, draws), bool)),
        "n_grad": (dims, np.full((chains, draws), 10)),
    }
    if grad_noise is not None:
        stats["grad_noise"] = (dims, np.full((chains, draws), grad_noise))
    dt = xr.DataTree.from_dict(
        {
            "posterior": xr.Dataset({"beta": ((*dims, "feature"), theta)}, coords),
            "sample_stats": xr.Dataset(stats, coords),
            "probe": xr.Dataset(
                {
                    "temperature": ((*dims, "coordinate"), -(theta - centre) * gradient),
                    "centre": ("coordinate", centre),
                },
                coords | {"coordinate": names},
            ),
            "observed_data": xr.Dataset({"y": ("row", np.zeros(5))}),
        }
    )
    dt.attrs = {
        "inference_library": "ergodica",
        "inference_library_version": "0.1.0",
        "created_at": "2025-01-01T00:00:00",
        "sampler": settings.get("class", ""),
        "settings": json.dumps(settings),
        "seed": "threefry2x32:0,0",
        "num_chains": chains,
        "num_warmup": 1000,
        "thin": 1,
        "num_data": 1000,
        "wall_time": 1.5,
        "compile_time": 0.5,
        "num_gradients": 80000,
        "num_probe_gradients": 80000,
        "exact": exact,
        "references": json.dumps(["@article{someone2020,\n title={On <sampling> & such}\n}"]),
        "resumed_from": 0,
        "result": "successful",
        "result_message": "The run ended as planned.",
    }
    return dt
