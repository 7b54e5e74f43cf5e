"""Samplers of this package as kernels of `numpyro.infer.MCMC`."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from numpyro.infer.mcmc import MCMCKernel
from numpyro.util import is_prng_key

from ergodica.core import check, tree
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key, Position, PyTree
from ergodica.models.numpyro import from_numpyro
from ergodica.models.numpyro_trace import PinnedPlates


class KernelState(NamedTuple):
    """What `numpyro.infer.MCMC` carries; entries of ``info`` are found as attributes, and so as ``extra_fields``.

    Attributes
    ----------
    chain : NamedTuple
        State of the sampler.
    info : dict of scalars
        What the last step reported: ``lp_minibatch``, ``grad_norm``, ``step_size``, ``n_grad``, … as far as the sampler has
        them, and ``diverging``.
    rng_key : key
    """

    chain: Any
    info: dict[str, Array]
    rng_key: Key

    @property
    def z(self) -> Position:
        """The unconstrained position."""
        return self.chain.position

    def __getattr__(self, name: str) -> Array:
        return self[name]

    def __getitem__(self, name: Any) -> Any:
        """Give an entry of ``info`` by name; MCMC asks so where there is no attribute."""
        if not isinstance(name, str):
            return tuple.__getitem__(self, name)
        info = tuple.__getitem__(self, 1)
        if isinstance(info, dict) and name in info:
            return info[name]
        if name == "potential_energy":
            raise AttributeError(
                "A stochastic-gradient sampler does not know the potential energy at its draws, and ArviZ would store an "
                "estimate from other data at another point as the log density 'lp'. Ask for extra_fields=('lp_minibatch',)."
            )
        known = ", ".join(["z", *info]) if isinstance(info, dict) else "z"
        raise AttributeError(f"{name!r} is no field of this kernel's state; there are {known}.")


class Kernel(MCMCKernel):
    """A sampler of this package as a kernel of `numpyro.infer.MCMC`.

    Parameters
    ----------
    model : callable
        A NumPyro model.
    build : callable
        ``build(posterior) -> AbstractKernel``, such as ``lambda p: SGLD(Minibatch(p, 64), 1e-4)``.
    data : str or sequence of str, optional
        The model's arguments with one row a datum, by name. Left out, the model must have a
        ``plate(name, N, subsample_size=n)`` of its own and pick rows by its indices.
    plate : str, optional
        As for `ergodica.from_numpyro`.
    deterministic : {"global", "all", "none"}
        Which deterministic sites are among the samples.

    Raises
    ------
    ValueError, TypeError
        For arguments of the wrong kind; when ``MCMC.run`` is called, for what `ergodica.from_numpyro` refuses, for data names
        that the model or the call does not have, and for ``jit_model_args=True``.

    Notes
    -----
    All chain methods work and give the same draws up to rounding: ``"sequential"``, ``"vectorized"`` (the fastest on one
    device), ``"parallel"`` and ``jax.vmap``. Progress bar, thinning, ``extra_fields``, ``post_warmup_state`` and
    ``arviz.from_numpyro`` work as with NUTS. ArviZ is shown the model on all its data, so that ``observed_data`` is not one
    random minibatch. A block of NumPyro's ``Gibbs`` it cannot be.

    There is no adaptation: ``num_warmup`` steps are made and discarded. ``potential_energy`` is refused as an extra field,
    since a minibatch estimate of it would end up as ``lp``; ask for ``lp_minibatch``.

    The data are constants of the compiled program, NumPyro constrains every draw that is kept, and there are no probe gradients,
    hence no check of bias. `ergodica.sample` has none of these limits; take this kernel where other code expects an ``MCMC``.

    Examples
    --------
    >>> import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist, ergodica as erg
    >>> def model(y):
    ...     mu = numpyro.sample("mu", dist.Normal(0.0, 10.0))
    ...     with numpyro.plate("datum", y.shape[0]):
    ...         numpyro.sample("y", dist.Normal(mu, 1.0), obs=y)
    >>> def build(posterior):
    ...     return erg.samplers.SGLD(erg.estimators.Minibatch(posterior, 2), step_size=0.01)
    >>> mcmc = numpyro.infer.MCMC(Kernel(model, build, data="y"), num_warmup=10, num_samples=20, progress_bar=False)
    >>> mcmc.run(jax.random.key(0), y=jnp.arange(6.0), extra_fields=("grad_norm",))
    >>> mcmc.get_samples()["mu"].shape, mcmc.get_extra_fields()["grad_norm"].shape
    ((20,), (20,))
    """

    def __init__(
        self,
        model: Callable,
        build: Callable[[Posterior], AbstractKernel],
        *,
        data: str | Sequence[str] | None = None,
        plate: str | None = None,
        deterministic: Literal["global", "all", "none"] = "global",
    ) -> None:
        self._model = check.function("model", model)
        self._build = check.function("build", build)
        self._data = (data,) if isinstance(data, str) else data if data is None else tuple(data)
        self._plate = plate
        self._deterministic = check.one_of("deterministic", deterministic, ("global", "all", "none"))
        self._bound: tuple[PyTree, AbstractKernel, Posterior] | None = None

    @property
    def model(self) -> Callable:
        """The model on all its data; ArviZ and simulation-based calibration look at it."""

        def whole(*args: Any, **kwargs: Any) -> Any:
            args, kwargs = jax.tree.map(lambda x: jnp.asarray(x) if isinstance(x, np.ndarray) else x, (args, kwargs))
            return PinnedPlates(self._model)(*args, **kwargs)

        return whole

    @property
    def sample_field(self) -> str:
        """Where the state holds the position."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """Collected in any case."""
        return (self.sample_field, "diverging")

    @property
    def _sample_fn(self) -> Any:
        """`MCMC` takes ``None`` for a kernel that was never initialised."""
        return self._bound

    def init(
        self, rng_key: Key, num_warmup: int, init_params: Position | None, model_args: tuple, model_kwargs: dict
    ) -> KernelState:
        """Start one chain, or several where ``rng_key`` holds several keys; ``init_params`` are unconstrained."""
        del num_warmup  # nothing adapts
        sampler, posterior = self._sampler(model_args, model_kwargs)

        def start(rng_key: Key, position: Position | None) -> KernelState:
            key_start, key_init, key_run = jax.random.split(_typed(rng_key), 3)
            if position is None:
                position = posterior.start(key_start)
            chain = sampler.init(key_init, position)
            blank = jax.eval_shape(lambda: _scalars(*sampler.step(key_init, chain)))
            info = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), blank)
            return KernelState(chain, info, _as_given(key_run, rng_key))

        if is_prng_key(rng_key):
            return start(rng_key, init_params)
        return jax.vmap(start, in_axes=(0, None if init_params is None else 0))(rng_key, init_params)

    def sample(self, state: KernelState, model_args: tuple, model_kwargs: dict) -> KernelState:
        """Make one step, of one chain or of several side by side."""
        sampler, _ = self._sampler(model_args, model_kwargs)

        def step(state: KernelState) -> KernelState:
            key_next, key_step = jax.random.split(_typed(state.rng_key))
            chain, info = sampler.step(key_step, state.chain)
            return KernelState(chain, _scalars(chain, info), _as_given(key_next, state.rng_key))

        return step(state) if is_prng_key(state.rng_key) else jax.vmap(step)(state)

    def postprocess_fn(self, model_args: tuple, model_kwargs: dict) -> Callable[[Position], dict[str, Array]]:
        """Give the function from positions to values on the scale of the model."""
        return self._sampler(model_args, model_kwargs)[1].constrain

    def get_diagnostics_str(self, state: KernelState) -> str:
        """Say what the progress bar shows."""
        info = state.info
        shown = [f"{name} {float(info[name]):.2e}" for name in ("step_size", "grad_norm") if name in info]
        return ", ".join([*shown, "diverged" if bool(info["diverging"]) else "finite"])

    def _sampler(self, model_args: tuple, model_kwargs: dict) -> tuple[AbstractKernel, Posterior]:
        """Build the sampler for the arguments of the model, or take the one built last if they are the same objects."""
        leaves = jax.tree.leaves((model_args, model_kwargs))
        if self._bound is None or not _identical(self._bound[0], leaves):
            if not all(check.is_concrete(x) for x in leaves):
                raise ValueError(
                    "The data must be known when the sampler is built: use MCMC(…, jit_model_args=False), the default."
                )
            with jax.ensure_compile_time_eval():  # MCMC may be inside pmap or vmap
                posterior = self._posterior(model_args, model_kwargs)
                sampler = check.instance(
                    "build(posterior)",
                    self._build(posterior),
                    AbstractKernel,
                    "such as SGLD(Minibatch(posterior, 64), 1e-4)",
                )
            self._bound = (leaves, sampler, posterior)
        return self._bound[1], self._bound[2]

    def _posterior(self, model_args: tuple, model_kwargs: dict) -> Posterior:
        named = _by_name(self._model, model_args, model_kwargs)
        options = {"plate": self._plate, "deterministic": self._deterministic}
        if self._data is None:
            return from_numpyro(self._model, **options, **named)
        missing = [name for name in self._data if name not in named]
        if missing:
            raise ValueError(
                f"data names {missing}, but the model was given {sorted(named)}; name arguments of the model and pass them to "
                "MCMC.run."
            )
        data = {name: named.pop(name) for name in self._data}
        return from_numpyro(self._model, data, **options, **named)


def _by_name(model: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Give all arguments of a call their names."""
    signature = inspect.signature(model)
    try:
        named = dict(signature.bind(*args, **kwargs).arguments)
    except TypeError as error:
        raise TypeError(f"MCMC.run was called with arguments that do not fit the model{signature}: {error}.") from error
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name, {}))
        elif parameter.kind is inspect.Parameter.VAR_POSITIONAL and name in named:
            raise TypeError(
                f"The model{signature} takes arguments without a name; wrap it in a function that names them."
            )
    return named


def _scalars(chain: Any, info: PyTree) -> dict[str, Array]:
    """Entries of an info that are one number, and whether the position is still finite."""
    scalars = {name: x for name, x in tree.named_leaves(info).items() if x.ndim == 0}
    return {"diverging": ~tree.all_finite(chain.position), **scalars}


def _identical(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


def _typed(key: Key | Array) -> Key:
    return key if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else jax.random.wrap_key_data(key)


def _as_given(key: Key, given: Key | Array) -> Key | Array:
    """Give a key the form, typed or raw, in which NumPyro was handed its own: states must not change type."""
    return key if jnp.issubdtype(given.dtype, jax.dtypes.prng_key) else jax.random.key_data(key)
