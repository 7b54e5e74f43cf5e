"""Comparison of gradient estimators: whether they are right, how noisy they are, and what they cost."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np

from ergodica.core import check, rng, tree
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Key, PyTree
from ergodica.diagnostics.gradient_bias import MOST_JOINT, Target, errors_of, without_own_share
from ergodica.diagnostics.gradient_reference import choose_reference, target_of
from ergodica.diagnostics.gradient_repeats import PILOT, in_lots, repeats_needed
from ergodica.diagnostics.gradient_replicates import join, replicate, variance_parts
from ergodica.diagnostics.gradient_settings import (
    MOST_NUMBERS,
    Settings,
    check_estimators,
    check_points,
    check_settings,
)
from ergodica.diagnostics.gradient_statistics import Replicates, summarise
from ergodica.diagnostics.timing import time_estimators

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_table import GradientComparison


def compare_gradients(
    key: Key,
    estimators: Mapping[str, AbstractGradientEstimator],
    params: PyTree | list[PyTree],
    reference: str = "auto",
    *,
    num_repeats: int | str = "auto",
    max_repeats: int = 50_000,
    confidence: float = 0.99,
    bias_tolerance: float = 0.1,
    num_timings: int = 7,
    budget: int | None = None,
    state: str = "fresh",
    warmup: int = 0,
    common_random_numbers: bool = False,
    split_variance: bool = False,
) -> "GradientComparison":
    r"""Compare gradient estimators: bias, variance, cost, and variance for a given cost.

    Parameters
    ----------
    key : typed PRNG key
    estimators : mapping of str to AbstractGradientEstimator
        By the name to call them. Times and variances are given as ratios to the first too.
    params : pytree, or list of pytrees
        The points to compare at: a position, or a list of positions, such as `ergodica.diagnostics.training_points` gives.
        (A position that is itself a list goes into a list.)
    reference : {"auto", "exact", "pooled"}, or the name of an estimator
        What the means are held against. ``"exact"`` is the gradient of the log density over all the data, of the first
        estimator whose posterior holds them; for variational objectives on small programs, enumeration times quadrature (see
        `ergodica.estimators.ExactGradient`), of the objective of the first estimator. ``"pooled"`` is the mean over the
        estimators, weighted by their precision: it tells whether they agree, not which of them is right. ``"auto"`` is
        ``"exact"`` where it can be had, else ``"pooled"``; the attribute ``reference`` of the result says which. The mean of a
        named estimator can be taken too.
    num_repeats : int or "auto"
        Independent estimates for each estimator and point. ``"auto"``: as many as it takes to find a bias of half of
        ``bias_tolerance``, and to know the variance to 10%, judged by a pilot of 1,000.
    max_repeats : int
        The most that ``"auto"`` takes. Where more would be needed, ``repeats_needed`` and ``notes`` say how many.
    confidence : float
        Of each variance interval. The tests for bias are corrected for their number: if every estimator is unbiased, one is called
        biased with probability at most ``1 - confidence`` in the whole comparison.
    bias_tolerance : float
        An estimator is called unbiased only if its bias is shown to be below this fraction of the gradient's largest entry.
    num_timings : int
        Rounds of timing, each estimator once a round; 0 leaves the time out.
    budget : int, optional
        Runs a call: each estimator gets as many particles as fit in (variational ones only).
    state : {"fresh", "frozen", "same samples"}
        For estimators that remember or learn. ``"fresh"``: each estimate is the first of a new state. ``"frozen"``: all are made
        in the state after ``warmup`` calls. ``"same samples"``: the state has learned from the very samples that it is used
        on, which makes many baselines biased, and shows whether yours is.
    warmup : int
    common_random_numbers : bool
        The same keys for all estimators. The ratio of variances of estimators of one family has a shorter interval then.
    split_variance : bool
        Split the variance into that of the choice of data and that of sampling (``variance_data``, ``variance_sampling``).

    Returns
    -------
    GradientComparison
        An `xarray.Dataset` with dimensions ``estimator``, ``point`` and ``coordinate``, a table ``.summary``
        (`pandas.DataFrame`), ``.to_markdown()``, a figure ``.plot()`` and sentences ``.notes``. Variables: see
        `ergodica.diagnostics.gradient_table.GradientComparison`.

    Raises
    ------
    ValueError, TypeError
        For points of different structure, an unknown reference, one that cannot be had, or estimates that are not finite.

    Notes
    -----
    In the state ``"fresh"`` repeats are independent draws from the marginal law: for ``scheme="blocks"``, the first block of a
    fresh epoch. What reshuffling gains *along* an epoch is therefore not in these variances.

    Tests: Student's for each coordinate, corrected for skewness (Hall, 1992), with the standard error of the repeats (and of the
    reference, if it is noisy) and a few units of rounding; for up to 32 coordinates Hotelling's for all of them; Holm's
    correction over all of both. Failure to reject is no proof: ``bias_bound`` is what could have gone unseen, ``control`` whether
    the same repeats, shrunk by half of ``bias_tolerance``, were found biased, and ``detectable`` the shrinkage that is found with
    probability 95%.

    Intervals of variances are corrected for skewness as well, since squared deviations have heavy tails; ``trustworthy`` is false
    where few repeats dominate them. Estimators that say they are exact are called twice.

    A minibatch of rows near a mode has far more noise than gradient, and a bias cannot be seen there: compare at a point
    some posterior standard deviations away too, such as the start of the chains.

    Cost: the repeats, for each estimator and point, twice the exact gradient, and some milliseconds of timing. Memory: repeats
    times the number of parameters; ``"auto"`` keeps that below 2²⁴ for each estimator and point.

    References
    ----------
    Hall (1992); Holm (1979); Mohamed et al. (2020) for what to measure.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, ergodica as erg
    >>> posterior = erg.Posterior(lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(9.0), initial=jnp.array(0.0))
    >>> estimators = {name: erg.estimators.Minibatch(posterior, 3, name) for name in ("uniform", "blocks")}
    >>> table = compare_gradients(jax.random.key(0), estimators, jnp.array(1.0), num_timings=0)
    >>> table.verdict.sel(point=0).values.tolist()
    ['unbiased', 'unbiased']
    """
    rng.check_key(key)
    settings = check_settings(
        num_repeats,
        max_repeats,
        confidence,
        bias_tolerance,
        state,
        warmup,
        common_random_numbers=common_random_numbers,
    )
    check.integer("num_timings", num_timings, least=0)
    estimators = check_estimators(estimators, budget)
    points, labels = check_points(params)
    reference, exact = choose_reference(reference, estimators, points)
    taken = [
        _take(key, j, point, estimators, None if exact is None else exact[j], reference, settings, len(points))
        for j, point in enumerate(points)
    ]
    times = time_estimators(estimators, points[0], num_timings) if num_timings else None
    parts = None
    if split_variance:
        pairs = [max(len(r.gradients) for r in cell.replicates.values()) for cell in taken]
        parts = {
            name: [
                variance_parts(e, _stream(key, 2, i, j, len(estimators), len(points)), point, pairs[j], confidence)
                for j, point in enumerate(points)
            ]
            for i, (name, e) in enumerate(estimators.items())
        }
    from ergodica.diagnostics.gradient_table import assemble

    attrs = {"reference": reference, "max_repeats": max_repeats, "state": state, "warmup": warmup}
    attrs |= {"common_random_numbers": int(common_random_numbers)} | ({} if budget is None else {"budget": budget})
    names = tree.coordinate_names(points[0])
    evaluations = {name: e.evaluations(points[0], 1.0) for name, e in estimators.items()}
    return assemble(taken, labels, names, settings, times, parts, evaluations, attrs)


class Taken(NamedTuple):
    """All that was measured at one point: replicates by estimator, the reference, and how many repeats were needed."""

    replicates: dict[str, Replicates]
    target: Target
    needed: dict[str, float]


def _take(
    key: Key,
    j: int,
    point: PyTree,
    estimators: dict[str, AbstractGradientEstimator],
    exact: Target | None,
    reference: str,
    settings: Settings,
    num_points: int,
) -> Taken:
    """Take the repeats at one point: a given number, or a pilot and what it says is needed."""

    def lot(number: int, size: int) -> dict[str, Replicates]:
        found = {}
        for i, (name, estimator) in enumerate(estimators.items()):
            own = 0 if settings.common_random_numbers else i
            key_lot, key_state = (
                _stream(key, kind, own, j, len(estimators), num_points) for kind in (3 + number if number else 0, 1)
            )
            found[name] = replicate(name, f"point {j}", estimator, key_lot, key_state, point, size, settings.opening)
        return found

    def target(replicates: dict[str, Replicates]) -> Target:
        return target_of(reference, replicates, point) if exact is None else exact

    replicates = lot(0, settings.num_repeats or PILOT)
    needed = _needed(replicates, target(replicates), settings, num_points)
    if settings.num_repeats is None:
        most = max(PILOT, min(settings.max_repeats, MOST_NUMBERS // tree.size(point)))
        lots = [replicates]
        wanted = in_lots(max(needed.values(), default=0.0), most)
        lots += [lot(number, PILOT) for number in range(1, wanted // PILOT)]
        replicates = {name: r if r.exact else join([part[name] for part in lots]) for name, r in replicates.items()}
    return Taken(replicates, target(replicates), needed)


def _needed(replicates: dict[str, Replicates], target: Target, settings: Settings, num_points: int) -> dict[str, float]:
    """Repeats that each estimator with noise needs."""
    d = len(target.gradient)
    num_tests = len(replicates) * num_points * (d + (1 < d <= MOST_JOINT))
    level = (1 - settings.confidence) / num_tests
    return {
        name: repeats_needed(
            without_own_share(errors_of(name, replicates, target), target, name),
            summarise(r, settings.confidence),
            target.gradient,
            level,
            settings.bias_tolerance,
        ).largest
        for name, r in replicates.items()
        if not r.exact
    }


def _stream(key: Key, kind: int, i: int, j: int, num_estimators: int, num_points: int) -> Key:
    """Key of an estimator and point for one purpose: 0 repeats, 1 warm-up, 2 pairs, above 3 later lots."""
    return jax.random.fold_in(key, np.uint32((kind * num_estimators + i) * num_points + j))
