"""Which site estimator when: bias, and variance at equal cost, of every estimator that fits, on five small programs.

Each program is small enough for its exact gradient (enumeration, or a mean over very many particles). Points are frozen, the same
for all: the start, half way to the end of an ascent along the exact gradient, and 95% of that way. Cost is runs of the program;
variance times cost is given over that of leave-one-out with two particles. `--show` prints the programs.

    python benchmarks/site_estimators.py [--repeats 4000] [--output benchmarks/results]
"""

import argparse
import inspect
import json
import pathlib

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
from step_time import environment

import ergodica as erg
from ergodica import estimators as e

# --- the programs -----------------------------------------------------------------------------------------------------


def one_bit_model():
    """A bit whose two values cost nearly the same: the textbook's hard case."""
    b = numpyro.sample("z", dist.Bernoulli(0.5))
    numpyro.factor("reward", 5.0 * (b - 0.49) ** 2)


def one_bit_guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(-0.85))))


BITS = 8
LOADINGS = jax.random.normal(jax.random.key(0), (BITS, 12))


def bits_model():
    """Bits that share one nonlinear likelihood, as in a layer of a belief network."""
    b = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(BITS)).to_event(1))
    numpyro.sample(
        "x", dist.Normal(jnp.tanh(b.astype(float) @ LOADINGS), 0.7).to_event(1), obs=jnp.linspace(-1.0, 1.0, 12)
    )


def bits_guide():
    numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logits", jnp.zeros(BITS))).to_event(1))


MEANS = jnp.array([-2.0, 0.0, 2.5])
DATA = jnp.array([-2.2, -1.0, -0.4, 0.3, 1.1, 1.4, 2.0, 2.8])


def labels_model():
    """Labels of a mixture in a plate: each has a cost of its own."""
    with numpyro.plate("data", len(DATA)):
        label = numpyro.sample("z", dist.Multinomial(1, probs=jnp.ones(3) / 3))
        numpyro.sample("x", dist.Normal(label.astype(float) @ MEANS, 0.8), obs=DATA)


def labels_guide():
    with numpyro.plate("data", len(DATA)):
        logits = numpyro.param("logits", jnp.zeros((len(DATA), 3)))
        numpyro.sample("z", dist.Multinomial(1, logits=logits))


def mixed_model():
    """A bit, and a normal whose noise enters the bit's cost."""
    b = numpyro.sample("z", dist.Bernoulli(0.3))
    w = numpyro.sample("w", dist.Normal(0.0, 1.0))
    numpyro.sample("x", dist.Normal(w + 1.5 * b, 1.0).expand([5]).to_event(1), obs=jnp.array([2.1, 1.4, 2.6, 0.9, 1.8]))


def mixed_guide():
    b = numpyro.sample("z", dist.Bernoulli(logits=numpyro.param("logit", jnp.array(-2.0))))
    loc, log_scale = numpyro.param("loc", jnp.zeros(2)), numpyro.param("log_scale", jnp.zeros(2))
    numpyro.sample(
        "w", dist.Normal(loc[0] + (loc[1] - loc[0]) * b, jnp.exp(log_scale[0] + (log_scale[1] - log_scale[0]) * b))
    )


def normal_model():
    """Normals with a cost that is not quadratic."""
    w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
    numpyro.sample("x", dist.Poisson(jnp.exp(w.sum() * jnp.ones(3))).to_event(1), obs=jnp.array([2.0, 4.0, 3.0]))


def normal_guide():
    loc, log_scale = numpyro.param("loc", jnp.zeros(2)), numpyro.param("log_scale", -0.5 * jnp.ones(2))
    numpyro.sample("w", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))


# ----------------------------------------------------------------------------------------------------------------------

PROGRAMS = {
    "one bit": (one_bit_model, one_bit_guide),
    "8 bits, one likelihood": (bits_model, bits_guide),
    "labels in a plate": (labels_model, labels_guide),
    "bit and normal": (mixed_model, mixed_guide),
    "two normals": (normal_model, normal_guide),
}
AT_DISCRETE = {
    "LeaveOneOut, 2 particles": (e.LeaveOneOut(), 2),
    "LeaveOneOut, 8 particles": (e.LeaveOneOut(), 8),
    "Score": (e.Score(), 1),
    "Enumerate": (e.Enumerate(), 1),
    "MeasureValued": (e.MeasureValued(), 1),
    "DisARM": (e.DisARM(), 1),
    "UnorderedSet(2)": (e.UnorderedSet(2), 1),
    "DoubleControlVariate, 2 particles": (e.DoubleControlVariate(), 2),
    "RODEO, 2 particles": (e.RODEO(), 2),
    "REBAR(0.5)": (e.REBAR(0.5), 1),
    "MuProp": (e.MuProp(), 1),
    "DARN": (e.DARN(), 1),
    "ReinMax": (e.ReinMax(), 1),
    "GumbelSoftmax(1.0)": (e.GumbelSoftmax(1.0), 1),
    "GumbelSoftmax(0.5)": (e.GumbelSoftmax(0.5), 1),
    "GumbelSoftmax(0.5), straight through": (e.GumbelSoftmax(0.5, straight_through=True), 1),
    "RaoBlackwellGumbel(0.5)": (e.RaoBlackwellGumbel(0.5), 1),
    "StraightThrough": (e.StraightThrough(), 1),
}
AT_NORMAL = {
    "LeaveOneOut, 2 particles": (e.LeaveOneOut(), 2),
    "LeaveOneOut, 8 particles": (e.LeaveOneOut(), 8),
    "Score": (e.Score(), 1),
    "MeasureValued": (e.MeasureValued(), 1),
    "Reparam": (e.Reparam(), 1),
    "Reparam(stl=True)": (e.Reparam(stl=True), 1),
}


def gradients_of(name):
    """Estimators by name where they fit, and the reason where they do not."""
    model, guide = PROGRAMS[name]
    found, refused = {}, {}
    for label, (estimator, particles) in (AT_NORMAL if name == "two normals" else AT_DISCRETE).items():
        sites = {"*": estimator} if name == "two normals" else {"z": estimator, "*": e.Reparam()}
        loss = e.ELBO(particles, sites)
        try:
            loss.plan(model, guide)
        except e.SiteError as error:
            refused[label] = str(error)
        else:
            found[label] = e.VariationalGradient(loss, model, guide)
    return found, refused


def frozen_points(name):
    """The start, and where 800 steps of Adam along a nearly exact gradient end."""
    model, guide = PROGRAMS[name]
    site = {"*": e.Reparam()} if name == "two normals" else {"z": e.Enumerate(), "*": e.Reparam()}
    gradient = e.VariationalGradient(
        e.ELBO(200 if name in ("bit and normal", "two normals") else 1, site), model, guide
    )
    start = gradient.start(jax.random.key(0))
    optimiser = optax.adam(0.03)

    @jax.jit
    def ascend(params):
        def body(carry, key):
            params, state = carry
            descent = jax.tree.map(jnp.negative, gradient.estimate(key, params, {})[0].gradient)
            updates, state = optimiser.update(descent, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, optimiser.init(params)), jax.random.split(jax.random.key(1), 800))[0][0]

    end = ascend(start)
    between = {"half way": 0.5, "near the end": 0.95}
    return {"start": start} | {
        label: jax.tree.map(lambda a, b, share=share: (1 - share) * a + share * b, start, end)
        for label, share in between.items()
    }


def study(name, num_repeats):
    found, refused = gradients_of(name)
    points = frozen_points(name)
    exact = "Reparam" if name == "two normals" else "Enumerate"
    model, guide = PROGRAMS[name]
    sites = {"*": e.Reparam()} if name == "two normals" else {"z": e.Enumerate(), "*": e.Reparam()}
    reference = e.VariationalGradient(
        e.ELBO(256 if exact == "Reparam" or name == "bit and normal" else 1, sites), model, guide
    )
    table = erg.compare_gradients(
        jax.random.key(2),
        {"reference": reference} | found,
        list(points.values()),
        reference="reference",
        num_repeats=num_repeats,
        num_timings=0,
    )
    rows = []
    for j, point in enumerate(points):
        base = table.isel(point=j).sel(estimator="LeaveOneOut, 2 particles")
        for label in found:
            at = table.isel(point=j).sel(estimator=label)
            size = float(jnp.linalg.norm(jnp.asarray(at.reference.values)))
            rows.append(
                {
                    "program": name,
                    "point": point,
                    "estimator": label,
                    "unbiased": (AT_NORMAL if name == "two normals" else AT_DISCRETE)[label][0].unbiased,
                    "runs": float(at.datum_gradients),
                    "relative_bias": float((at.bias**2).sum() ** 0.5) / size,
                    "relative_bias_error": float((at.standard_error**2).sum() ** 0.5) / size,
                    "variance": float(at.variance),
                    "work": float(at.variance * at.datum_gradients / (base.variance * base.datum_gradients)),
                    "noise_over_signal": float(at.variance) ** 0.5 / size,
                }
            )
            print({k: v if isinstance(v, str) else f"{v:.3g}" for k, v in rows[-1].items()}, flush=True)
    return rows, refused


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    parser.add_argument("--only", choices=list(PROGRAMS), nargs="*", default=list(PROGRAMS))
    parser.add_argument("--show", action="store_true", help="print the programs and stop")
    arguments = parser.parse_args()
    if arguments.show:
        print("\n".join(inspect.getsource(f) for pair in PROGRAMS.values() for f in pair))
        return
    jax.config.update("jax_enable_x64", True)
    rows, refused = [], {}
    for name in arguments.only:
        done, refused[name] = study(name, arguments.repeats)
        rows += done
    record = {"environment": environment(), "repeats": arguments.repeats, "rows": rows, "refused": refused}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "site_estimators.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
