"""Flows as they are usually put together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from ergodica.core import check, rng
from ergodica.core.flow import AbstractLayer, Chain, Flow
from ergodica.core.types import Key
from ergodica.models.flows.autoregressive import Autoregressive
from ergodica.models.flows.composition import Inverted, Stacked
from ergodica.models.flows.coupling import AffineCoupling, SplineCoupling
from ergodica.models.flows.linear import Permutation
from ergodica.models.flows.masks import MASKS

type Masks = str | Sequence[Sequence[int]]


def real_nvp(
    key: Key, dim: int, num_layers: int = 8, *, masks: Masks = "halves", stacked: bool = False, **settings: Any
) -> Flow:
    """Affine couplings on standard normals.

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    num_layers : int
        Couplings.
    masks : {"halves", "alternating"} or sequence of sequences of int
        Which coordinates the couplings move, in turn: `half_mask`, `alternating_mask`, or masks of your own, which are repeated.
    stacked : bool
        Compile one round of the masks and loop over the rest (`Stacked`): compiles faster, runs a little slower.
    **settings
        ``width``, ``depth``, ``activation``, ``bound`` and ``start`` of `AffineCoupling`.

    Raises
    ------
    ValueError, TypeError
        For fewer than two dimensions; for masks that are no indices, or with ``stacked`` do not divide the number of layers.

    References
    ----------
    Dinh, Sohl-Dickstein and Bengio (2017).

    Examples
    --------
    >>> import jax
    >>> real_nvp(jax.random.key(0), dim=4, num_layers=6, width=32).sample(jax.random.key(1), 10).shape
    (10, 4)
    """
    return _couplings(AffineCoupling, key, dim, num_layers, masks, stacked=stacked, settings=settings)


def spline_flow(
    key: Key, dim: int, num_layers: int = 4, *, masks: Masks = "halves", stacked: bool = False, **settings: Any
) -> Flow:
    """Rational-quadratic spline couplings on standard normals.

    Parameters
    ----------
    key, dim, num_layers, masks, stacked
        As for `real_nvp`.
    **settings
        ``num_bins``, ``bound``, ``width``, ``depth``, ``activation`` and ``start`` of `SplineCoupling`.

    Notes
    -----
    Points leave the box only as far as the base's draws do: what a target has outside ``bound`` is reached by no spline.
    Standardise the target, or put an `ElementwiseAffine` or a `LinearLU` last.

    References
    ----------
    Durkan, Bekasov, Murray and Papamakarios (2019).

    Examples
    --------
    >>> import jax
    >>> spline_flow(jax.random.key(0), dim=3, num_layers=2).sample(jax.random.key(1), 10).shape
    (10, 3)
    """
    return _couplings(SplineCoupling, key, dim, num_layers, masks, stacked=stacked, settings=settings)


def masked_autoregressive_flow(key: Key, dim: int, num_layers: int = 4, **settings: Any) -> Flow:
    """Autoregressive layers whose log density takes one pass, and a draw D of them; the order is turned round between layers.

    For maximum likelihood and forward path gradients.

    Parameters
    ----------
    key : key
    dim : int
        D, at least 2.
    num_layers : int
    **settings
        ``width``, ``depth``, ``activation``, ``bound`` and ``start`` of `Autoregressive`.

    References
    ----------
    Papamakarios, Pavlakou and Murray (2017).

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> masked_autoregressive_flow(jax.random.key(0), dim=3, num_layers=2, width=8).log_prob(jnp.zeros(3)).shape
    ()
    """
    return _autoregressive(lambda key: Inverted(Autoregressive(key, dim, **settings)), key, dim, num_layers)


def inverse_autoregressive_flow(key: Key, dim: int, num_layers: int = 4, **settings: Any) -> Flow:
    """Autoregressive layers whose draws, with their log densities, take one pass, and the log density of a given point D.

    For reverse divergences: fitting to a log density.

    Parameters
    ----------
    key, dim, num_layers
        As for `masked_autoregressive_flow`.
    **settings
        ``width``, ``depth``, ``activation``, ``bound`` and ``start`` of `Autoregressive`.

    References
    ----------
    Kingma, Salimans, Jozefowicz, Chen, Sutskever and Welling (2016).

    Examples
    --------
    >>> import jax
    >>> inverse_autoregressive_flow(jax.random.key(0), dim=3, num_layers=2, width=8).sample(jax.random.key(1), 10).shape
    (10, 3)
    """
    return _autoregressive(lambda key: Autoregressive(key, dim, **settings), key, dim, num_layers)


def _couplings(
    kind: Callable[..., AbstractLayer],
    key: Key,
    dim: int,
    num_layers: int,
    masks: Masks,
    *,
    stacked: bool,
    settings: dict[str, Any],
) -> Flow:
    rng.check_key(key)
    check.integer("dim", dim, least=2, hint="A coupling needs a coordinate to move and one to keep.")
    check.integer("num_layers", num_layers)
    if isinstance(masks, str):
        mask = MASKS[check.one_of("masks", masks, MASKS)]
        masks = [mask(dim, 0), mask(dim, 1)]
    if not masks:
        raise ValueError("masks must hold at least one sequence of indices; got none.")
    keys = jax.random.split(key, num_layers)
    layers = [kind(k, dim, masks[i % len(masks)], **settings) for i, k in enumerate(keys)]
    if not stacked:
        return Flow(dim, *layers)
    if num_layers % len(masks):
        raise ValueError(
            f"With stacked=True num_layers must be a multiple of the {len(masks)} masks; got {num_layers}."
        )
    rounds = [Chain(layers[i : i + len(masks)]) for i in range(0, num_layers, len(masks))]
    return Flow(dim, Stacked(rounds))


def _autoregressive(make: Callable[[Key], AbstractLayer], key: Key, dim: int, num_layers: int) -> Flow:
    rng.check_key(key)
    check.integer("num_layers", num_layers)
    layers: list[AbstractLayer] = []
    for k in jax.random.split(key, num_layers):
        layers += [make(k), Permutation.reverse(dim)]
    return Flow(dim, *layers[:-1])
