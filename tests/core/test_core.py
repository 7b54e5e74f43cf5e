"""Trees, keys, checks, schedules, results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ergodica.core import check, rng, schedule, tree
from ergodica.core.result import Outcome, Result, SamplingError

TREE = {"w": jnp.array([[1.0, 2.0], [3.0, 4.0]]), "b": (jnp.array(5.0), jnp.array([6.0]))}


def test_names_and_coordinates():
    assert list(tree.named_leaves(TREE)) == ["b.0", "b.1", "w"]
    assert tree.coordinate_names(TREE) == ["b.0", "b.1[0]", "w[0, 0]", "w[0, 1]", "w[1, 0]", "w[1, 1]"]
    assert tree.coordinate_names(jnp.zeros(2)) == ["position[0]", "position[1]"]
    assert list(tree.named_leaves(jnp.zeros(2), root="data")) == ["data"]


def test_coordinate_names_follow_ravel():
    flat = tree.ravel(TREE)
    leaves = tree.named_leaves(TREE)
    for name, value in zip(tree.coordinate_names(TREE), flat, strict=True):
        leaf, _, bracket = name.partition("[")
        index = tuple(int(i) for i in bracket.rstrip("]").split(",")) if bracket else ()
        assert leaves[leaf][index] == value


def test_tree_arithmetic():
    flat = np.asarray(tree.ravel(TREE))
    other = jax.tree.map(lambda x: x**2, TREE)
    np.testing.assert_allclose(tree.ravel(tree.axpy(0.5, other, TREE)), 0.5 * flat**2 + flat)
    np.testing.assert_allclose(tree.ravel(tree.add(TREE, other)), flat + flat**2)
    np.testing.assert_allclose(tree.ravel(tree.subtract(TREE, other)), flat - flat**2)
    np.testing.assert_allclose(tree.ravel(tree.scale(TREE, -2.0)), -2 * flat)
    np.testing.assert_allclose(tree.dot(TREE, other), np.sum(flat**3))
    np.testing.assert_allclose(tree.norm(TREE), np.linalg.norm(flat), rtol=1e-6)
    np.testing.assert_array_equal(tree.ravel(tree.select(jnp.array(False), TREE, other)), flat**2)
    assert tree.size(TREE) == 6


def test_tree_arithmetic_keeps_single_precision_under_double():
    with jax.enable_x64(True):
        x = {"a": jnp.ones(2, jnp.float32), "b": jnp.ones(2, jnp.float64)}
        moved = tree.axpy(jnp.asarray(0.1), x, x)
        assert (moved["a"].dtype, moved["b"].dtype) == (jnp.float32, jnp.float64)
        assert tree.norm(x).dtype == jnp.float64


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
def test_all_finite(bad):
    assert tree.all_finite(TREE)
    assert not tree.all_finite({**TREE, "c": jnp.array([0.0, bad])})
    assert tree.all_finite({})


def test_normals_have_the_dtypes_of_the_tree():
    with jax.enable_x64(True):
        draws = rng.normal_like(jax.random.key(0), {"a": jnp.zeros(2, jnp.float32), "b": jnp.zeros((3, 1))})
        assert (draws["a"].dtype, draws["b"].dtype, draws["b"].shape) == (jnp.float32, jnp.float64, (3, 1))


def test_keys():
    rng.check_key(jax.random.key(0))
    with pytest.raises(TypeError, match=r"key must be a typed key.*got int"):
        rng.check_key(0)
    with pytest.raises(TypeError, match=r"got .* of dtype uint32.*wrap_key_data"):
        rng.check_key(jax.random.PRNGKey(0))
    with pytest.raises(ValueError, match=r"a single key; got an array of keys of shape \(2,\)"):
        rng.check_key(jax.random.split(jax.random.key(0)))
    words = rng.describe(jax.random.key(7)).split(":")[-1]
    restored = jax.random.wrap_key_data(jnp.array([int(w) for w in words.split(",")], jnp.uint32))
    assert restored == jax.random.key(7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: check.positive("h", 0.0), ValueError, "h must be finite and above 0; got 0.0"),
        (lambda: check.positive("T", -1, allow_zero=True), ValueError, "T must be finite and at least 0; got -1"),
        (lambda: check.positive("h", np.inf), ValueError, "h must be finite"),
        (
            lambda: check.positive("h", "a", hint="Do this."),
            TypeError,
            "h must be a number; got 'a' of type str. Do this.",
        ),
        (lambda: check.integer("n", True), TypeError, "n must be an integer; got True of type bool"),
        (lambda: check.integer("n", 1.0), TypeError, "n must be an integer; got 1.0"),
        (lambda: check.integer("n", 0), ValueError, "n must be at least 1; got 0"),
        (lambda: check.integer("n", 9, most=8, hint="Why."), ValueError, "n must be between 1 and 8; got 9. Why."),
        (lambda: check.one_of("s", "c", ["a", "b"]), ValueError, "s must be one of 'a', 'b'; got 'c'"),
        (lambda: check.function("f", 3), TypeError, "f must be a function; got 3 of type int"),
        (lambda: check.instance("x", 3, dict, "such as {}"), TypeError, "x must be an dict, such as {}; got 3"),
        (lambda: check.position("p", {}), ValueError, "p must hold at least one array"),
        (lambda: check.position("p", {"a": 1}), TypeError, r"p\['a'\] must be of floating point; got dtype int32"),
        (lambda: check.position("p", {"a": "x"}), TypeError, r"p\['a'\] must be of floating point; got dtype str"),
        (lambda: check.position("p", np.array([1.0, np.nan])), ValueError, "p must be finite"),
        (lambda: check.leading_length("d", {}), ValueError, "d must hold at least one array"),
        (lambda: check.leading_length("d", {"a": 1.0}), ValueError, r"d\['a'\] must have a leading axis"),
        (
            lambda: check.leading_length("d", {"a": np.ones(2), "b": np.ones(3)}),
            ValueError,
            r"All arrays of d .*d\['a'\] has 2, d\['b'\] has 3",
        ),
        (lambda: check.leading_length("d", np.ones((0, 2))), ValueError, "d must hold at least one row"),
        (lambda: check.same_structure("a", [1.0], "b", (1.0,)), ValueError, "a must have the structure of b"),
        (
            lambda: check.same_structure("a", [np.ones(2)], "b", [np.ones(3)]),
            ValueError,
            r"a\[0\] must have the shape \(3,\) of b; got \(2,\)",
        ),
    ],
)
def test_check_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_checks_return_what_they_checked():
    h = check.positive("h", 0.1)
    assert (h.dtype, h.weak_type) == (jnp.float32, False)
    assert check.integer("n", np.int64(3)) == 3
    assert check.leading_length("d", {"a": np.ones((4, 2)), "b": np.ones(4)}) == 4


def test_checks_of_values_are_skipped_under_a_trace():
    """Values known only at run time never raise: the diverging flag is for them."""
    assert jnp.isnan(jax.jit(lambda h: check.positive("h", h))(jnp.nan))


def test_position_is_copied():
    given = np.ones(2, np.float32)
    position = check.position("p", given)
    given[0] = 7.0
    np.testing.assert_array_equal(position, 1.0)


def test_hyperparameters():
    number = schedule.hyperparameter("h", 0.5)
    assert schedule.value_at(number, jnp.array(3)) == 0.5
    decaying = schedule.hyperparameter("h", lambda count: 1.0 / (1.0 + count.astype(float)))
    assert schedule.value_at(decaying, jnp.array(3)) == 0.25
    assert jax.tree.leaves(decaying) == []  # static: another function retraces
    with pytest.raises(ValueError, match=r"h must be finite and above 0; got -1\. A function of the step count"):
        schedule.hyperparameter("h", -1)


def test_outcomes_say_where():
    assert Outcome(Result.SUCCESSFUL).message() == "The run ended as planned."
    error = SamplingError(Outcome(Result.NONFINITE, chain=2, step=17), partial="kept")
    assert "in chain 2 at step 17" in str(error)
    assert (error.outcome.result, error.partial) == ("nonfinite", "kept")
    assert all(Outcome(result).message() for result in Result)
