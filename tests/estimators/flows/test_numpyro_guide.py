"""Path gradients of NumPyro's guides: equal to sticking the landing where that can be had, to linear algebra where it cannot."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from numpyro.distributions import flows as nf
from numpyro.distributions import transforms as nt
from numpyro.infer import autoguide

import ergodica as erg
from ergodica.core import tree
from ergodica.core.flow import push_forward
from ergodica.estimators.flows import numpyro_rules as rules
from ergodica.estimators.flows.numpyro_guide import land
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64", "numpyro_promotion")
STL = erg.estimators.Reparam(stl=True)


def model(x):
    """Real, positive and simplex-valued latents in a plate of observations, and a parameter of the model."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 0.5))
    p = numpyro.sample("p", dist.Dirichlet(jnp.full(3, 2.0)))
    shift = numpyro.param("shift", jnp.array(0.3))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(w[0] * w[1] + shift * p[0], scale), obs=x)


DATA = np.array([1.0, 2.5, 0.4])
GUIDES = {
    "AutoNormal": autoguide.AutoNormal,
    "AutoIAFNormal": lambda model: autoguide.AutoIAFNormal(model, num_flows=2),
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
}


def gradient_of(loss, model, guide, *args):
    return erg.estimators.VariationalGradient(loss, model, guide, *args)


@jax.jit
def estimates(gradients, key, params):
    return [g.estimate(key, params, g.init(key, params))[0] for g in gradients]


def moved(params, scale=0.1):
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    leaves = [x + scale * jax.random.normal(key, jnp.shape(x)) for x, key in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, leaves)


@pytest.mark.swept_after(2)
@pytest.mark.parametrize("name", GUIDES)
def test_equals_sticking_the_landing_on_the_same_draws(name):
    guide = GUIDES[name](model)
    losses = [erg.estimators.PathELBO(2), erg.estimators.ELBO(2, {"*": STL})]
    both = [gradient_of(loss, model, guide, jnp.asarray(DATA)) for loss in losses]
    params = moved(both[0].start(jax.random.key(0)))
    path, stl = estimates(both, jax.random.key(1), params)
    np.testing.assert_allclose(path.value, stl.value, rtol=1e-12)
    size = float(jnp.max(jnp.abs(tree.ravel(stl.gradient))))
    np.testing.assert_allclose(tree.ravel(path.gradient), tree.ravel(stl.gradient), atol=1e-10 * size, rtol=0)
    assert float(jnp.abs(path.gradient["shift"])) > 0


def traced(guide, params, *args):
    """Landed draw of the guide's latent site, and its base draw; parameters of the guide are constrained here."""
    sites = numpyro.handlers.trace(numpyro.handlers.substitute(numpyro.handlers.seed(guide, 3), data=params))
    site = sites.get_trace(*args)["_auto_latent"]
    return site, land(site)


def test_block_autoregressive_guide_equals_dense_linear_algebra():
    """NumPyro has no inverse of it; the Jacobian of the whole map from the base is solved instead."""
    x = jnp.array([1.0, -2.0])
    guide = autoguide.AutoBNAFNormal(normal_model, num_flows=2, hidden_factors=[3])
    gradient = gradient_of(erg.estimators.PathELBO(2), normal_model, guide, x)
    params = moved(gradient.start(jax.random.key(0)))

    @jax.jit
    def compare(params):
        site, landed = traced(guide, params, x)
        transform = nt.ComposeTransform(site["fn"].transforms)
        z = site["intermediates"][0][0]

        def direct(z):
            return transform(z), jnp.linalg.slogdet(jax.jacfwd(transform)(z))[1]

        log_q = jnp.sum(dist.Normal(0, 1).log_prob(z)) - direct(z)[1]
        return landed.score, push_forward(direct, z, -z), landed.log_density, log_q

    score, exact, log_density, log_q = compare(params)
    np.testing.assert_allclose(score, exact, rtol=1e-10)
    np.testing.assert_allclose(log_density, log_q, rtol=1e-12)
    (path,) = estimates([gradient], jax.random.key(1), params)
    assert np.all(np.isfinite(tree.ravel(path.gradient)))


class Sinh(nt.Transform):
    """A transformation that there is no rule for, of vectors, and that may have an inverse."""

    domain = codomain = dist.constraints.real_vector

    def __init__(self, matrix, *, invertible=True):
        self.matrix, self.invertible = matrix, invertible

    def __call__(self, x):
        return jnp.sinh(x) @ self.matrix

    def _inverse(self, y):
        if not self.invertible:
            raise NotImplementedError
        return jnp.arcsinh(y @ jnp.linalg.inv(self.matrix))

    def log_abs_det_jacobian(self, x, y, intermediates=None):
        return jnp.sum(jnp.log(jnp.cosh(x)), -1) + jnp.linalg.slogdet(self.matrix)[1]

    def tree_flatten(self):
        return (self.matrix,), (("matrix",), {"invertible": self.invertible})


def net(x):
    """Autoregressive in the order 2, 0, 1; its log scales are cut off by the transformation below."""
    mean = jnp.stack([jnp.tanh(x[..., 2]), x[..., 0] * x[..., 2], 0 * x[..., 0]], -1)
    return mean, jnp.stack([jnp.sin(x[..., 2]), x[..., 0] + x[..., 2], 0.1 + 0 * x[..., 0]], -1)


def transformations():
    matrix = jnp.eye(3) + 0.2 * jnp.arange(9.0).reshape(3, 3) / 9
    return [
        nt.AffineTransform(jnp.arange(3.0), jnp.arange(1.0, 4.0)),
        nt.IndependentTransform(nt.ExpTransform(), 1),
        nt.SigmoidTransform(),
        nt.SoftplusTransform(),
        nt.PermuteTransform(jnp.array([2, 0, 1])),
        nt.IdentityTransform(),
        nt.LowerCholeskyAffine(jnp.arange(3.0), jnp.tril(matrix)),
        nt.ComposeTransform([nt.SoftplusTransform(), nt.AffineTransform(1.0, 2.0)]),
        nt.ReshapeTransform((3, 1), (3,)),
        nt.OrderedTransform(),
        nf.InverseAutoregressiveTransform(net, log_scale_min_clip=-0.3, log_scale_max_clip=0.4),
        Sinh(matrix),
        Sinh(matrix, invertible=False),
        Sinh(matrix).inv,
    ]


def rule_errors(kinds):
    """Against dense linear algebra with numbers of the map itself, by differences where NumPyro's derivatives are not those."""
    x, score = 0.5 * jax.random.normal(jax.random.key(3), (2, 4, 3))

    def errors(transform):
        def direct(x):
            return transform(x).reshape(-1)

        step = 1e-5 * jnp.eye(3)

        def exact(x, score):
            jacobian = jax.vmap(lambda e: (direct(x + e) - direct(x - e)) / 2e-5)(step).T
            log_det = lambda x: jnp.sum(transform.log_abs_det_jacobian(x, transform(x)))  # noqa: E731
            slope = jax.vmap(lambda e: (log_det(x + e) - log_det(x - e)) / 2e-5)(step)
            return jnp.linalg.solve(jacobian.T, score - slope)

        y = jax.vmap(transform)(x)
        return jnp.max(jnp.abs(rules.carry(transform, x, y, score).reshape(4, 3) - jax.vmap(exact)(x, score)))

    return np.asarray(jax.jit(lambda: jnp.stack([errors(kind) for kind in kinds]))())


def test_every_rule_equals_dense_linear_algebra():
    kinds = transformations()
    for kind, error in zip(kinds, rule_errors(kinds), strict=True):
        assert error < 1e-7, (type(kind).__name__, error)


def without_slope(transform, x, y, score):
    """A mutant: the slope of the log determinant is left out."""
    return score / jax.vjp(transform, x)[1](jnp.ones_like(y))[0]


def through_the_cut(transform, x, y, score):
    """A mutant: the cut of log scales is not seen, as NumPyro's own derivative of the inverse does not see it."""
    return rules.carry.dispatch(object)(transform, x, y, score)


@pytest.mark.parametrize(
    ("kind", "mutant"),
    [(nt.SoftplusTransform, without_slope), (nf.InverseAutoregressiveTransform, through_the_cut)],
)
def test_mutants_of_rules_are_seen(monkeypatch, kind, mutant):
    before = rules.carry.dispatch(kind)
    rules.carry.register(kind, mutant)
    try:
        (error,) = rule_errors([t for t in transformations() if isinstance(t, kind)])
    finally:
        rules.carry.register(kind, before)
    assert error > 1e-3


def normal_model(x):
    """A conjugate model: its posterior is normal with mean x/2 and variance 1/2, each entry."""
    w = numpyro.sample("w", dist.Normal(0, 1).expand([2]).to_event(1))
    numpyro.sample("x", dist.Normal(w, 1.0).to_event(1), obs=x)


def flow_guide(x):
    """A flow with parameters of its own, in front of which a permutation stands."""
    loc, scale = numpyro.param("loc", jnp.array([0.4, -0.2])), numpyro.param("scale", jnp.array([0.6, 0.8]))
    parts = [nt.PermuteTransform(jnp.array([1, 0])), nt.AffineTransform(loc, scale)]
    numpyro.sample("w", dist.TransformedDistribution(dist.Normal(jnp.zeros(2), 1.0).to_event(1), parts))


PLACES = {
    "exact": {"loc": jnp.array([0.5, -1.0]), "scale": jnp.sqrt(jnp.array([0.5, 0.5]))},
    "away": {"loc": jnp.array([0.9, 0.4]), "scale": jnp.array([0.9, 0.5])},
}


def replicates(loss, params, num_repeats):
    gradient = gradient_of(loss, normal_model, flow_guide, jnp.array([1.0, -2.0]))

    def one(gradient, key, params):
        return tree.ravel(gradient.estimate(key, params, {})[0].gradient)

    keys = jax.random.split(jax.random.key(2), num_repeats)
    return np.asarray(jax.jit(jax.vmap(one, (None, 0, None)))(gradient, keys, params))


def test_noise_vanishes_where_the_guide_is_exact_and_the_mean_is_right_elsewhere():
    r"""By hand: :math:`\partial_\mu \mathcal L = x - 2\mu`, :math:`\partial_\sigma \mathcal L = 1/\sigma - 2\sigma`."""
    x = np.array([1.0, -2.0])
    exact, away = ({k: np.asarray(v, np.float64) for k, v in PLACES[name].items()} for name in ("exact", "away"))
    exact["scale"] = np.sqrt([0.5, 0.5])
    path, loss = erg.estimators.PathELBO(), erg.estimators.ELBO()
    assert np.max(np.abs(replicates(path, exact, 50))) < 1e-13
    assert np.std(replicates(loss, exact, 50), axis=0).min() > 0.1
    by_hand = np.concatenate([x - 2 * away["loc"], 1 / away["scale"] - 2 * away["scale"]])
    assert_mean(replicates(path, away, 20_000), by_hand, smallest_error=0.05)
    before = rules.carry.dispatch(nt.AffineTransform)
    rules.carry.register(nt.AffineTransform, lambda transform, x, y, score: score)
    try:
        wrong = replicates(path, away, 20_000)
    finally:
        rules.carry.register(nt.AffineTransform, before)
    assert np.max(np.abs(z_scores(wrong, by_hand))) > REJECTION


def test_goes_into_svi_and_into_comparisons():
    x = jnp.array([1.0, -2.0])
    losses = {"path": erg.estimators.PathELBO(4), "standard": erg.estimators.ELBO(4)}
    guide = autoguide.AutoMultivariateNormal(normal_model)
    svi = numpyro.infer.SVI(normal_model, guide, optax.adam(0.05), loss=losses["path"])
    result = svi.run(jax.random.key(0), 600, x, progress_bar=False)
    np.testing.assert_allclose(result.params["auto_loc"], x / 2, atol=1e-3)
    np.testing.assert_allclose(result.losses[-1], -np.sum(dist.Normal(0, np.sqrt(2)).log_prob(x)), atol=1e-3)
    guide = autoguide.AutoNormal(normal_model)
    gradients = {name: gradient_of(loss, normal_model, guide, x) for name, loss in losses.items()}
    start = gradients["path"].start(jax.random.key(0))
    table = erg.compare_gradients(jax.random.key(1), gradients, start, num_repeats=8000, num_timings=0)
    assert table.verdict.sel(estimator="path").item() == "unbiased"
    assert table.attrs["reference"] == "exact"


def subsampled(x):
    mean = numpyro.sample("mean", dist.Normal(0, 1))
    with numpyro.plate("data", 4, subsample_size=2, dim=-1) as index:
        local = numpyro.sample("local", dist.Normal(mean, 1.0))
        numpyro.sample("x", dist.Normal(local, 1.0), obs=x[index])


def local_guide(x):
    mean_loc = numpyro.param("mean_loc", jnp.array(0.1))
    numpyro.sample("mean", dist.TransformedDistribution(dist.Normal(0.0, 1.0), nt.AffineTransform(mean_loc, 0.5)))
    locs, scales = numpyro.param("locs", jnp.arange(4.0)), numpyro.param("scales", jnp.arange(1.0, 5.0))
    with numpyro.plate("data", 4, subsample_size=2, dim=-1) as index:
        law = dist.TransformedDistribution(
            dist.Normal(jnp.zeros(2), 1.0), nt.AffineTransform(locs[index], scales[index])
        )
        with numpyro.handlers.mask(mask=index < 3):
            numpyro.sample("local", law)


def test_scales_masks_and_subsamples_are_those_of_sticking_the_landing():
    losses = [erg.estimators.PathELBO(3), erg.estimators.ELBO(3, {"*": STL})]
    both = [gradient_of(loss, subsampled, local_guide, jnp.arange(4.0)) for loss in losses]
    params = both[0].start(jax.random.key(0))
    path, stl = estimates(both, jax.random.key(1), params)
    np.testing.assert_allclose(path.value, stl.value, rtol=1e-12)
    np.testing.assert_allclose(tree.ravel(path.gradient), tree.ravel(stl.gradient), rtol=1e-10, atol=1e-12)


def test_refusals():
    loss, x = erg.estimators.PathELBO(), jnp.zeros(())

    def discrete(x):
        numpyro.sample("z", dist.Bernoulli(0.3))

    def dependent(x):
        w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        numpyro.sample("v", dist.Normal(w, 1.0))

    def unparametrised(x):
        numpyro.sample("a", dist.VonMises(0.0, 1.0))

    with pytest.raises(erg.estimators.SiteError, match=r"at site 'z'.*its values are discrete"):
        loss.plan(discrete, discrete, x)
    with pytest.raises(
        erg.estimators.SiteError, match=r"at site 'v'.*depends on 'w'.*Use ELBO\(sites=\{'\*': Reparam\(stl"
    ):
        loss.plan(dependent, dependent, x)
    with pytest.raises(erg.estimators.SiteError, match=r"at site 'a'.*no reparameterisation"):
        loss.plan(unparametrised, unparametrised, x)
    with pytest.raises(ValueError, match="point masses alone"):
        loss.plan(normal_model, autoguide.AutoDelta(normal_model), jnp.zeros(2))
    with pytest.raises(ValueError, match="num_particles must be at least 1; got 0"):
        erg.estimators.PathELBO(0)
    plan = loss.plan(normal_model, flow_guide, jnp.zeros(2))
    assert [row.site for row in plan.rows] == ["w"]
    assert "unbiased" in plan.title
