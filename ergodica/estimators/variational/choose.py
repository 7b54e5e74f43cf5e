"""Which estimator each site gets: what the user says, else by rule."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ergodica.estimators.variational.facts import Context, Site, SiteError
from ergodica.estimators.variational.site import AbstractSiteEstimator
from ergodica.estimators.variational.sites.enumerate import Enumerate, num_configurations
from ergodica.estimators.variational.sites.reparam import Reparam
from ergodica.estimators.variational.sites.score import VIMCO, LeaveOneOut
from ergodica.estimators.variational.structure import Structure

INFER = "gradient"
"""Key of ``infer={...}`` at a guide's site."""
AUTO_BRANCHES = 16
"""A site is enumerated by rule if it has at most so many configurations …"""
AUTO_RUNS = 64
"""… and all enumerated sites together multiply the runs of the program by at most this."""


class Choice(NamedTuple):
    """An estimator, and in words why it is used."""

    estimator: AbstractSiteEstimator
    why: str


def choose(sites: Mapping[str, Any], structure: Structure, context: Context) -> dict[str, Choice]:
    """Choose for each site, by name, by the site's own ``infer``, by ``"*"``, or by rule; raise where that cannot be right."""
    unknown = [name for name in sites if name != "*" and name not in structure.sites]
    if unknown:
        raise ValueError(
            f"sites names {', '.join(map(repr, unknown))}, which the guide does not draw; it draws "
            f"{', '.join(map(repr, structure.sites)) or 'nothing'}. ('*' stands for all others.)"
        )
    chosen: dict[str, Choice] = {}
    runs = 1
    for name, site in structure.sites.items():
        choice = _named(name, site, sites, structure) or by_rule(site, context, AUTO_RUNS // runs)
        choice.estimator.check(site, context)
        chosen[name] = choice
        runs *= choice.estimator.num_branches(site)
    return chosen


def _named(name: str, site: Site, sites: Mapping[str, Any], structure: Structure) -> Choice | None:
    """What the user says, or ``None``."""
    if site.delta and name not in sites:
        return Choice(Reparam(), "a point mass")
    if name in sites:
        return None if sites[name] is None else Choice(sites[name], "named in sites")
    inferred = structure.inferred.get(name)
    if inferred is not None:
        if isinstance(inferred, AbstractSiteEstimator):
            return Choice(inferred, f"infer={{'{INFER}': …}} at the site")
        if inferred != "auto":
            raise SiteError(
                f"infer={{'{INFER}': …}} at site {name!r} must be an estimator such as LeaveOneOut(), or 'auto'; got {inferred!r}."
            )
        return None
    if sites.get("*") is not None:
        return Choice(sites["*"], "'*' in sites")
    return None


def by_rule(site: Site, context: Context, most_runs: int = AUTO_RUNS) -> Choice:
    """Choose by rule.

    Reparameterise where NumPyro can, and mixtures implicitly; enumerate few values where the objective is linear; else the score
    function with the other particles as a baseline. Sticking the landing is never chosen: far from the optimum it adds variance.
    """
    if site.reparameterised:
        return Choice(Reparam(), "it can be reparameterised")
    if site.implicit and not site.in_scan:
        return Choice(Reparam(), "it can be reparameterised implicitly, by its distribution function")
    configurations = num_configurations(site)
    few = configurations is not None and configurations <= min(AUTO_BRANCHES, most_runs)
    if few and context.linear and not site.in_scan:
        return Choice(Enumerate(), f"{configurations} values can be summed over")
    kind = "discrete" if site.discrete else "without a reparameterisation"
    if context.num_particles >= 2:
        estimator = LeaveOneOut() if context.linear else VIMCO()
        return Choice(estimator, f"{kind}; the other particles are the baseline")
    raise SiteError(
        f"No estimator can be chosen for site {site.name!r} ({site.distribution}): it is {kind}, and with num_particles=1 there "
        "are no other particles for a baseline. Raise num_particles to at least 2, or name an estimator in sites, such as "
        f"sites={{{site.name!r}: Score()}}, whose variance is large."
    )
