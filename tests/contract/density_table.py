"""Rows of the kernels that evaluate a log density, and hold no gradient estimator."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

import ergodica as erg
from ergodica.core import tree
from tests.contract.table import posterior_of
from tests.support.flow_layers import normals


@dataclasses.dataclass(frozen=True)
class DensityRow:
    name: str
    """The public name in `ergodica.samplers`."""
    make: Callable[[erg.Posterior], Any]
    label: str
    other: Callable[[erg.Posterior], Any]
    """The same kernel with other values of its arrays, which must not retrace."""
    bad_input: tuple[tuple[Callable[[], Any], type[Exception], str], ...]


def _flow_imh(scale=0.8, **options):
    def make(posterior):
        flow = normals(scale, 0.1, dim=tree.size(posterior.shape()))
        return erg.samplers.FlowIMH(flow, posterior, **options)

    return make


DENSITY_KERNELS = [
    DensityRow(
        "FlowIMH",
        _flow_imh(num_proposals=num_proposals),
        f"FlowIMH-{num_proposals}",
        _flow_imh(0.9, num_proposals=num_proposals),
        bad_input,
    )
    for num_proposals, bad_input in (
        (
            1,
            (
                (
                    lambda: _flow_imh(num_proposals=0)(posterior_of("array")),
                    ValueError,
                    "num_proposals must be at least 1",
                ),
                (
                    lambda: erg.samplers.FlowIMH(normals(1.0, dim=3), posterior_of("array")),
                    ValueError,
                    "flow has dimension 3, the positions of the posterior have 2",
                ),
                (
                    lambda: erg.samplers.FlowIMH(posterior_of("array"), posterior_of("array")),
                    TypeError,
                    "flow must be an Flow",
                ),
                (
                    lambda: erg.samplers.FlowIMH(normals(1.0, dim=2), jnp.zeros(2)),
                    TypeError,
                    "target must be a function",
                ),
                (
                    lambda: erg.samplers.FlowIMH(normals(1.0, dim=2), posterior_of("array", with_data=False)),
                    ValueError,
                    "posterior holds no data",
                ),
            ),
        ),
        (3, ()),
    )
]

PRESETS = frozenset({"FlowIMH-1"})
"""Rows whose class another row runs with other settings."""
