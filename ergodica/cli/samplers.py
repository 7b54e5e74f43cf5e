"""Samplers and gradient estimators by their names."""

import jax

from ergodica import samplers
from ergodica.cli.errors import CallError, did_you_mean, listed
from ergodica.core.gradient import AbstractGradientEstimator
from ergodica.core.kernel import AbstractKernel
from ergodica.core.posterior import Posterior
from ergodica.core.types import Key
from ergodica.estimators import ControlVariate, Minibatch
from ergodica.samplers.splitting import LETTERS

PRESETS = ("SGLD", "BAOAB", "BAOA", "OBABO", "ABOBA", "UBU", "SGHMC", "LieTrotter")
NUTS = "NUTS"
SCHEMES = ("blocks", "uniform", "full")
KINDS = ("minibatch", "control-variate", "full")


def sampler_name(name: str) -> str:
    """Give a sampler's name as the library spells it; a string of letters is a splitting scheme."""
    by_lower = {preset.lower(): preset for preset in (*PRESETS, NUTS)}
    if name.lower() in by_lower:
        return by_lower[name.lower()]
    if set(name.upper()) <= LETTERS:
        return name.upper()
    raise CallError(
        f"There is no sampler {name!r}.{did_you_mean(name, (*PRESETS, NUTS))} "
        f"There are {listed((*PRESETS, NUTS))}, and any splitting in the letters A, B, O, U, such as OABAO."
    )


def make_gradient(
    key: Key, posterior: Posterior, batch_size: int, scheme: str, *, control_variate: bool
) -> AbstractGradientEstimator:
    """Make the gradient that a sampler is driven by."""
    if scheme not in SCHEMES:
        raise CallError(f"There is no scheme {scheme!r}.{did_you_mean(scheme, SCHEMES)} There are {listed(SCHEMES)}.")
    if posterior.num_data == 0:
        scheme = "full"
    gradient = Minibatch(posterior, scheme="full") if scheme == "full" else Minibatch(posterior, batch_size, scheme)
    return ControlVariate(gradient, mode_of(key, posterior)) if control_variate else gradient


def mode_of(key: Key, posterior: Posterior) -> dict:
    """Find the mode that centres a control variate."""
    from ergodica.run.mode import find_mode

    return find_mode(key, posterior).position


def make_sampler(
    name: str,
    gradient: AbstractGradientEstimator,
    step_size: float | None,
    friction: float | None,
    temperature: float,
) -> AbstractKernel:
    """Make a stochastic-gradient sampler."""
    if step_size is None:
        raise CallError(
            f"{name} needs --step-size, a time. With N data and standardised features, begin at about 0.1/N for SGLD, or at 0.1/√N "
            "with --friction √N for the others; then compare runs by: ergodica diagnose."
        )
    if name == "SGLD":
        if friction is not None:
            raise CallError("SGLD has no momentum, so --friction has no meaning; leave it out, or use --sampler BAOAB.")
        return samplers.SGLD(gradient, step_size, temperature=temperature)
    friction = 1.0 if friction is None else friction
    if name in PRESETS:
        return getattr(samplers, name)(gradient, step_size, friction, temperature=temperature)
    return samplers.Splitting(name, gradient, step_size, friction, temperature=temperature)


def make_nuts(key: Key, posterior: Posterior, num_warmup: int) -> tuple[AbstractKernel, dict]:
    """Adapt NUTS by BlackJAX's windows; give the kernel, and the position at which adaptation ended."""
    import blackjax

    from ergodica.integrations.blackjax import from_blackjax

    key_start, key_adapt = jax.random.split(key)
    adaptation = blackjax.window_adaptation(blackjax.nuts, posterior.log_density)
    (state, settings), _ = adaptation.run(key_adapt, posterior.start(key_start), num_steps=num_warmup)  # pyright: ignore[reportCallIssue]
    algorithm = blackjax.nuts(posterior.log_density, **settings)
    return from_blackjax(algorithm, posterior=posterior, exact=True), state.position


def parse_estimator(text: str) -> tuple[str, int | None, str]:
    """Read ``KIND[:BATCH_SIZE[:SCHEME]]``."""
    kind, *rest = text.split(":")
    if kind not in KINDS:
        raise CallError(
            f"--estimator {text!r}: there is no estimator {kind!r}.{did_you_mean(kind, KINDS)} There are {listed(KINDS)}; "
            "write KIND:BATCH_SIZE:SCHEME, such as minibatch:100:uniform."
        )
    if kind == "full":
        if rest:
            raise CallError(f"--estimator {text!r}: 'full' uses all the data and takes no batch size.")
        return "full", None, "full"
    if not rest or not rest[0].isdigit() or len(rest) > 2:
        raise CallError(f"--estimator {text!r}: write {kind}:BATCH_SIZE, such as {kind}:100, or {kind}:100:uniform.")
    scheme = rest[1] if len(rest) == 2 else "blocks"
    if scheme not in ("blocks", "uniform"):
        raise CallError(f"--estimator {text!r}: the scheme is blocks or uniform; got {scheme!r}.")
    return kind, int(rest[0]), scheme
