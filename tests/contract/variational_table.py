"""Every estimator for sample sites and every variational objective, one row each.

They estimate gradients with respect to a guide's parameters rather than a posterior's, so they go through checks of their own
(`test_variational.py`), on one program: a bit ``z``, a normal ``w`` whose law depends on it, and a datum.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist

import ergodica as erg
from tests.contract.table import Counter
from tests.support.exact_programs import Case

NUM_PARTICLES = 4


def program(counter: Counter | None = None) -> Case:
    def model(x):
        if counter is not None:
            counter.traces += 1
        z = numpyro.sample("z", dist.Bernoulli(0.3))
        w = numpyro.sample("w", dist.Normal(1.0 * z, 1.0))
        numpyro.sample("x", dist.Normal(w + 0.5 * z, 0.9), obs=x)

    def guide(x):
        dtype = jnp.result_type(float)
        z = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.zeros((), dtype))))
        loc = numpyro.param("loc", jnp.zeros((), dtype)) + 0.3 * z + 0.1 * (x - 1.4)
        numpyro.sample("w", dist.Normal(loc, jnp.exp(numpyro.param("log_scale", jnp.zeros((), dtype)))))

    params = {"logit": jnp.array(0.3), "loc": jnp.array(0.2), "log_scale": jnp.array(-0.4)}
    return Case("contract", model, guide, (jnp.array(1.4),), params)


def free_form(psi, z, x):
    """A control variate of the relaxed noise."""
    return psi["height"] * jnp.tanh(z)


def bent(psi, cost, difference):
    """A function of the expansions about other particles' draws."""
    return cost + psi["height"] * jnp.tanh(difference)


@dataclasses.dataclass(frozen=True)
class SiteRow:
    name: str
    """The public name in `ergodica.estimators`."""
    make: Callable[[], Any]
    label: str
    site: str
    """The site of the program that it is used at; the other one is chosen by rule."""
    objective: Callable[..., Any] = erg.estimators.ELBO
    unbiased: bool = True
    shows_bias: bool = True
    """Whether the program shows the bias of a biased one (its cost is quadratic in the bit)."""
    right_value: bool = True
    """Whether the objective's value is unbiased too; at relaxed values it is not."""
    remembers: bool = False
    """Whether it has state; used without SVI's declaration, it must say so."""
    learns: bool = False
    """Whether it has parameters of its own, which the wrapped guide declares."""
    refused: tuple[str, Callable[..., Any], int, str] | None = None
    """A site, objective and number of particles where it must be refused, and the words that say why."""
    slow: bool = False
    """Whether another setting of the same class, or tests over all outcomes, are enough for every change."""


@dataclasses.dataclass(frozen=True)
class ObjectiveRow:
    name: str
    make: Callable[..., Any]
    label: str
    bad_input: tuple[Callable[[], Any], type[Exception], str]


_elbo, _iwelbo = erg.estimators.ELBO, erg.estimators.IWELBO

SITES = [
    SiteRow("Score", erg.estimators.Score, "Score", "z"),
    SiteRow("Score", lambda: erg.estimators.Score(-1.5), "Score-constant", "z"),
    SiteRow("Score", lambda: erg.estimators.Score(-1.5), "Score-continuous", "w"),
    SiteRow(
        "Score",
        lambda: erg.estimators.Score(erg.estimators.MovingAverage(0.8)),
        "Score-moving-average",
        "z",
        remembers=True,
    ),
    SiteRow("Score", erg.estimators.Score, "Score-IWELBO", "z", _iwelbo),
    SiteRow(
        "LeaveOneOut",
        erg.estimators.LeaveOneOut,
        "LeaveOneOut",
        "z",
        refused=("z", _elbo, 1, "with num_particles=1 there are no other particles"),
    ),
    SiteRow("LeaveOneOut", erg.estimators.LeaveOneOut, "LeaveOneOut-IWELBO", "z", _iwelbo),
    SiteRow("VIMCO", erg.estimators.VIMCO, "VIMCO", "z", _iwelbo, refused=("z", _elbo, 4, "has no weights")),
    SiteRow(
        "Reparam",
        erg.estimators.Reparam,
        "Reparam",
        "w",
        refused=("z", _elbo, 4, "derivatives through the value are wrong"),
    ),
    SiteRow("MeasureValued", erg.estimators.MeasureValued, "MeasureValued", "z"),
    SiteRow(
        "REBAR",
        erg.estimators.REBAR,
        "REBAR",
        "z",
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "MuProp",
        erg.estimators.MuProp,
        "MuProp",
        "z",
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow("REBAR", lambda: erg.estimators.REBAR(tuned=True), "REBAR-tuned", "z", learns=True, slow=True),
    SiteRow(
        "RELAX",
        lambda: erg.estimators.RELAX(free_form, {"height": jnp.full((), 0.3, jnp.result_type(float))}),
        "RELAX",
        "z",
        learns=True,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "DARN",
        erg.estimators.DARN,
        "DARN",
        "z",
        unbiased=False,
        shows_bias=False,
        slow=True,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "DoubleControlVariate",
        erg.estimators.DoubleControlVariate,
        "DoubleControlVariate",
        "z",
        refused=("z", _iwelbo, 4, "IWELBO is no mean over particles"),
    ),
    SiteRow(
        "DoubleControlVariate",
        lambda: erg.estimators.DoubleControlVariate(tuned=True),
        "DoubleControlVariate-tuned",
        "z",
        learns=True,
        slow=True,
    ),
    SiteRow(
        "RODEO",
        erg.estimators.RODEO,
        "RODEO",
        "z",
        refused=("z", _elbo, 1, "there are no other particles"),
        slow=True,
    ),
    SiteRow(
        "RODEO",
        lambda: erg.estimators.RODEO(bent, {"height": jnp.full((), 0.3, jnp.result_type(float))}),
        "RODEO-function",
        "z",
        learns=True,
        slow=True,
    ),
    SiteRow(
        "DisARM",
        erg.estimators.DisARM,
        "DisARM",
        "z",
        refused=("w", _elbo, 4, "it is not Bernoulli"),
    ),
    SiteRow("DisARM", lambda: erg.estimators.DisARM(coupled=True), "DisARM-coupled", "z", slow=True),
    SiteRow(
        "GumbelSoftmax",
        lambda: erg.estimators.GumbelSoftmax(0.5),
        "GumbelSoftmax",
        "z",
        unbiased=False,
        right_value=False,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "StraightThrough",
        lambda: erg.estimators.StraightThrough(2.0),
        "StraightThrough",
        "z",
        unbiased=False,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "ReinMax",
        erg.estimators.ReinMax,
        "ReinMax",
        "z",
        unbiased=False,
        shows_bias=False,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow(
        "RaoBlackwellGumbel",
        lambda: erg.estimators.RaoBlackwellGumbel(1.0, 8),
        "RaoBlackwellGumbel",
        "z",
        unbiased=False,
        refused=("w", _elbo, 4, "neither Bernoulli nor a one-hot vector"),
    ),
    SiteRow("Reparam", lambda: erg.estimators.Reparam(stl=True), "Reparam-stl", "w"),
    SiteRow(
        "UnorderedSet",
        lambda: erg.estimators.UnorderedSet(2),
        "UnorderedSet",
        "z",
        refused=("w", _elbo, 4, "its support cannot be listed"),
    ),
    SiteRow("Reparam", lambda: erg.estimators.Reparam(stl=True), "Reparam-dreg", "w", _iwelbo),
    SiteRow(
        "Enumerate",
        erg.estimators.Enumerate,
        "Enumerate",
        "z",
        refused=("w", _elbo, 4, "its support cannot be listed"),
    ),
]


def hierarchical(model: Any, guide: Any) -> Any:
    """An objective as a user writes it, with several draws of each site."""
    resampled = erg.estimators.normalise(model, 2, proposal=guide)
    values, log_q = resampled.sample()
    return model.log_density(values) - log_q


OBJECTIVES = [
    ObjectiveRow("ELBO", _elbo, "ELBO", (lambda: _elbo(0), ValueError, "num_particles must be at least 1; got 0")),
    ObjectiveRow(
        "IWELBO",
        _iwelbo,
        "IWELBO",
        (lambda: _iwelbo(4, {"z": "enum"}), TypeError, r"sites\['z'\] must be an estimator"),
    ),
    ObjectiveRow(
        "ProgrammedObjective",
        lambda n: erg.estimators.ProgrammedObjective(hierarchical, n),
        "ProgrammedObjective",
        (
            lambda: erg.estimators.ProgrammedObjective("elbo"),
            TypeError,
            "objective must be a function; got 'elbo'",
        ),
    ),
    ObjectiveRow(
        "RenyiBound",
        lambda n: erg.estimators.RenyiBound(0.5, n),
        "RenyiBound",
        (lambda: erg.estimators.RenyiBound(1.0), ValueError, "alpha must not be 1, where the bound is the ELBO"),
    ),
    ObjectiveRow(
        "ForwardKL",
        erg.estimators.ForwardKL,
        "ForwardKL",
        (lambda: erg.estimators.ForwardKL(1), ValueError, "num_particles must be at least 2; got 1"),
    ),
    ObjectiveRow(
        "WakeSleep",
        lambda n: erg.estimators.WakeSleep(n, {"x": "x"}, phase="both"),
        "WakeSleep",
        (
            lambda: erg.estimators.WakeSleep(4, ["x"]),
            TypeError,
            "observed must map names of sites to names of arguments",
        ),
    ),
]


def loss_of(row: SiteRow, num_particles: int = NUM_PARTICLES) -> Any:
    return row.objective(num_particles, {row.site: row.make()})


def case_of(row: SiteRow, counter: Counter | None = None) -> Case:
    """The program; with what the row's estimator learns declared in the guide and among the parameters."""
    case = program(counter)
    if not row.learns:
        return case
    guide = loss_of(row).guide(case.model, case.guide)
    start = gradient_of(row, dataclasses.replace(case, guide=guide)).start(jax.random.key(0))
    return dataclasses.replace(case, guide=guide, params={**start, **case.params})


def gradient_of(row: SiteRow, case: Case) -> Any:
    return erg.estimators.VariationalGradient(loss_of(row), case.model, case.guide, *case.args)
