"""An objective over a given model and guide as a gradient estimator, for `ergodica.compare_gradients` and own loops."""

import copy
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import replay, seed, substitute, trace

from ergodica.core import check
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.types import Batch, Draws, Estimate, Key, PyTree, Reference
from ergodica.estimators.variational.numpyro_loss import NumPyroLoss, as_loss
from ergodica.estimators.variational.objectives.loss import AbstractLoss
from ergodica.estimators.variational.per_draw import per_draw
from ergodica.estimators.variational.structure import Program, inspect
from ergodica.estimators.variational.watch import Watch
from ergodica.estimators.variational.wrap import LEARNED


class VariationalGradient(AbstractGradientEstimator):
    """Gradient of a variational objective with respect to the unconstrained parameters of a model and a guide.

    SVI needs no such thing; this is for `ergodica.compare_gradients`, and for loops of one's own.

    Parameters
    ----------
    loss : ELBO, IWELBO or another objective
        Or one of NumPyro's losses, or any object with their method ``loss(key, params, model, guide, *args, **kwargs)``.
    model, guide : callable
        NumPyro programs. Where an estimator learns (`Network`), give ``loss.guide(model, guide)``; moving averages are kept in
        the estimator's state and need no declaration.
    *args, **kwargs
        What they are called with.

    Notes
    -----
    Positions are dictionaries of unconstrained parameters by name, as SVI's optimiser sees them; `start` makes one. The
    gradient ascends, and ``value`` is the objective, not the loss. ``n_grad`` counts runs of model and guide.

    Cost: one run of the program for each particle and branch, and its derivative.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ergodica as erg
    >>> def model():
    ...     numpyro.sample("z", dist.Bernoulli(0.2))
    >>> def guide():
    ...     numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.zeros(()))))
    >>> gradient = erg.estimators.VariationalGradient(erg.estimators.ELBO(), model, guide)
    >>> params = gradient.start(jax.random.key(0))
    >>> state = gradient.init(jax.random.key(1), params)
    >>> estimate, state = gradient.estimate(jax.random.key(2), params, state)
    >>> print(f"{estimate.gradient['logit']:.3f}", estimate.n_grad)
    -0.347 2
    """

    loss: AbstractLoss
    model: Callable = eqx.field(static=True)
    guide: Callable = eqx.field(static=True)
    args: tuple
    kwargs: dict

    def __init__(self, loss: Any, model: Callable, guide: Callable, /, *args: Any, **kwargs: Any) -> None:
        self.loss = as_loss(loss)
        self.model = check.function("model", model)
        self.guide = check.function("guide", guide)
        self.args, self.kwargs = args, kwargs

    def start(self, key: Key) -> dict[str, PyTree]:
        """Unconstrained initial parameters, as model and guide declare them."""
        sites = self._parameter_sites(key)
        return {name: _transform(site).inv(site["value"]) for name, site in sites.items()}

    def constrain(self, params: dict[str, PyTree]) -> dict[str, PyTree]:
        """Parameters as model and guide see them."""
        found: dict[str, Any] = {}

        def look() -> None:
            found.update({n: _transform(s) for n, s in self._parameter_sites(jax.random.key(0)).items()})

        jax.eval_shape(look)
        return {name: found[name](value) if name in found else value for name, value in params.items()}

    def init(self, key: Key, params: PyTree, batch: Batch | None = None) -> dict[str, PyTree]:  # noqa: ARG002
        """Empty memories, of the estimators or of the loss itself."""
        return self.loss.memory(self.program, self.constrain(params))

    def estimate(
        self, key: Key, params: PyTree, state: dict[str, PyTree], batch: Batch | None = None
    ) -> tuple[Estimate, dict[str, PyTree]]:
        """Estimate the objective's gradient from fresh particles."""
        self._takes_no(batch)
        runs = []

        def value(params: PyTree) -> tuple[jax.Array, dict]:
            learned = {n.removesuffix(LEARNED): v for n, v in params.items() if n.endswith(LEARNED)}
            done = self.loss.evaluate(key, self.constrain(params), self.program, state, learned)
            runs.append(done.num_runs)
            return done.value, done.state

        (objective, state), gradient = jax.value_and_grad(value, has_aux=True)(params)
        return Estimate(gradient, objective, n_grad=runs[0]), state

    def probe(self, key: Key, params: PyTree, state: dict[str, PyTree]) -> Estimate:
        """Estimate from other particles; memories stay as they are."""
        return self.estimate(key, params, state)[0]

    def reference(self, params: PyTree) -> Reference | None:
        """The exact gradient, where `ergodica.estimators.ExactGradient` can compute it to a known error."""
        from ergodica.estimators.variational.exact.gradient import reference_of

        return reference_of(self, params)

    def estimate_apart(self, key_data: Key, key: Key, params: PyTree, state: dict[str, PyTree]) -> Estimate | None:
        """Estimate with the plates' subsamples drawn from a key of their own."""
        program = self._on_subsamples(key_data)
        other = VariationalGradient(self.loss, program.model, program.guide, *self.args, **self.kwargs)
        return other.estimate(key, params, state)[0]

    def per_draw(
        self,
        key: Key,
        params: PyTree,
        state: dict[str, PyTree],
        batch: Batch | None = None,
        *,
        linearise: bool = False,
        independent: bool = False,  # noqa: ARG002  (all draws are fresh)
    ) -> tuple[Draws, dict[str, PyTree]] | None:
        """Particles of an `ELBO` one by one, with the noise of all Gaussian sites that `Reparam` draws.

        ``None`` under other objectives, without such sites, and where an estimator looks at other particles or remembers.
        """
        self._takes_no(batch)
        program = self.program
        if inspect(program, self.constrain(params)).subsampled:
            key_data, key = jax.random.split(key)
            program = self._on_subsamples(key_data)
        draws = per_draw(self, program, key, params, linearise=linearise)
        return None if draws is None else (draws, state)

    def with_budget(self, budget: int) -> "VariationalGradient | None":
        """The estimator with as many particles as run the program ``budget`` times, where the objective is a mean over them."""
        loss: Any = copy.copy(self.loss)
        if not getattr(loss, "linear", False):
            return None
        num_particles = budget * loss.num_particles // self._num_runs()
        if num_particles < 1:
            return None
        if isinstance(loss, NumPyroLoss):
            loss = loss.with_particles(num_particles)
        else:
            object.__setattr__(loss, "num_particles", num_particles)
        return VariationalGradient(loss, self.model, self.guide, *self.args, **self.kwargs)

    def evaluations(self, params: PyTree, n_grad: float) -> tuple[float, float]:
        """Runs of the program, and as many derivatives if any flow through the model: score functions need none."""
        watched = Watch(self.model)
        other = VariationalGradient(self.loss, watched, self.guide, *self.args, **self.kwargs)
        jax.eval_shape(lambda k: other.estimate(k, params, other.init(k, params))[0].gradient, jax.random.key(0))
        return n_grad, n_grad if watched.differentiated else 0.0

    def _num_runs(self) -> int:
        runs = []

        def estimate(key: Key) -> None:
            params = self.start(key)
            runs.append(self.estimate(key, params, self.init(key, params))[0].n_grad)

        jax.eval_shape(estimate, jax.random.key(0))
        return runs[0]

    @property
    def program(self) -> Program:
        """Model, guide and their arguments."""
        return Program(self.model, self.guide, self.args, self.kwargs)

    def _takes_no(self, batch: Batch | None) -> None:
        if batch is not None:
            raise ValueError(
                f"{type(self).__name__} takes no batch that is handed over; data are arguments of the model: make "
                "another one with other arguments."
            )

    def _on_subsamples(self, key: Key) -> Program:
        """The program with subsamples of its plates that are drawn once."""
        sites = self._sites(key)
        taken = {n: s["value"] for n, s in sites.items() if s["type"] == "plate" and s["args"][0] != len(s["value"])}
        model, guide = (substitute(program, data=taken) for program in (self.model, self.guide))
        return Program(model, guide, self.args, self.kwargs)

    def _parameter_sites(self, key: Key) -> dict[str, Any]:
        return {name: site for name, site in self._sites(key).items() if site["type"] == "param"}

    def _sites(self, key: Key) -> dict[str, Any]:
        key_guide, key_model = jax.random.split(key)
        guide_trace = trace(seed(self.guide, key_guide)).get_trace(*self.args, **self.kwargs)
        model_trace = trace(replay(seed(self.model, key_model), guide_trace)).get_trace(*self.args, **self.kwargs)
        return model_trace | guide_trace


def _transform(site: dict) -> Any:
    return biject_to(site["kwargs"].get("constraint", constraints.real))
