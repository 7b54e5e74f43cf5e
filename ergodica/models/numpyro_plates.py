"""Which plates of a NumPyro model hold the data, where the rows are indices."""

from collections.abc import Callable, Sequence

from ergodica.models.numpyro_arguments import Arguments
from ergodica.models.numpyro_structure import listed, sizes
from ergodica.models.numpyro_trace import Records, record

type Plates = dict[str, int]
"""Sizes by name."""


def find_plates(model: Callable, arguments: Arguments, asked: str | Sequence[str] | None) -> Plates:
    """Give the plates whose indices are the data: those asked for, or the outermost ones that subsample.

    Of several, each site may be in one at most, so that the likelihood is a sum over each of them; their indices are then
    counted through. A plate that subsamples inside another is no data plate: it is run in full.
    """
    records = record(model, arguments, None, {})
    if asked is not None:
        return _check_asked(records, (asked,) if isinstance(asked, str) else tuple(asked))
    if not records.subsampled:
        raise ValueError(
            "Which arrays have one row a datum? Name them, from_numpyro(model, data=dict(x=X, y=y)), or give the model's data "
            "plate a subsample_size and index the arrays by it. A plate whose indices the model uses can also be named: plate=…."
        )
    outermost = _outermost(records)
    _check_disjoint(records, outermost)
    return {name: records.subsampled[name] for name in outermost}


def plate_size(model: Callable, arguments: Arguments, plate: str) -> int:
    """Size of a plate, for some arguments."""
    return record(model, arguments, None, {}).plates[plate]


def _check_asked(records: Records, asked: tuple[str, ...]) -> Plates:
    for plate in asked:
        if plate not in records.plates:
            raise ValueError(
                f"plate must name the model's data plate; got {plate!r}, and the model has {sizes(records.plates)}."
            )
        if records.plates[plate] < 2:
            raise ValueError(f"plate={plate!r} has a single datum; there is nothing to subsample.")
    if not asked or len(set(asked)) != len(asked):
        raise ValueError(f"plate must name one plate, or several once each; got {asked!r}.")
    _check_disjoint(records, list(asked))
    return {plate: records.plates[plate] for plate in asked}


def _outermost(records: Records) -> list[str]:
    """Subsampled plates that are not inside another: whose sites are not all in another that was entered before."""
    inside = {name: _sites_in(records, name) for name in records.subsampled}
    with_sites = [name for name, sites in inside.items() if sites] or list(inside)

    def is_inside(plate: str, other: str) -> bool:
        within = inside[plate] <= inside[other]
        return within and (inside[plate] < inside[other] or _entered_before(records, other, plate))

    return [name for name in with_sites if not any(is_inside(name, other) for other in with_sites if other != name)]


def _check_disjoint(records: Records, plates: list[str]) -> None:
    for i, plate in enumerate(plates):
        for other in plates[:i]:
            shared = _sites_in(records, plate) & _sites_in(records, other)
            if shared:
                raise ValueError(
                    f"The plates {other!r} and {plate!r} cross: the sites {listed(sorted(shared))} are in both, and neither plate "
                    "is inside the other, so that the likelihood is no sum over one of them. Name the one whose indices are "
                    f"the data, plate={other!r} or plate={plate!r}: the other is then run in full at every gradient."
                )


def _sites_in(records: Records, plate: str) -> set[str]:
    samples = [site for site in records.sites.values() if site.kind == "sample"]
    return {site.name for site in samples if plate in [name for name, *_ in site.plates]}


def _entered_before(records: Records, plate: str, other: str) -> bool:
    """Whether all sites in both plates see ``plate`` outside ``other``; plates around a site are listed from within."""
    names = [[name for name, *_ in site.plates] for site in records.sites.values()]
    both = [n for n in names if plate in n and other in n]
    return bool(both) and all(n.index(plate) > n.index(other) for n in both)
