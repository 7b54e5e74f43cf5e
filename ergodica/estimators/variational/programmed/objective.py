"""Objectives that the user writes as a program over densities."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpyro
from jaxtyping import Array
from numpyro.handlers import block, seed
from numpyro.primitives import Messenger

from ergodica.core import check
from ergodica.core.types import Key, PyTree
from ergodica.estimators.variational.explain import Explanation, Row
from ergodica.estimators.variational.objectives.elbo import ELBO
from ergodica.estimators.variational.objectives.loss import Evaluation
from ergodica.estimators.variational.objectives.objective import AbstractObjective
from ergodica.estimators.variational.particles import Run
from ergodica.estimators.variational.programmed.density import OTHER, ObjectiveRun, ProgramDensity
from ergodica.estimators.variational.programmed.log_density import VALUE, LogDensity, Origin
from ergodica.estimators.variational.structure import GUIDE, Program
from ergodica.estimators.variational.wrap import LEARNED, STATE, declare_in_guide

UNDECLARED = "_without_declarations"


class ProgrammedObjective(AbstractObjective):
    r"""An objective that the user writes as a program, with an unbiased gradient and an estimator of its own at each draw.

    .. math:: \mathcal L(\theta) = \mathrm{E} f_\theta, \qquad f_\theta = \texttt{objective(model, guide)}

    The expectation is over everything that the program draws. It goes where NumPyro's ``Trace_ELBO`` goes:
    ``SVI(model, guide, optimiser, ProgrammedObjective(...))``.

    Parameters
    ----------
    objective : callable
        ``objective(model, guide)`` is run once for each particle and returns a number, which is to be made large. Model and
        guide come with their arguments set, and have

        - ``sample()``, which returns values by the names of their sites, and their log density; each call is an independent draw;
        - ``log_density(values)``, with what the program observes;
        - ``held``, the same with the parameters held: derivatives flow through values alone;
        - ``prior``, the law of the latent sites without what the program observes.

        `marginal` and `normalise` make others out of them.
    num_particles : int
        Independent runs of the objective a step, whose mean is taken.
    sites : mapping of str to AbstractSiteEstimator or "auto", optional
        As for `ergodica.estimators.ELBO`, by the names of the sites in their programs. Where a site is drawn several times,
        the name holds for all of its draws; ``"z#2"`` is the second alone. `explain` lists them.
    vectorize_particles : bool or callable
        As for `ergodica.estimators.ELBO`.

    Raises
    ------
    ValueError
        If the objective returns no scalar or draws nothing; if values lack a site or name one too many; for subsampled plates,
        unless the objective is a sum of multiples of log densities by constants.
    SiteError
        Where an estimator cannot be right at a site.

    Notes
    -----
    Derivatives by parameters go through the law of each draw, by the site's estimator, and through the value :math:`f_\theta`
    itself, which counts the parameters in its log densities. ``jax.lax.stop_gradient`` stops what flows through a number, not
    what flows through the law of a draw: to hold that too (wake-sleep, forward KL), draw from ``guide.held``.

    Log densities keep their parts apart under sums and multiples by constants, so that each draw has the cost of the parts that
    depend on it, in its plates; a program for the ELBO is the ELBO, number by number. After any other function (``jnp.logaddexp``,
    ``jnp.stack``) they are one number, on which all draws depend.

    Call ``sample`` in plain Python. Under ``jax.vmap`` or ``jax.lax.scan`` all draws would be the same one. ``log_density``
    may be mapped.

    Sticking the landing is written in the program, ``log_q = guide.held.log_density(z)``; ``Reparam(stl=True)`` is refused. At
    score-function sites the same line drops a term of mean zero from the gradient of an ELBO.

    Cost: one run of the objective a particle, times the branches of enumerated sites, and its derivative.

    References
    ----------
    Becker, Lew, Wang, Ghavami, Huot, Rinard and Mansinghka (2024).

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, optax, ergodica as erg
    >>> def model(x):
    ...     z = numpyro.sample("z", dist.Bernoulli(0.5))
    ...     numpyro.sample("x", dist.Normal(1.0 * z, 1.0), obs=x)
    >>> def guide(x):
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.zeros(()))))
    >>> def iwelbo(model, guide):
    ...     log_weights = []
    ...     for _ in range(3):
    ...         z, log_q = guide.sample()
    ...         log_weights.append(model.log_density(z) - log_q)
    ...     return jax.nn.logsumexp(jnp.stack(log_weights)) - jnp.log(3.0)
    >>> loss = erg.estimators.ProgrammedObjective(iwelbo, num_particles=4)
    >>> svi = numpyro.infer.SVI(model, guide, optax.adam(0.1), loss)
    >>> result = svi.run(jax.random.key(0), 50, jnp.array(2.0), progress_bar=False)
    >>> bool(result.params["logit"] > 0)
    True
    """

    objective: Callable = eqx.field(static=True)

    references: ClassVar = ("becker2024",)

    def __init__(
        self,
        objective: Callable,
        num_particles: int = 1,
        sites: Mapping[str, Any] | None = None,
        *,
        vectorize_particles: bool | Callable = True,
    ) -> None:
        self.objective = check.function("objective", objective)
        super().__init__(num_particles, sites, vectorize_particles=vectorize_particles)

    # --- what an objective is ------------------------------------------------------------------------------------------

    def combine(self, run: Run) -> Array:
        """Mean over particles."""
        return self._mean.combine(run)

    def cost(self, run: Run, name: str) -> tuple[Array, Array | None]:
        """A particle's parts downstream of the draw; the mean of the other particles'."""
        return self._mean.cost(run, name)

    @property
    def _mean(self) -> ELBO:
        return ELBO(self.num_particles, {}, vectorize_particles=True)

    def composed(self, program: Program) -> Program:
        """The objective as a guide that draws and counts, and a model that does nothing."""
        model, guide = program.model, getattr(program.guide, UNDECLARED, program.guide)

        def run_objective(*args: Any, **kwargs: Any) -> None:
            run = ObjectiveRun(self.sites)
            value = self.objective(
                ProgramDensity(model, args, kwargs, run, "model", "log p({})"),
                ProgramDensity(guide, args, kwargs, run, "guide", "log q({})"),
            )
            if not run.names:
                raise ValueError(
                    f"The objective {self._name} draws nothing, so that it is no expectation. Call guide.sample() in it."
                )
            for part, origin in self._parts(value, run):
                with _InPlates(origin.frames):
                    numpyro.factor(run.unused(origin.label), -part)

        return Program(_nothing, run_objective, program.args, program.kwargs)

    def _parts(self, value: Any, run: ObjectiveRun) -> LogDensity:
        """What the objective returned, as parts."""
        if isinstance(value, LogDensity):
            shape = jnp.broadcast_shapes(*(jnp.shape(part)[: jnp.ndim(part) - origin.rank] for part, origin in value))
        else:
            shape = self._shape(value)
        if shape != ():
            raise ValueError(
                f"The objective {self._name} must return a scalar; got shape {shape}. Reduce it over its draws, by jnp.mean or "
                "jax.nn.logsumexp; num_particles takes the mean over runs of it."
            )
        if isinstance(value, LogDensity):
            return value
        if run.plates:
            names = sorted({repr(name) for name, *_ in run.plates})
            raise ValueError(
                f"Plate {', '.join(names)} holds a random part of its elements, and the objective {self._name} returns no sum "
                "of multiples of log densities, of which alone the mean over parts is right. Take the whole plate."
            )
        return LogDensity([jnp.asarray(value, jnp.result_type(value, float))], [Origin(VALUE)])

    def _shape(self, value: Any) -> tuple[int, ...]:
        advice = "It must return a scalar, such as model.log_density(z) - log_q."
        try:
            array = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise ValueError(f"The objective {self._name} returned {type(value).__name__}. {advice}") from error
        if not jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(array.dtype, jnp.integer):
            raise ValueError(f"The objective {self._name} returned numbers of type {array.dtype}. {advice}")
        return array.shape

    @property
    def _name(self) -> str:
        return getattr(self.objective, "__name__", type(self.objective).__name__)

    # --- what users call -----------------------------------------------------------------------------------------------

    def plan(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Explanation:
        """What `explain` prints, as rows."""
        composed = self.composed(Program(model, guide, args, kwargs))
        found = super().plan(composed.model, composed.guide, *args, **kwargs)
        draws = {GUIDE.format(row.site) for row in found.rows}  # they have no terms of their own
        before, after = GUIDE.split("{}")

        def shown(terms: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(t.removeprefix(before).removesuffix(after) for t in terms if t not in draws)

        def why(row: Row) -> str:
            base = row.site.partition("#")[0]
            return f"{base!r} named in sites" if row.site not in self.sites and self.sites.get(base) else row.why

        title = found.title.replace("model and guide", f"the objective {self._name}")
        rows = tuple(row._replace(terms=shown(row.terms), why=why(row)) for row in found.rows)
        return found._replace(title=title, rows=rows)

    def guide(self, model: Callable, guide: Callable) -> Callable:
        """The guide with declarations: of the estimators' state and parameters, and of parameters in the objective's own programs.

        Needed where a proposal has parameters of its own, and for estimators that learn or remember.
        """

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result, key = guide(*args, **kwargs), numpyro.prng_key()
            composed = self.composed(Program(model, guide, args, kwargs))
            declaring = declare_in_guide(self, composed.model, composed.guide)
            with block(hide_fn=lambda msg: not _is_declaration(msg)):
                seed(declaring, jax.random.key(0) if key is None else key)(*args, **kwargs)
            return result

        setattr(wrapped, UNDECLARED, guide)
        return wrapped

    def memory(self, program: Program, params: dict) -> dict[str, PyTree]:
        """Empty memories of the estimators that have one, by draw."""
        return super().memory(self.composed(program), params)

    def evaluate(self, key: Key, params: dict, program: Program, state: dict, learned: dict) -> Evaluation:
        """Estimate the objective; ascends."""
        program = self.composed(program)
        program = program._replace(guide=_Declared(program.guide, frozenset(params)))
        return super().evaluate(key, params, program, state, learned)


def _is_declaration(msg: dict) -> bool:
    """Whether SVI must hear of a parameter or a mutable value."""
    if msg["type"] == "param":
        return msg.get(OTHER, False) or msg["name"].endswith(LEARNED)
    return msg["type"] == "mutable" and msg["name"].endswith(STATE)


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A model without sites: the objective counts everything by itself."""


class _InPlates(Messenger):
    """Says which plates a factor is in, without their scale, which it has already."""

    def __init__(self, frames: tuple) -> None:
        super().__init__()
        self.frames = frames

    def process_message(self, msg: dict) -> None:
        """Set the plates."""
        msg["cond_indep_stack"] = list(self.frames)


class _Declared(Messenger):
    """Raises where a program of the objective has parameters that no optimiser knows."""

    def __init__(self, fn: Callable, names: frozenset[str]) -> None:
        super().__init__(fn)
        self.names = names

    def process_message(self, msg: dict) -> None:
        """Look at the parameters of programs other than model and guide."""
        if msg["type"] == "param" and msg.get(OTHER, False) and msg["name"] not in self.names:
            raise ValueError(
                f"Parameter {msg['name']!r} belongs to a program inside of the objective, and was not declared, so that it "
                "would never be trained. Use SVI(model, loss.guide(model, guide), optimiser, loss)."
            )
