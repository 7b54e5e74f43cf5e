"""flowjax's flows: its draws, parameters and densities, and scores that equal those of its own two passes."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import paramax
import pytest
from flowjax import bijections as fb
from flowjax import distributions as fd
from flowjax import flows as ff
from flowjax.root_finding import elementwise_autoregressive_bisection, root_finder_to_inverter
from flowjax.train.losses import ElboLoss

import ergodica as erg
from ergodica.core import flow as flows
from ergodica.core import tree
from ergodica.integrations import flowjax_rules as rules
from ergodica.integrations.flowjax import FlowjaxLayer, from_flowjax, to_flowjax
from tests.support.flows import bent_flow, target
from tests.support.statistics import REJECTION, assert_mean, z_scores

pytestmark = pytest.mark.usefixtures("x64", "numpyro_promotion")

DIM, NUM_SAMPLES, TIGHT = 3, 4, 1e-13
INVERTER = root_finder_to_inverter(
    functools.partial(
        elementwise_autoregressive_bisection, lower=np.full(DIM, -5.0), upper=np.full(DIM, 5.0), atol=TIGHT
    )
)


def moved(tree, scale=0.2):
    """All arrays away from where flowjax starts them, where many derivatives are zero."""
    trainable, rest = eqx.partition(tree, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable))
    leaves, treedef = jax.tree.flatten(trainable)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    leaves = [x + scale * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
    return eqx.combine(jax.tree.unflatten(treedef, leaves), rest)


def make(architecture, *, invert=False, base=None, **settings):
    base = fd.StandardNormal((DIM,)) if base is None else base
    return moved(architecture(jax.random.key(0), base_dist=base, flow_layers=2, invert=invert, **settings))


def spline():
    """Made when it is used: in double precision."""
    return fb.RationalQuadraticSpline(knots=4, interval=3)


def splines(architecture, **settings):
    return make(architecture, transformer=spline(), **SMALL, **settings)


SMALL = {"nn_width": 6, "nn_activation": jnp.tanh}
FLOWS = {
    "affine couplings": functools.partial(make, ff.coupling_flow, **SMALL),
    "affine couplings, inverted": functools.partial(make, ff.coupling_flow, invert=True, **SMALL),
    "masked autoregressive": functools.partial(make, ff.masked_autoregressive_flow, **SMALL),
    "spline couplings": functools.partial(splines, ff.coupling_flow),
    "spline couplings, inverted": functools.partial(splines, ff.coupling_flow, invert=True),
    "masked autoregressive, inverted": functools.partial(make, ff.masked_autoregressive_flow, invert=True, **SMALL),
    "triangular splines": functools.partial(make, ff.triangular_spline_flow, knots=4),
    "triangular splines, inverted": functools.partial(make, ff.triangular_spline_flow, knots=4, invert=True),
    "planar": functools.partial(make, ff.planar_flow, negative_slope=0.3),
    "planar, inverted": functools.partial(make, ff.planar_flow, negative_slope=0.3, invert=True),
    "splines, masked autoregressive": functools.partial(splines, ff.masked_autoregressive_flow),
    "block autoregressive": functools.partial(
        make, ff.block_neural_autoregressive_flow, nn_block_dim=3, inverter=INVERTER
    ),
    "block autoregressive, inverted": functools.partial(
        make, ff.block_neural_autoregressive_flow, nn_block_dim=3, inverter=INVERTER, invert=True
    ),
}


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@eqx.filter_jit
def gradients_of(theirs, key):
    """Path gradients by one pass and by flowjax's two; and by one pass where the target is the flow itself."""
    ours = from_flowjax(theirs)
    path = erg.estimators.PathGradient(ours, target, num_samples=NUM_SAMPLES).estimate(key, ours.params, None)[0]
    perfect = erg.estimators.PathGradient(ours, theirs.log_prob, num_samples=1).estimate(key, ours.params, None)[0]
    params, static = eqx.partition(theirs, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable))
    two_passes = jax.grad(ElboLoss(target, NUM_SAMPLES, stick_the_landing=True))(params, static, key)
    return path.gradient, path.value, two_passes, perfect.gradient


@pytest.mark.swept_after(3)
@pytest.mark.parametrize("name", FLOWS)
def test_one_pass_equals_the_two_of_flowjax_on_the_same_draws(name):
    ours, value, theirs, perfect = gradients_of(FLOWS[name](), jax.random.key(1))
    assert len(leaves(ours)) == len(leaves(theirs)) > 0
    size = max(np.max(np.abs(x)) for x in leaves(theirs))
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, -b, rtol=0, atol=1e-10 * max(size, 1))
    assert np.isfinite(value)
    assert size > 0.01
    for x in leaves(perfect):
        np.testing.assert_allclose(x, 0.0, atol=1e-10)


def bijections():
    """One of each kind, of several shapes; those that have no inverse are the last."""
    keys = iter(jax.random.split(jax.random.key(2), 20))
    matrix = jnp.eye(3) + 0.3 * jax.random.normal(next(keys), (3, 3))

    def net(kind, transformer, **settings):
        return kind(
            next(keys), transformer=transformer, dim=3, nn_width=4, nn_depth=1, nn_activation=jnp.tanh, **settings
        )

    coupling = functools.partial(net, fb.Coupling, untransformed_dim=1)
    kinds = [
        fb.Affine(jnp.arange(3.0), jnp.arange(1.0, 4.0)),
        fb.Loc(jnp.arange(3.0)),
        fb.Scale(jnp.arange(1.0, 4.0)),
        fb.TriangularAffine(jnp.arange(3.0), matrix),
        fb.TriangularAffine(jnp.arange(3.0), matrix, lower=False),
        fb.Exp((3,)),
        fb.SoftPlus((3,)),
        fb.Sigmoid((3,)),
        fb.Tanh((3,)),
        fb.LeakyTanh(0.5, (3,)),
        fb.Chain([fb.Exp((3,)), fb.Power(1.5, (3,))]),
        fb.Householder(jnp.arange(1.0, 4.0)),
        fb.Permute(jnp.array([2, 0, 1])),
        fb.Flip((3,)),
        fb.Identity((3,)),
        coupling(fb.Affine()),
        net(fb.MaskedAutoregressive, fb.Affine()),
        fb.Planar(next(keys), dim=3, negative_slope=0.2),
        fb.Sandwich(fb.Vmap(spline(), axis_size=3), fb.LeakyTanh(0.7, (3,))),
        fb.Stack([fb.Affine(jnp.ones(2)), fb.Tanh((2,))], axis=1),
        fb.Concatenate([fb.Affine(jnp.ones(1)), fb.TriangularAffine(jnp.zeros(2), matrix[:2, :2])]),
        fb.Reshape(fb.Invert(fb.Tanh((4,))), (2, 2)),
        fb.Indexed(fb.Tanh((2,)), jnp.array([0, 2]), (3,)),
        fb.Chain([fb.Affine(), fb.Invert(fb.SoftPlus())]),
        fb.Vmap(fb.TriangularAffine(jnp.zeros(2), matrix[:2, :2]), axis_size=2),
        Cubic(jnp.array([0.3, 0.4, 0.5])),
        fb.Planar(next(keys), dim=3),
        fb.BlockAutoregressiveNetwork(next(keys), dim=3, depth=1, block_dim=2),
        Mixing(matrix),
    ]
    return [moved(kind) for kind in kinds]


class Cubic(fb.AbstractBijection):
    """A bijection that there is no rule for, with an inverse."""

    slope: jax.Array
    shape: tuple = (3,)
    cond_shape: None = None

    def transform_and_log_det(self, x, condition=None):
        return self.slope * jnp.sinh(x), jnp.sum(jnp.log(self.slope * jnp.cosh(x)))

    def inverse_and_log_det(self, y, condition=None):
        x = jnp.arcsinh(y / self.slope)
        return x, -jnp.sum(jnp.log(self.slope * jnp.cosh(x)))


class Mixing(fb.AbstractBijection):
    """A bijection that there is no rule for, without an inverse."""

    matrix: jax.Array
    shape: tuple = (3,)
    cond_shape: None = None

    def transform_and_log_det(self, x, condition=None):
        return self.matrix @ (x + x**3), jnp.linalg.slogdet(self.matrix)[1] + jnp.sum(jnp.log(1 + 3 * x**2))

    def inverse_and_log_det(self, y, condition=None):
        raise NotImplementedError


def errors(layer, x, score):
    """Of each part of a pass and of the way back, against dense linear algebra."""
    y, log_det = layer.forward(x)
    jacobian = jax.jacrev(lambda x: layer.forward(x)[0])(x)
    slope = jax.grad(lambda x: layer.forward(x)[1])(x)
    got = layer.forward_with_score(x, score)
    wanted = (y, log_det, jnp.linalg.solve(jacobian.T, score - slope))
    try:
        got += layer.inverse_with_score(y, wanted[2])
        wanted += (x, -log_det, score)
    except NotImplementedError:
        pass
    return jnp.stack([jnp.max(jnp.abs(a - b)) for a, b in zip(got, wanted, strict=True)])


def rule_errors(layers):
    def all_of(layers):
        sizes = [jnp.zeros(layer.bijection.shape).size for layer in layers]
        draws = [0.5 * jax.random.normal(jax.random.key(3), (2, size)) for size in sizes]
        return [errors(layer, x, score) for layer, (x, score) in zip(layers, draws, strict=True)]

    return [np.asarray(x) for x in jax.jit(all_of)(layers)]


def test_every_rule_equals_dense_linear_algebra_both_ways():
    layers = [FlowjaxLayer(bijection) for bijection in bijections()]
    found = rule_errors(layers)
    for layer, errors_of_one in zip(layers, found, strict=True):
        assert np.max(errors_of_one) < 1e-12, (type(layer.bijection).__name__, errors_of_one)
    assert [len(errors_of_one) for errors_of_one in found] == [6] * (len(layers) - 3) + [3] * 3


def test_scores_and_log_determinants_are_constants():
    layer, x = FlowjaxLayer(fb.SoftPlus((3,))), jnp.arange(3.0)

    def derivative(part):
        return jax.grad(lambda x: jnp.sum(layer.forward_with_score(x, x)[part]))(x)

    np.testing.assert_allclose(derivative(0), jax.nn.sigmoid(x))
    np.testing.assert_array_equal(derivative(1), 0.0)
    np.testing.assert_array_equal(derivative(2), 0.0)


def without_slope(bijection, x, score, condition):
    """A mutant: the slope of the log determinant is left out."""
    (y, log_det, _), products = rules._linearised(bijection, x, condition)
    return y, log_det, score / products(jnp.ones_like(y), 0.0)


def without_conditioner(bijection, x, score, condition):
    """A mutant: the conditioner does not hear of the score."""
    y, log_det, right = rules._coupling(bijection, x, score, condition)
    return y, log_det, jnp.where(jnp.arange(x.size) < bijection.untransformed_dim, score, right)


@pytest.mark.parametrize(("kind", "mutant"), [(fb.SoftPlus, without_slope), (fb.Coupling, without_conditioner)])
def test_mutants_of_rules_are_seen(kind, mutant):
    layer = next(FlowjaxLayer(b) for b in bijections() if isinstance(b, kind))
    right = rules.carry.dispatch(kind)
    rules._with(kind)(mutant)
    try:
        assert np.max(rule_errors([layer])[0]) > 0.01
    finally:
        rules.carry.register(kind, right)


def test_draws_densities_and_parameters_are_those_of_flowjax():
    base = paramax.non_trainable(fd.Normal(jnp.arange(3.0), 2.0))
    theirs = make(ff.coupling_flow, base=base, **SMALL)
    ours = from_flowjax(theirs)
    key = jax.random.key(5)
    x, log_q = ours.sample_and_log_prob(key, 5)
    np.testing.assert_allclose(x, theirs.sample(key, (5,)), rtol=1e-12)
    np.testing.assert_allclose(log_q, theirs.log_prob(x), rtol=1e-9)
    np.testing.assert_allclose(jax.vmap(ours.log_prob)(x), theirs.log_prob(x), rtol=1e-12)
    trainable = eqx.filter(theirs, eqx.is_inexact_array, is_leaf=lambda x: isinstance(x, paramax.NonTrainable))
    assert len(leaves(ours.params)) == len(leaves(trainable)) < len(leaves(eqx.filter(theirs, eqx.is_inexact_array)))

    target = lambda x: -0.5 * jnp.sum(x**2)  # noqa: E731
    gradient = erg.estimators.PathGradient(ours, target, num_samples=8).estimate(key, ours.params, None)[0].gradient
    updates, _ = optax.adam(0.1).update(gradient, optax.adam(0.1).init(ours.params))
    after = to_flowjax(ours.with_params(optax.apply_updates(ours.params, updates)))
    held = [b for b in after.bijection.bijections if isinstance(b, fb.Affine)]
    np.testing.assert_array_equal(paramax.unwrap(held[0]).loc, np.arange(3.0))
    assert np.max(np.abs(after.sample(key, (5,)) - x)) > 1e-3
    np.testing.assert_array_equal(to_flowjax(ours).sample(key, (5,)), x)


def test_trainable_base_is_a_layer():
    """flowjax trains the location and scale of a normal base; so is it here."""
    theirs = fd.Transformed(fd.Normal(jnp.arange(2.0), 2.0), fb.Tanh((2,)))
    ours = from_flowjax(theirs)
    assert len(ours.layer.layers) == 2
    assert len(leaves(ours.params)) == 2
    np.testing.assert_allclose(ours.log_prob(jnp.array([0.1, 0.2])), theirs.log_prob(jnp.array([0.1, 0.2])))


def test_condition_is_held():
    theirs = make(ff.coupling_flow, cond_dim=2, **SMALL)
    condition = jnp.array([0.3, -0.7])
    ours, x = from_flowjax(theirs, condition), jnp.array([0.1, 0.2, 0.3])
    np.testing.assert_allclose(ours.log_prob(x), theirs.log_prob(x, condition), rtol=1e-12)
    assert np.max(errors(ours.layer.layers[0], x, x)) < 1e-12


def test_single_precision_under_jit_and_vmap():
    with jax.enable_x64(False):
        ours = from_flowjax(make(ff.coupling_flow, **SMALL))
        x = jax.random.normal(jax.random.key(0), (4, DIM))
        carried = jax.jit(jax.vmap(lambda x: ours.layer.forward_with_score(x, -x)))(x)
        assert {str(a.dtype) for a in carried} == {"float32"}
        one = ours.layer.forward_with_score(x[0], -x[0])
        for a, b in zip(carried, one, strict=True):
            np.testing.assert_allclose(a[0], b, rtol=2e-5, atol=1e-5)


def test_mean_is_that_of_the_standard_gradient():
    """Of a flow that has no inverse at all. The difference draw by draw has mean zero; the standard gradient has not."""
    ours = from_flowjax(make(ff.planar_flow))
    kinds = (erg.estimators.PathGradient, erg.estimators.ReverseKL)
    estimators = [kind(ours, target, num_samples=150) for kind in kinds]

    @jax.jit
    @jax.vmap
    def both(key):
        return [tree.ravel(e.estimate(key, ours.params, None)[0].gradient) for e in estimators]

    path, standard = (np.asarray(x) for x in both(jax.random.split(jax.random.key(0), 2000)))
    scale = np.max(np.abs(standard.mean(0)))
    assert_mean((path - standard) / scale + 1.0, np.ones(path.shape[1]), smallest_error=0.1)
    assert np.max(np.abs(z_scores(standard, 0.0))) > REJECTION


def test_our_flows_go_to_flowjax():
    flow = bent_flow()
    theirs = to_flowjax(flow)
    x = theirs.sample(jax.random.key(0), (3,))
    np.testing.assert_allclose(theirs.log_prob(x), jax.vmap(flow.log_prob)(x), rtol=1e-12)
    torus = to_flowjax(flows.Flow(flows.UniformTorus(2)))
    np.testing.assert_allclose(torus.log_prob(torus.sample(jax.random.key(0))), -2 * np.log(2 * np.pi))


def test_refusals():
    with pytest.raises(TypeError, match=r"parameters that flowjax would train: \.df"):
        from_flowjax(fd.StudentT(jnp.array([3.0])))
    held = from_flowjax(paramax.non_trainable(fd.StudentT(jnp.array([3.0]))))
    assert held.dim == 1
    with pytest.raises(TypeError, match="source must be a distribution or a bijection of flowjax; got int"):
        from_flowjax(3)
    with pytest.raises(ValueError, match="condition must be an array of shape"):
        from_flowjax(make(ff.coupling_flow, cond_dim=2, **SMALL))
    with pytest.raises(ValueError, match="StandardNormal is not conditional"):
        from_flowjax(fd.StandardNormal((2,)), jnp.zeros(2))
