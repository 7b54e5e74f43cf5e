"""Densities by importance resampling: of some of a program's sites, and of a normalised program."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array
from numpyro import distributions as dist

from ergodica.core import check
from ergodica.estimators.variational.programmed.density import AbstractDensity, ProgramDensity

type Proposal = AbstractDensity | Callable[..., Any] | None


def log_mean_weight(log_weights: Sequence[Any]) -> Array:
    r""":math:`\log \frac1m \sum_j e^{\ell_j}`."""
    stacked = jnp.stack([jnp.asarray(x) for x in log_weights])
    return jax.nn.logsumexp(stacked) - jnp.log(jnp.asarray(len(log_weights), stacked.dtype))


def marginal(
    program: AbstractDensity, keep: Sequence[str], num_particles: int = 1, proposal: Proposal = None
) -> "Marginal":
    r"""The density of some of a program's sites, the others summed out by importance sampling.

    With :math:`z` what is kept, :math:`u` the rest, and proposal :math:`r(u \mid z)`, both faces are

    .. math:: \hat q(z) = \frac1m \sum_{j=1}^m \frac{q(u_j, z)}{r(u_j \mid z)}

    ``log_density(z)`` draws all :math:`u_j` from :math:`r`, and :math:`\mathrm{E}\, \hat q(z) = q(z)`. ``sample()`` draws
    :math:`(u_1, z)` from the program, retains :math:`u_1`, and draws the others from :math:`r`: :math:`\mathrm{E} [1 / \hat
    q(z) \mid z] = 1 / q(z)`. An ELBO with :math:`\log\hat q` in the place of :math:`\log q` is therefore still a lower bound,
    and tightens as :math:`m` grows.

    Parameters
    ----------
    program : the guide or the model of the objective, or another density made of them
    keep : sequence of str
        Names of the sites that are kept.
    num_particles : int
        :math:`m`.
    proposal : callable, density or None
        A NumPyro program that is called with the dictionary of what is kept, and draws all other sites. Unless given, the
        program itself, run with what is kept set. Parameters of its own are declared by ``loss.guide(model, guide)``.

    Returns
    -------
    Marginal
        With ``sample()``, ``log_density(values)`` and ``held``.

    Raises
    ------
    TypeError, ValueError
        For names that the program does not draw, and where nothing is left to be summed out.

    Notes
    -----
    Cost: ``num_particles`` runs of program and proposal a call. With the default proposal the weights' spread is that of
    :math:`q(z \mid u)`: a narrow conditional law makes the bound very loose.

    Sites in plates are summed out jointly, with one weight for all elements, so that :math:`m` must grow exponentially with a
    plate's size. Subsampled plates are refused.

    References
    ----------
    Becker et al. (2024); Sobolev and Vetrov (2019); :math:`m = 1`: Ranganath, Tran and Blei (2016).

    Examples
    --------
    >>> from ergodica.estimators import ProgrammedObjective, marginal
    >>> def hierarchical_elbo(model, guide):
    ...     z, log_q = marginal(guide, keep=["z"], num_particles=5).sample()
    ...     return model.log_density(z) - log_q
    >>> loss = ProgrammedObjective(hierarchical_elbo, num_particles=8)
    """
    check_density("marginal", program)
    if isinstance(keep, str) or not keep:
        raise TypeError(f"keep must be a list of names of sites, such as ['z']; got {keep!r}.")
    if proposal is None and not isinstance(program, ProgramDensity):
        raise ValueError(
            f"proposal must be given where the program is a {type(program).__name__}: only a NumPyro program can be run with some "
            "sites set."
        )
    count = check.integer("num_particles", num_particles)
    return Marginal(program, tuple(keep), count, check_proposal(proposal))


def normalise(program: AbstractDensity, num_particles: int, proposal: Proposal = None) -> "Normalised":
    r"""A guide by sampling importance resampling: close to the posterior of an unnormalised program, the closer the more particles.

    Draw :math:`z_1, \dots, z_m` from the proposal :math:`r`, with :math:`w_j = p(z_j) / r(z_j)`, and return :math:`z_J` with
    :math:`P(J = j) \propto w_j`. Its density is estimated by

    .. math:: \hat\pi(z) = p(z) \Big/ \frac1m \Big( \frac{p(z)}{r(z)} + \sum_{j \ne J} w_j \Big)

    in ``sample()`` with the particles that were drawn, and in ``log_density(z)`` with :math:`m - 1` fresh ones.

    Parameters
    ----------
    program : the model of the objective, or another density
        :math:`p`, which need not be normalised.
    num_particles : int
        :math:`m`.
    proposal : density, callable or None
        The guide, usually; or a NumPyro program that is called without arguments. Unless given, ``program.prior``.

    Returns
    -------
    Normalised
        With ``sample()``, ``log_density(values)`` and ``held``.

    Notes
    -----
    The choice of :math:`J` is a site of its own, ``"resample"``, with an estimator like all others: summed over by rule if
    there are at most 16 particles, else the score function. The ELBO over ``normalise(model, m, guide)`` is the
    importance-weighted bound, in which :math:`J` cancels.

    Cost: ``num_particles`` runs of program and proposal a call. Subsampled plates are refused.

    References
    ----------
    Becker et al. (2024); Naesseth et al. (2018) for its use as a guide.

    Examples
    --------
    >>> from ergodica.estimators import ProgrammedObjective, normalise
    >>> def resampled_elbo(model, guide):
    ...     z, log_q = normalise(model, 4, proposal=guide).sample()
    ...     return model.log_density(z) - log_q
    >>> loss = ProgrammedObjective(resampled_elbo, num_particles=8)
    """
    check_density("normalise", program)
    if proposal is None and not isinstance(program, ProgramDensity):
        raise ValueError(f"proposal must be given where the program is a {type(program).__name__}, which has no prior.")
    count = check.integer("num_particles", num_particles)
    return Normalised(program, count, check_proposal(proposal))


@dataclasses.dataclass(frozen=True, eq=False)
class Marginal(AbstractDensity):
    """What `marginal` returns."""

    program: AbstractDensity
    keep: tuple[str, ...]
    num_particles: int
    proposal: Proposal

    references: ClassVar = ("becker2024", "sobolev2019", "ranganath2016")

    def sample(self) -> tuple[dict[str, Array], Array]:
        """Draw what is kept; the first weight is that of the retained rest."""
        values, log_joint = self.program.sample()
        kept, rest = self._split(values)
        retained = log_joint - self._proposal(kept).log_density(rest)
        return kept, log_mean_weight([jnp.asarray(retained), *self._fresh(kept, self.num_particles - 1)])

    def log_density(self, values: Mapping[str, Array]) -> Array:
        """Logarithm of an unbiased estimate, from fresh draws of the rest."""
        if set(values) != set(self.keep):
            raise ValueError(
                f"The marginal's log_density needs values for {', '.join(map(repr, self.keep))} and no others; got "
                f"{', '.join(map(repr, values)) or 'none'}."
            )
        return log_mean_weight(self._fresh(values, self.num_particles))

    @property
    def run(self) -> Any:
        """The run of the objective that the program belongs to."""
        return self.program.run

    @property
    def held(self) -> "Marginal":
        """The same with the parameters of program and proposal held."""
        return dataclasses.replace(self, program=self.program.held, proposal=_held(self.proposal))

    def _fresh(self, kept: Mapping[str, Array], count: int) -> list[Array]:
        """Log weights of fresh draws of the rest."""
        draws = [self._proposal(kept).sample() for _ in range(count)]
        log_joints = evaluate(self.program, [{**kept, **rest} for rest, _ in draws])
        return [log_joint - jnp.asarray(log_r) for log_joint, (_, log_r) in zip(log_joints, draws, strict=True)]

    def _proposal(self, kept: Mapping[str, Array]) -> AbstractDensity:
        if self.proposal is None:
            assert isinstance(self.program, ProgramDensity)
            return self.program.given_values(kept).prior
        return _bound(self.proposal, (dict(kept),), self.program)

    def _split(self, values: Mapping[str, Array]) -> tuple[dict, dict]:
        unknown = [name for name in self.keep if name not in values]
        if unknown:
            raise ValueError(
                f"keep names {', '.join(map(repr, unknown))}, which the program does not draw; it draws "
                f"{', '.join(map(repr, values))}."
            )
        rest = {name: value for name, value in values.items() if name not in self.keep}
        if not rest:
            raise ValueError(
                f"keep names every site of the program, {', '.join(map(repr, values))}: there is nothing to sum out. Use the "
                "program itself."
            )
        return {name: values[name] for name in self.keep}, rest


@dataclasses.dataclass(frozen=True, eq=False)
class Normalised(AbstractDensity):
    """What `normalise` returns."""

    program: AbstractDensity
    num_particles: int
    proposal: Proposal

    references: ClassVar = ("becker2024", "naesseth2018")

    def sample(self) -> tuple[dict[str, Array], Array]:
        """Draw particles, and one of them by its weight."""
        draws, log_targets, log_weights = self._draw(self.num_particles)
        values = jax.tree.map(lambda *leaves: jnp.stack(leaves), *draws)
        index: Any = 0
        if self.num_particles > 1:
            index = self.run.draw("resample", dist.Categorical(logits=jnp.stack(log_weights)))
        chosen = {name: value[index] for name, value in values.items()}
        return chosen, jnp.stack(log_targets)[index] - log_mean_weight(log_weights)

    def log_density(self, values: Mapping[str, Array]) -> Array:
        """Logarithm of an unbiased estimate, the values among fresh particles."""
        log_target = jnp.asarray(self.program.log_density(values))
        own = log_target - jnp.asarray(self._proposal().log_density(values))
        return log_target - log_mean_weight([own, *self._draw(self.num_particles - 1)[2]])

    @property
    def run(self) -> Any:
        """The run of the objective that the program belongs to."""
        return self.program.run

    @property
    def held(self) -> "Normalised":
        """The same with the parameters of program and proposal held."""
        return dataclasses.replace(self, program=self.program.held, proposal=_held(self.proposal))

    def _draw(self, count: int) -> tuple[list[dict[str, Array]], list[Array], list[Array]]:
        """Values, logs of the unnormalised density, and log weights."""
        draws = [self._proposal().sample() for _ in range(count)]
        log_targets = evaluate(self.program, [values for values, _ in draws])
        log_weights = [log_p - jnp.asarray(log_r) for log_p, (_, log_r) in zip(log_targets, draws, strict=True)]
        return [values for values, _ in draws], log_targets, log_weights

    def _proposal(self) -> AbstractDensity:
        if self.proposal is None:
            assert isinstance(self.program, ProgramDensity)
            return self.program.prior
        return _bound(self.proposal, (), self.program)


def evaluate(program: AbstractDensity, draws: Sequence[Mapping[str, Array]]) -> list[Array]:
    """Log densities at several draws: in one mapped run where the density itself draws nothing."""
    if len(draws) < 2 or not isinstance(program, ProgramDensity):
        return [jnp.asarray(program.log_density(values)) for values in draws]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(dict, draws))
    return list(jax.vmap(lambda values: jnp.asarray(program.log_density(values)))(stacked))


def _bound(proposal: Any, args: tuple, program: AbstractDensity) -> AbstractDensity:
    """A proposal as a density."""
    if isinstance(proposal, AbstractDensity):
        return proposal
    held = isinstance(proposal, _HeldProgram)
    function = proposal.function if held else proposal
    return ProgramDensity(function, args, {}, program.run, "proposal", "log r({})", other=True, is_held=held)


@dataclasses.dataclass(frozen=True, eq=False)
class _HeldProgram:
    """A proposal whose parameters are held."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


def _held(proposal: Proposal) -> Any:
    if proposal is None or isinstance(proposal, _HeldProgram):
        return proposal
    return proposal.held if isinstance(proposal, AbstractDensity) else _HeldProgram(proposal)


def check_density(name: str, program: Any) -> None:
    """Raise unless a program is one that an objective was given."""
    if not isinstance(program, AbstractDensity):
        raise TypeError(
            f"{name} takes the model or the guide that the objective was called with, or a density made of them; got "
            f"{program!r} of type {type(program).__name__}. Call it inside of the objective."
        )


def check_proposal(proposal: Any) -> Any:
    """Raise unless a proposal is a density or a program."""
    if proposal is not None and not isinstance(proposal, AbstractDensity) and not callable(proposal):
        raise TypeError(
            f"proposal must be a NumPyro program or a density; got {proposal!r} of type {type(proposal).__name__}."
        )
    return proposal
