"""How much variance Stein controls take off a gradient, at equal runs of the program, and what a call then costs in time.

The bound of a logistic regression on real data by a Gaussian guide with a diagonal covariance: at the start of a fit, and after it.
`erg.compare_gradients` measures; each call runs the program 64 times (the linearised gradient: 32 draws, differentiated twice).

    python benchmarks/stein_gradients.py [--repeats 1000] [--output benchmarks/results]
"""

import argparse
import json
import pathlib

import jax
import jax.numpy as jnp
import optax
from numpyro.infer.autoguide import AutoDiagonalNormal
from step_time import environment

import ergodica as erg
from ergodica.estimators import ELBO, Reparam, SteinControl, VariationalGradient
from ergodica.models.zoo.doctor_visits import doctor_visits, logistic_regression

DRAWS, EVERY = 64, 40
COLUMNS = ["verdict", "variance", "variance_lower", "variance_upper", "datum_gradients", "time_ratio"]


def bounds():
    """Make the gradient of the bound, for a number of particles."""
    data = doctor_visits()
    x, y = jnp.asarray(data.x[::EVERY]), jnp.asarray(data.y[::EVERY])
    guide = AutoDiagonalNormal(logistic_regression, init_scale=0.5)

    def bound(num_particles, *, stl=False):
        sites = {"*": Reparam(stl=stl)}
        return VariationalGradient(ELBO(num_particles, sites), logistic_regression, guide, x, y)

    return bound


def fitted(gradient, start):
    """Ascend for 400 steps of Adam."""
    optimiser = optax.adam(0.03)

    def body(carry, key):
        params, state = carry
        ascent = gradient.estimate(key, params, {})[0].gradient
        updates, state = optimiser.update(jax.tree.map(jnp.negative, ascent), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), 400)
    return jax.jit(lambda p: jax.lax.scan(body, (p, optimiser.init(p)), keys)[0][0])(start)


def entrants(bound):
    """What is compared, the plain estimate first."""
    plain = bound(DRAWS)
    return {
        "plain": plain,
        "sticking the landing": bound(DRAWS, stl=True),
        "linear": SteinControl(plain, "linear"),
        "linear, split halves": SteinControl(plain, "linear", "split"),
        "linear, own coordinate": SteinControl(plain, "linear", per="coordinate"),
        "quadratic, own coordinate": SteinControl(plain, "quadratic", per="coordinate"),
        "quadratic, ridge 0.3": SteinControl(plain, "quadratic", ridge=0.3),
        "linearised": SteinControl(bound(DRAWS // 2), "linearised"),
        "linear, sticking the landing": SteinControl(bound(DRAWS, stl=True), "linear"),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    bound = bounds()
    start = bound(DRAWS).start(jax.random.key(0))
    points = {"start": start, "fitted": fitted(bound(DRAWS), start)}
    table = erg.compare_gradients(
        jax.random.key(2), entrants(bound), list(points.values()), num_repeats=arguments.repeats, num_timings=9
    ).assign_coords(point=list(points))
    columns = [*COLUMNS, "time_ratio_lower", "time_ratio_upper"]
    rows = table[columns].to_dataframe().reset_index()[["point", "estimator", *columns]].to_dict("records")
    record = {"environment": environment(), "repeats": arguments.repeats, "draws": DRAWS, "rows": rows}
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "stein_gradients.json").write_text(json.dumps(record, indent=1) + "\n")
    print(table.summary[COLUMNS])


if __name__ == "__main__":
    main()
