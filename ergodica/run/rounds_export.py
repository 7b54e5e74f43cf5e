"""The result of federated rounds, as `ergodica.sample` gives its own."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ergodica.core import tree
from ergodica.core.posterior import Posterior
from ergodica.core.types import Position
from ergodica.run.export import constrain
from ergodica.run.rounds import Rounds

if TYPE_CHECKING:
    import xarray


def result(rounds: Rounds, posterior: Posterior, example: Position, names: Sequence[str]) -> "xarray.DataTree":
    """Make an `xarray.DataTree` of the accepted visits after the warm-up.

    Parameters
    ----------
    rounds : Rounds
    posterior : Posterior
        Constrains the draws and names them; its data are not used.
    example : position
        Of the structure of a position.
    names : sequence of str
        Of the clients.

    Returns
    -------
    xarray.DataTree
        ``posterior``; ``sample_stats`` with ``client_index``, ``visit_index`` and ``share``; in the attributes what was refused,
        who was left out, and ``push``, the mean whitened displacement of each client's visits
        (`ergodica.run.admission.DisplacementBound`).
        Where visits have different lengths, all chains are cut to as many draws as the one with the fewest has.
    """
    from arviz_base import from_dict

    structure, first = jax.tree.structure(example), rounds.plan.num_warmup
    chains, stats = [], []
    for draws in rounds.draws:
        kept = draws.positions[first:]
        lengths = [len(leaves[0]) for leaves in kept]
        chains.append([np.concatenate(leaves) for leaves in zip(*kept, strict=True)])
        per_visit = {
            "client_index": np.asarray(draws.client[first:], np.int32),
            "visit_index": np.arange(first, first + len(kept), dtype=np.int32),
            "share": np.asarray(draws.share[first:]),
        }
        stats.append({name: np.repeat(values, lengths) for name, values in per_visit.items()})
    shortest = min(len(leaves[0]) for leaves in chains)
    stacked = [np.stack([x[:shortest] for x in leaves]) for leaves in zip(*chains, strict=True)]
    positions = jax.tree.unflatten(structure, stacked)
    groups: dict[str, Any] = {"posterior": constrain(posterior, positions)}
    if posterior.transform is not None:
        groups["unconstrained_posterior"] = tree.named_leaves(positions)
    groups["sample_stats"] = {n: np.stack([s[n][:shortest] for s in stats]) for n in stats[0]}
    attributes = {
        "inference_library": "ergodica",
        "num_chains": rounds.plan.num_chains,
        "num_visits": rounds.plan.num_visits,
        "num_warmup": first,
        "clients": json.dumps(list(names)),
        "refused": json.dumps({f"{c}: {why}": n for (c, why), n in rounds.refused.items()}),
        "left_out": json.dumps(sorted(names[c] for c in rounds.suspended)),
        "exact": "approximate",
    }
    if rounds.bound is not None:
        attributes["push"] = json.dumps(rounds.bound.push.round(4).tolist())
    dims = {name: list(axes) for name, axes in posterior.dims.items()}
    coords = {name: list(labels) for name, labels in posterior.coords.items()}
    return from_dict(groups, dims=dims, coords=coords, attrs={"/": attributes}, check_conventions=False)
