"""Targets whose answers are known: densities by brute force, normalisers by integration, draws against the references."""

import functools
import itertools
import json
import math
import os
import pathlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import ergodica as erg
from ergodica.models import zoo
from ergodica.models.zoo.lattice_field import hopping_to_mass, mass_to_hopping
from ergodica.models.zoo.phi4_reference import free_log_normaliser, free_reference, strip_quadrature, strip_reference
from ergodica.models.zoo.target import ReferenceValue
from tests.conftest import ROOT
from tests.support.statistics import REJECTION, THRESHOLD

MEANS, COVARIANCES, WEIGHTS = (
    np.array([[-2.0, 0.0], [1.0, 1.0]]),
    np.array([[[1.0, 0.4], [0.4, 0.7]], [[0.3, 0.0], [0.0, 0.5]]]),
    np.array([0.5, 1.5]),
)
TARGETS = {
    "cube": lambda: zoo.gaussian_mixture_cube(3),
    "mixture": lambda: zoo.gaussian_mixture(MEANS, COVARIANCES, WEIGHTS),
    "many_well": lambda: zoo.many_well(6),
    "phi4 free": lambda: zoo.phi4((4, 3), mass2=0.5, coupling=0.0),
    "phi4 strip": lambda: zoo.phi4((5, 2), kappa=0.3, coupling=0.1),
    "phi4": lambda: zoo.phi4(6, kappa=0.3, coupling=0.022),
    "eight_schools": zoo.eight_schools,
    "visit_regression": lambda: zoo.visit_regression(every=100),
}
WITH_DRAWS = ("cube", "mixture", "many_well", "phi4 free")


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]()


# --- the common shape -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("x64")
def test_a_target_is_what_samplers_and_flows_expect(target):
    point = jax.random.normal(jax.random.key(0), (target.dim,))
    log_density, score, observables = jax.jit(
        lambda x: (target.log_density(x), target.score(x), target.observables(x))
    )(point)
    assert log_density.shape == ()
    np.testing.assert_allclose(score, jax.grad(target.log_density)(point), rtol=1e-9, atol=1e-9)
    assert all(value.shape == () for value in observables.values())
    assert target.reference.keys() <= observables.keys()
    assert target.reference
    assert all(isinstance(v, ReferenceValue) for v in (*target.reference.values(), target.log_normaliser))
    assert target.start(jax.random.key(1)).shape == (target.dim,)
    assert target.source
    assert target.licence
    posterior = target.posterior()
    np.testing.assert_allclose(posterior.log_density(point), log_density, rtol=1e-12)
    assert posterior.constrain(point)


def test_a_target_is_an_argument_of_compiled_functions(target):
    """Its arrays are leaves, so that no function of theirs may be NumPy's."""
    point = jax.random.normal(jax.random.key(0), (target.dim,))
    compiled = eqx.filter_jit(lambda t, x: (t.log_density(x), t.observables(x)))
    np.testing.assert_allclose(compiled(target, point)[0], target.log_density(point), rtol=1e-4)


def test_a_target_keeps_single_precision(target):
    point = jnp.ones(target.dim, jnp.float32)
    assert target.log_density(point).dtype == jnp.float32
    assert {v.dtype for v in target.observables(point).values()} == {jnp.dtype("float32")}


def test_a_target_is_sampled_in_one_line():
    target = zoo.many_well(4)
    sampler = erg.samplers.SGLD(erg.estimators.Minibatch(target.posterior(), scheme="full"), 0.01)
    dt = erg.sample(jax.random.key(0), sampler, num_samples=20, num_warmup=5, num_chains=2, progress=False)
    assert dt["posterior"]["position"].shape == (2, 20, 4)
    np.testing.assert_allclose(
        dt["posterior"]["x_square"], (dt["posterior"]["position"].values[..., ::2] ** 2).mean(-1), rtol=1e-5
    )


# --- densities by brute force -----------------------------------------------------------------------------------------


def by_corners(x, target):
    corners = itertools.product((-target.location, target.location), repeat=target.dim)
    return np.log(sum(stats.multivariate_normal.pdf(x, c, target.variance * np.eye(target.dim)) for c in corners))


def by_components(x, target):
    return np.log(
        sum(w * stats.multivariate_normal.pdf(x, m, c) for w, m, c in zip(WEIGHTS, MEANS, COVARIANCES, strict=True))
    )


def by_wells(x, target):
    return sum(0.5 * a + 6 * a**2 - a**4 - 0.5 * b**2 for a, b in zip(x[::2], x[1::2], strict=True))


def by_sites(x, target):
    rows, columns = target.shape
    field, action = x.reshape(target.shape), 0.0
    for i, j in itertools.product(range(rows), range(columns)):
        neighbours = field[(i + 1) % rows, j] + field[i, (j + 1) % columns]
        action += -2 * target.hopping * field[i, j] * neighbours
        action += target.quadratic * field[i, j] ** 2 + target.coupling * field[i, j] ** 4
    return -action


def by_hierarchy(x, target):
    y, sigma = [28, 8, -3, 7, -1, 1, 18, 12], [15, 10, 16, 11, 9, 11, 10, 18]
    prior = stats.norm.logpdf(x[0], 0, 5) + stats.halfcauchy.logpdf(np.exp(x[1]), scale=5) + x[1]
    return prior + stats.norm.logpdf(x[2:]).sum() + stats.norm.logpdf(y, x[0] + np.exp(x[1]) * x[2:], sigma).sum()


def by_program(x, target):
    from numpyro.infer.util import log_density

    sites = {"intercept": jnp.asarray(x[0]), "slope": jnp.asarray(x[1:])}
    data = jnp.asarray(target.x, float), jnp.asarray(target.y, float)
    return float(log_density(zoo.logistic_regression, data, {}, sites)[0])


BRUTE = {
    "cube": by_corners,
    "mixture": by_components,
    "many_well": by_wells,
    "phi4 free": by_sites,
    "phi4 strip": by_sites,
    "phi4": by_sites,
    "eight_schools": by_hierarchy,
    "visit_regression": by_program,
}


@pytest.mark.usefixtures("x64", "numpyro_promotion")
@pytest.mark.parametrize("name", TARGETS)
def test_density_by_brute_force(name):
    target = TARGETS[name]()
    for x in np.random.default_rng(0).normal(size=(3, target.dim)):
        assert float(target.log_density(jnp.asarray(x))) == pytest.approx(BRUTE[name](x, target), rel=1e-9)


# --- normalisers and moments by integration ---------------------------------------------------------------------------


def on_a_grid(target, reach, num):
    """Log normaliser and expectations of a target in two dimensions, by the trapezoidal rule."""
    axis = np.linspace(-reach, reach, num)
    points = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    logs, values = jax.jit(jax.vmap(lambda x: (target.log_density(x), target.observables(x))))(jnp.asarray(points))
    logs = np.asarray(logs)
    weights = np.exp(logs - logs.max())
    log_normaliser = logs.max() + math.log(weights.sum() * (axis[1] - axis[0]) ** 2)
    return log_normaliser, {k: float(np.asarray(v) @ weights / weights.sum()) for k, v in values.items()}


SMOOTH = {
    "cube": (lambda: zoo.gaussian_mixture_cube(2, 1.3, 0.4), 8.0, ("all_positive",)),
    "mixture": (TARGETS["mixture"], 9.0, ()),
    "many_well": (lambda: zoo.many_well(2), 9.0, ("right", "all_right")),
    "phi4 2x1": (lambda: zoo.phi4((2, 1), kappa=0.3, coupling=0.2), 7.0, ("abs_magnetisation",)),
    "phi4 1x2": (lambda: zoo.phi4((1, 2), mass2=-1.0, coupling=0.3), 7.0, ("abs_magnetisation",)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SMOOTH)
def test_references_by_integration_over_the_plane(name):
    make, reach, steps = SMOOTH[name]
    target = make()
    log_normaliser, means = on_a_grid(target, reach, 401)
    assert target.log_normaliser.value == pytest.approx(log_normaliser, abs=1e-10)
    assert target.log_normaliser.standard_error == 0
    for observable, (value, error) in target.reference.items():
        assert error == 0
        if observable not in steps:  # the rule is exact for smooth functions alone
            assert value == pytest.approx(means[observable], abs=1e-9), observable
        else:
            assert value == pytest.approx(means[observable], abs=0.05), observable


def test_many_well_has_the_published_normaliser():
    """11,784.50927 for one well, in the code that goes with Midgley et al. (2023)."""
    published = 16 * (math.log(11784.50927) + 0.5 * math.log(2 * math.pi))
    assert zoo.many_well(32).log_normaliser.value == pytest.approx(published, abs=1e-6)


def test_steep_and_single_wells_are_integrated_too():
    """Without a barrier, and with a quartic alone: Gamma functions."""
    narrow = zoo.many_well(2, tilt=0.0, quadratic=0.0, quartic=50.0)
    exact = math.log(2 * math.gamma(1.25) * 50**-0.25 * math.sqrt(2 * math.pi))
    assert narrow.log_normaliser.value == pytest.approx(exact, abs=1e-12)
    assert narrow.reference["x_square"].value == pytest.approx(
        math.gamma(0.75) / math.gamma(0.25) / math.sqrt(50), rel=1e-12
    )
    assert zoo.many_well(2, tilt=0.3, quadratic=-2.0).reference["right"].value > 0.5


@pytest.mark.usefixtures("x64")
def test_the_free_field_is_a_gaussian():
    target = zoo.phi4((4, 3), kappa=0.22, coupling=0.0)
    precision = -np.asarray(jax.hessian(target.log_density)(jnp.zeros(12)))
    exact = 6 * math.log(2 * math.pi) - 0.5 * np.linalg.slogdet(precision)[1]
    assert target.log_normaliser.value == pytest.approx(exact, abs=1e-10)
    covariance = np.linalg.inv(precision)
    slices = np.kron(np.eye(4), np.full(3, 1 / 3))
    rows = slices @ covariance @ slices.T
    assert target.reference["square"].value == pytest.approx(np.trace(covariance) / 12)
    assert target.reference["susceptibility"].value == pytest.approx(covariance.sum() / 12)
    assert target.reference["two_point[1]"].value == pytest.approx(np.mean(np.diagonal(np.roll(rows, 1, axis=0))))
    spread = math.sqrt(covariance.sum()) / 12
    assert target.reference["abs_magnetisation"].value == pytest.approx(math.sqrt(2 / math.pi) * spread)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (3, 2), (1, 2)])
def test_transfer_matrices_give_the_free_theory(shape):
    parameters = (shape, 0.5, 2.5)
    found = strip_reference(*parameters, 0.0)
    assert found["log_normaliser"].value == pytest.approx(free_log_normaliser(*parameters).value, abs=1e-10)
    for name, exact in free_reference(*parameters).items():
        if name in found:
            assert found[name].value == pytest.approx(exact.value, abs=1e-10), name


def test_transfer_matrices_in_both_directions_agree():
    """A strip turned by a right angle: another matrix, of another size, the same law."""
    for kappa, coupling in ((0.3, 0.022), (0.25, 0.5)):
        tall, wide = (zoo.phi4(s, kappa=kappa, coupling=coupling) for s in ((2, 1), (1, 2)))
        assert tall.log_normaliser.value == pytest.approx(wide.log_normaliser.value, abs=1e-11)
        for name in ("square", "action", "susceptibility"):
            assert tall.reference[name].value == pytest.approx(wide.reference[name].value, rel=1e-11)


def test_a_rule_of_too_few_nodes_says_so():
    """Far into the phase of two signs at weak coupling the rule for two sites has not converged."""
    far = strip_reference((4, 2), 0.35, 1 - 2 * 0.005, 0.005)
    better = strip_quadrature((4, 2), 0.35, 1 - 2 * 0.005, 0.005, 40)
    assert far["square"].standard_error > 0
    assert abs(far["square"].value - better["square"].value) < far["square"].standard_error


def test_the_virial_theorem_holds_for_strips():
    """<sum of phi dS/dphi> = V, from the action, phi^2 and phi^4 by differentiating the normaliser."""
    shape, hopping, quadratic, coupling = (4, 2), 0.3, 0.9, 0.05
    step = 1e-5
    plus, minus = (
        strip_quadrature(shape, hopping, quadratic, coupling + s, 28)["log_normaliser"].value for s in (step, -step)
    )
    quartic = -coupling * (plus - minus) / (2 * step)
    action = strip_reference(shape, hopping, quadratic, coupling)["action"].value * 8
    assert (2 * action + 2 * quartic) / 8 == pytest.approx(1.0, abs=1e-6)


def test_the_two_parameterisations_are_one_law():
    hopping, coupling = 0.27, 0.3
    mass2, other, scale = hopping_to_mass(hopping, coupling)
    np.testing.assert_allclose(mass_to_hopping(mass2, other), (hopping, coupling, 1 / scale), rtol=1e-12)
    assert mass_to_hopping(-6.0, 1.0).quadratic > 0
    field = jax.random.normal(jax.random.key(2), (12,))
    one, two = zoo.phi4((3, 4), kappa=hopping, coupling=coupling), zoo.phi4((3, 4), mass2=mass2, coupling=other)
    np.testing.assert_allclose(one.log_density(field), two.log_density(scale * field), rtol=1e-5)


def test_eight_schools_by_integration_over_mu_and_tau():
    y, sigma = np.array([28, 8, -3, 7, -1, 1, 18, 12.0]), np.array([15, 10, 16, 11, 9, 11, 10, 18.0])
    mu, u = np.meshgrid(np.linspace(-35, 45, 801), np.linspace(-25, 9, 1201), indexing="ij")
    tau = np.exp(u)
    log_mass = stats.norm.logpdf(mu, 0, 5) + stats.halfcauchy.logpdf(tau, scale=5) + u
    for effect, error in zip(y, sigma, strict=True):
        log_mass += stats.norm.logpdf(effect, mu, np.hypot(error, tau))
    mass = np.exp(log_mass) * 0.1 * (34 / 1200)
    target = zoo.eight_schools()
    assert target.log_normaliser.value == pytest.approx(math.log(mass.sum()), abs=1e-8)
    for name, value in {"mu": mu, "tau": tau, "log_tau": u, "mu^2": mu**2, "tau^2": tau**2}.items():
        assert target.reference[name].value == pytest.approx(np.sum(mass * value) / mass.sum(), rel=1e-6), name


@pytest.mark.skipif("ERGODICA_DATA" not in os.environ, reason="ERGODICA_DATA names no folder with reference draws")
def test_eight_schools_against_published_draws():
    """10,000 draws of posteriordb, by Stan."""
    folder = pathlib.Path(os.environ["ERGODICA_DATA"]) / "posteriordb" / "eight_schools-eight_schools_noncentered"
    published = json.loads((folder / "reference.json").read_text())["stats"]
    names = {"mu": "mu", "tau": "tau"} | {f"theta[{j + 1}]": f"theta[{j}]" for j in range(8)}
    reference = zoo.eight_schools().reference
    for theirs, ours in names.items():
        found = published[theirs]
        z = (found["mean"] - reference[ours].value) / (found["sd"] / found["ess_mean"] ** 0.5)
        z_square = (found["mean_sq"] - reference[f"{ours}^2"].value) / (found["sd_sq"] / found["ess_sq"] ** 0.5)
        assert abs(z) < THRESHOLD, ours
        assert abs(z_square) < THRESHOLD, ours


# --- draws ------------------------------------------------------------------------------------------------------------

NUM_DRAWS = 20_000


def z_of_draws(target, draws):
    values = jax.jit(jax.vmap(lambda x: target.observables(x)))(draws)
    found = {}
    for name, (exact, _) in target.reference.items():
        values_of = np.asarray(values[name], np.float64)
        found[name] = (values_of.mean() - exact) / (values_of.std(ddof=1) / math.sqrt(len(draws)))
    return found


@functools.cache
def drawn(name):
    return TARGETS[name]().draws(jax.random.key(5), NUM_DRAWS)


@pytest.mark.parametrize("name", WITH_DRAWS)
def test_draws_have_the_moments_of_the_references(name):
    """Sees errors of 5 / sqrt(20,000) = 3.5 % of an observable's standard deviation."""
    z = z_of_draws(TARGETS[name](), drawn(name))
    assert max(map(abs, z.values())) < THRESHOLD, z


@pytest.mark.parametrize("name", WITH_DRAWS)
def test_draws_of_another_scale_are_noticed(name):
    z = z_of_draws(TARGETS[name](), 1.06 * drawn(name))
    assert max(map(abs, z.values())) > REJECTION, z


def test_dropped_modes_are_noticed():
    """Corners with an even number of positive coordinates only: each coordinate has the right law, and pairs too if D > 2."""
    target = zoo.gaussian_mixture_cube(2)
    draws = np.asarray(target.draws(jax.random.key(6), NUM_DRAWS))
    same = np.abs(draws[:, :1]) * np.sign(draws[:, 1:])
    z = z_of_draws(target, jnp.asarray(np.concatenate([same, draws[:, 1:]], axis=1)))
    assert max(abs(z[k]) for k in ("mean", "mean_square")) < THRESHOLD
    assert min(abs(z["product"]), abs(z["all_positive"])) > REJECTION


def test_draws_of_wells_have_their_law():
    """Kolmogorov and Smirnov against the distribution function by quadrature."""
    x = np.asarray(drawn("many_well"), np.float64)[:, 0]
    grid = np.linspace(-6, 6, 20_001)
    mass = np.exp(0.5 * grid + 6 * grid**2 - grid**4 - 11)
    distribution = np.cumsum(mass) / mass.sum()
    assert stats.kstest(x, lambda v: np.interp(v, grid, distribution)).pvalue > 1e-6
    assert stats.kstest(x + 0.02, lambda v: np.interp(v, grid, distribution)).pvalue < 1e-6


def test_where_there_are_no_draws_the_error_says_what_to_do():
    for name in ("phi4", "eight_schools", "visit_regression"):
        target = TARGETS[name]()
        assert not target.has_draws
        with pytest.raises(ValueError, match="no exact sampler"):
            target.draws(jax.random.key(0), 3)
    with pytest.raises(TypeError, match="typed key"):
        zoo.many_well(2).draws(0, 3)
    with pytest.raises(ValueError, match="num_draws"):
        zoo.many_well(2).draws(jax.random.key(0), 0)


# --- what is stored ---------------------------------------------------------------------------------------------------


def stored_lattices():
    path = ROOT / "ergodica" / "models" / "zoo" / "data" / "phi4.json"
    return json.loads(path.read_text())


def test_stored_lattices_are_those_that_the_docstring_promises():
    stored = stored_lattices()
    assert (ROOT / stored["script"]).exists()
    assert {(e["shape"][0], e["kappa"]) for e in stored["entries"]} == set(itertools.product((4, 6, 8), (0.2, 0.3)))
    for entry in stored["entries"]:
        target = zoo.phi4(entry["shape"][0], kappa=entry["kappa"], coupling=entry["coupling"])
        assert target.log_normaliser is not None
        names = set(target.observables(jnp.zeros(target.dim)))
        assert set(target.reference) == names


def test_ways_to_the_stored_values_agree():
    """Quadrature against Monte Carlo; and the virial theorem and the symmetry, which Monte Carlo was not told."""
    for entry in stored_lattices()["entries"]:
        assert ("quadrature" in entry["methods"]) == (entry["shape"][0] < 8)
        assert all(abs(z) < THRESHOLD for z in entry.get("z", {}).values()), entry["z"]
        for name, exact in (("virial", 1.0), ("magnetisation", 0.0)):
            value, error = entry["methods"]["hmc"]["values"][name]
            assert abs(value - exact) < THRESHOLD * error, name
            assert error < 0.002 or name == "magnetisation"


def test_elsewhere_only_what_is_always_true_is_known():
    target = zoo.phi4(5, kappa=0.3, coupling=0.022)
    assert target.log_normaliser is None
    assert target.reference == {"magnetisation": ReferenceValue(0.0), "virial": ReferenceValue(1.0)}
    assert zoo.visit_regression(every=7).log_normaliser is None


@pytest.mark.slow
@pytest.mark.usefixtures("numpyro_promotion")
@pytest.mark.parametrize("name", ["phi4", "eight_schools", "visit_regression", "phi4 strip"])
def test_chains_find_the_references(name):
    """Another code than that which made the references: NUTS, tuned and run by BlackJAX."""
    import blackjax

    target = TARGETS[name]()
    posterior = target.posterior()
    tuning = blackjax.window_adaptation(blackjax.nuts, target.log_density, target_acceptance_rate=0.9)
    (_, found), _ = tuning.run(jax.random.key(3), target.start(jax.random.key(4)), num_steps=500)
    sampler = erg.from_blackjax(blackjax.nuts(target.log_density, **found))
    plain = erg.Posterior(target.log_density, initial=posterior.initial, constrain=target.observables)
    dt = erg.sample(
        jax.random.key(7), sampler, num_samples=500, num_warmup=200, num_chains=24, posterior=plain, progress=False
    )
    even = {k: v for k, v in target.reference.items() if k != "magnetisation"}  # chains keep the sign of the field
    table = erg.diagnostics.chain_expectation(dt, reference=even)
    checked = table.dropna(subset=["z"])
    assert set(checked.index) == set(even)
    assert checked["z"].abs().max() < THRESHOLD, checked
    assert (checked["se"] / checked["mean"].abs().clip(lower=0.05)).max() < 0.1


# --- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: zoo.gaussian_mixture_cube(0), "dim must be at least 1"),
        (lambda: zoo.gaussian_mixture_cube(2, variance=0.0), "variance must be positive"),
        (lambda: zoo.gaussian_mixture(np.zeros(3), np.eye(3)), "means must be finite numbers of shape"),
        (lambda: zoo.gaussian_mixture(np.zeros((2, 3)), np.eye(2)), "covariances must have shape"),
        (lambda: zoo.gaussian_mixture(np.zeros((1, 2)), np.array([[1.0, 2.0], [2.0, 1.0]])), "positive definite"),
        (lambda: zoo.gaussian_mixture(np.zeros((1, 2)), np.array([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: zoo.gaussian_mixture(np.zeros((2, 1)), np.eye(1), [1.0, -1.0]), "weights must be 2 positive"),
        (lambda: zoo.many_well(5), "dim must be even"),
        (lambda: zoo.many_well(2, quartic=0.0), "quartic must be positive"),
        (lambda: zoo.many_well(2, tilt=math.nan), "tilt must be finite"),
        (lambda: zoo.phi4(4, coupling=0.1), "one of kappa and mass2"),
        (lambda: zoo.phi4(4, kappa=0.1, mass2=1.0, coupling=0.1), "one of kappa and mass2"),
        (lambda: zoo.phi4((4, 0), kappa=0.1, coupling=0.1), r"size\[1\] must be at least 1"),
        (lambda: zoo.phi4((4, 4, 4), kappa=0.1, coupling=0.1), "pair of integers"),
        (lambda: zoo.phi4(4, kappa=0.25, coupling=0.0), "normalisable"),
        (lambda: zoo.phi4(4, mass2=-1.0, coupling=-0.1), "coupling must be at least 0"),
        (lambda: mass_to_hopping(-4.0, 0.0), "mass2 must be above -4"),
        (lambda: zoo.visit_regression(every=0), "every must be between 1 and 2019"),
    ],
)
def test_bad_input(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_bad_types():
    with pytest.raises(TypeError, match="variance must be a number"):
        zoo.gaussian_mixture_cube(2, variance="wide")
