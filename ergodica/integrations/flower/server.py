"""The server's side on Flower: finding the sites, their surrogates, and the run of visits."""

# pyright: reportMissingImports=false

import json
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core.shards import Shards
from ergodica.core.types import Position
from ergodica.estimators.federated.conducive import Conducive
from ergodica.estimators.federated.surrogates import Natural
from ergodica.integrations.flower import messages
from ergodica.integrations.flower.grid import GridTransport
from ergodica.integrations.flower.study import Expansion, Study
from ergodica.run.admission import SurrogateError, check_surrogate
from ergodica.run.export import describe
from ergodica.run.journal import Journal
from ergodica.run.orders import Plan
from ergodica.run.rounds import Rounds, RoundsError, run_rounds
from ergodica.run.rounds_export import result
from ergodica.samplers.site import Site
from ergodica.samplers.visits import make_visits

logger = logging.getLogger("ergodica.rounds")

_CONVERGED = 0.05


def server_app(
    study: Study | Callable[[Any], Study],
    *,
    journal: str | os.PathLike | None = None,
    output: str | os.PathLike | None = None,
    on_result: Callable[[Any], None] | None = None,
    give_up_after: float = 3600.0,
) -> Any:
    """Make the ServerApp of a study.

    Parameters
    ----------
    study : Study or callable
        Or ``study(context) -> Study``, which may read the run's configuration.
    journal : path, optional
        Where accepted visits are written down. Run the same app again after whatever ended it, with the same journal, and it
        goes on. The entry ``journal`` of the run's configuration, where there is one, is taken instead.
    output : path, optional
        Where the result is stored, as netCDF; or the entry ``output`` of the run's configuration.
    on_result : callable, optional
        Called with the result, an `xarray.DataTree`.
    give_up_after : float
        Seconds without an accepted result after which the run ends with an error.

    Returns
    -------
    flwr.serverapp.ServerApp

    Notes
    -----
    Cost: for the server, nothing to speak of. Each round of visits takes as long as the slowest site needs to start a process,
    read its data and compiled programs, and make its steps; chains that are at one client at the same time share a message.
    """
    from flwr.serverapp import ServerApp

    app = ServerApp()

    @app.main()
    def main(grid: Any, context: Any) -> None:
        config = context.run_config
        where = config.get("journal") or journal
        ours = study if isinstance(study, Study) else study(context)
        datatree = run_study(ours, GridTransport(grid, ours), where, give_up_after)
        target = config.get("output") or output
        if target:
            datatree.to_netcdf(target, engine="h5netcdf")
        if on_result is not None:
            on_result(datatree)

    return app


def run_study(study: Study, transport: Any, journal: str | os.PathLike | None, give_up_after: float = 3600.0) -> Any:
    """Find surrogates, make all visits, and give the result; ``transport`` is a `GridTransport` or behaves like one."""
    book = None if journal is None else Journal(journal, identity(study))
    try:
        centre, expansions = _setup(study, transport, book, give_up_after)
        transport.surrogates = surrogate_arrays(centre, expansions)
        rounds = make_rounds(study, centre, expansions, book)
        run_rounds(rounds, transport, give_up_after=give_up_after)
    finally:
        if book is not None:
            book.close()
    return result(rounds, study.posterior(), centre, study.names)


def make_rounds(study: Study, centre: Position, expansions: list[Expansion], book: Journal | None) -> Rounds:
    """Make the server's state of a run, and take up what a journal holds of it."""
    plan = study.plan()
    site = example_site(study, centre, expansions)
    visits = make_visits("independent", jnp.asarray(plan.shares), jnp.asarray(plan.local_steps))

    def of_chain(words: jax.Array) -> jax.Array:
        words, chain = visits.begin(words)
        return jax.vmap(lambda visit: visits.client(words, chain, visit))(jnp.arange(plan.num_visits, dtype=jnp.int32))

    words = np.random.SeedSequence([plan.seed, 0xC11E]).generate_state(2 * plan.num_chains, np.uint32)
    order = np.asarray(jax.jit(jax.vmap(of_chain))(jnp.asarray(words.reshape(-1, 2))))
    return Rounds(
        plan,
        lambda chain, visit: int(order[chain, visit]),
        starts(site, centre, plan),
        site.template.leaves,
        len(site.template.position),
        book,
        study.bound(centre, expansions, site),
    )


def starts(site: Site, centre: Position, plan: Plan) -> list[tuple[np.ndarray, ...]]:
    """States of the chains at the centre, with momenta that are drawn here, so that no site can choose one.

    States of kernels that hold more, such as a gradient, need a site's data: then only the position is given.
    """
    size = sum(x.size for x in jax.tree.leaves(centre))
    floating = sum(int(np.prod(shape)) for shape, dtype in site.template.leaves if np.issubdtype(dtype, np.floating))
    if floating not in (size, 2 * size):
        return [tuple(np.asarray(x) for x in jax.tree.leaves(centre))] * plan.num_chains
    keys = jax.random.split(jax.random.key(plan.seed), plan.num_chains)
    return [site.first_state(key, centre) for key in keys]


def example_site(study: Study, centre: Position, expansions: list[Expansion]) -> Site:
    """Make a site of the example's rows, from which shapes and the kernel are read."""
    own, total = natural(expansions[0]), natural_total(expansions)
    return study.site(study.posterior(), float(study.plan().shares[0]), centre, own, total)


def natural(expansion: Expansion) -> Natural:
    """Natural parameters of one client, about the centre."""
    return Natural(*(jnp.asarray(x, jnp.result_type(float)) for x in expansion[:2]))


def natural_total(expansions: list[Expansion]) -> Natural:
    """Natural parameters of the product of all."""
    sums = (np.sum([e[i] for e in expansions], axis=0) for i in (0, 1))
    return Natural(*(jnp.asarray(x, jnp.result_type(float)) for x in sums))


def surrogate_arrays(centre: Position, expansions: list[Expansion]) -> list[tuple[np.ndarray, ...]]:
    """For each client, what it is sent with its visits: centre, own parameters, and the sum of all."""
    at = tuple(np.asarray(x) for x in jax.tree.leaves(centre))
    total = tuple(np.asarray(x) for x in natural_total(expansions)[:2])
    return [(*at, *(np.asarray(x) for x in natural(e)[:2]), *total) for e in expansions]


def identity(study: Study) -> dict[str, str]:
    """What a journal must agree with."""
    plan = study.plan()
    arrays = {name: getattr(plan, name).tolist() for name in ("probabilities", "shares", "local_steps")}
    numbers = ("num_visits", "num_warmup", "num_chains", "stride", "seed", "absent", "estimate_shares")
    of_study = ("names", "batch_size", "strength", "covariance", "max_norm", "noise_multiplier")
    settings = {**arrays, **{n: getattr(plan, n) for n in numbers}, **{n: getattr(study, n) for n in of_study}}
    shapes = [(x.shape, str(x.dtype)) for x in jax.tree.leaves(study.start())]
    posterior = study.posterior()
    bare = study.kernel(Conducive(Shards(posterior, np.zeros(posterior.num_data, int)), batch_size=study.batch_size))
    settings |= {"position": shapes, "kernel": describe(bare)}
    return {name: json.dumps(value) for name, value in settings.items()}


def _setup(
    study: Study, transport: Any, book: Journal | None, give_up_after: float
) -> tuple[Position, list[Expansion]]:
    """Take the surrogates from the journal, or find the mode with the sites' help and write them down."""
    structure = jax.tree.structure(study.start())
    for entry, arrays in book.records if book is not None else ():
        if entry.get("kind") == "surrogates":
            leaves, rest = arrays[: structure.num_leaves], arrays[structure.num_leaves :]
            centre = jax.tree.unflatten(structure, [jnp.asarray(x) for x in leaves])
            return centre, [Expansion(*rest[i : i + 3]) for i in range(0, len(rest), 3)]
    centre = study.start()
    for _ in range(study.newton):
        expansions = _expand(study, transport, centre, give_up_after)
        after, length = study.newton_step(centre, expansions)
        logger.info("Newton's step to the mode: %.3g posterior standard deviations", length)
        if length < _CONVERGED:
            break
        centre = after
    else:
        raise RoundsError(
            f"The mode was not found in newton={study.newton} rounds; the last step was {length:.3g} standard deviations. Give "
            "initial= nearer to it, or more rounds."
        )
    if book is not None:
        arrays = [*jax.tree.leaves(centre), *(x for e in expansions for x in e)]
        book.append({"kind": "surrogates"}, [np.asarray(x) for x in arrays])
    return centre, expansions


def _expand(study: Study, transport: Any, centre: Position, give_up_after: float) -> list[Expansion]:
    """Ask every client for its expansion, until all have given one that can be one."""
    theta = tuple(np.asarray(x) for x in jax.tree.leaves(centre))
    size = sum(x.size for x in theta)
    found: dict[int, Expansion] = {}
    refused: Counter[int] = Counter()
    begin = time.monotonic()
    while len(found) < len(study.names):
        for client, content in transport.ask(messages.EXPAND, theta, set(range(len(study.names))) - set(found)):
            try:
                found[client] = _read(study, content, size)
            except SurrogateError as error:
                logger.warning("refused the surrogate of client %r: %s", study.names[client], error)
                refused[client] += 1
                if refused[client] >= study.max_refusals:
                    raise RoundsError(
                        f"The surrogate of client {study.names[client]!r} is refused, and without it there is no posterior of all "
                        f"the data: {error}"
                    ) from error
        if time.monotonic() - begin > give_up_after:
            missing = [n for i, n in enumerate(study.names) if i not in found]
            raise RoundsError(f"No surrogate came from {missing} in {give_up_after:.0f} s.")
    return [found[i] for i in range(len(study.names))]


def _read(study: Study, content: Any, size: int) -> Expansion:
    """Read a site's expansion; raise `SurrogateError` whatever is wrong with it."""
    limits = {"largest": study.largest_precision, "largest_noise": study.largest_noise}
    try:
        expansion = messages.decode_expansion(content)
        check_surrogate(*expansion, size, **limits)
    except SurrogateError:
        raise
    except Exception as error:
        raise SurrogateError(f"its message cannot be read: {type(error).__name__}: {str(error)[:200]}") from error
    return expansion
