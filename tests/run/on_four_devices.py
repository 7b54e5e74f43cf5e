"""Checks that need four devices; `test_devices` runs this file in a process that has them, and reads which checks passed."""

import re
import sys
import tempfile
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ergodica as erg
from ergodica.run import loop
from tests.support.problems import logistic_regression

KEY = jax.random.key(7)
KERNELS = {
    "SGLD": lambda gradient: erg.samplers.SGLD(gradient, 0.02),
    "BAOAB": lambda gradient: erg.samplers.BAOAB(gradient, 0.1),
}


def kernel(name="SGLD", scheme="blocks"):
    return KERNELS[name](erg.estimators.Minibatch(logistic_regression(), 7, scheme))


def run(sampler, **options):
    arguments = {"num_samples": 40, "num_warmup": 20, "num_chains": 8, "thin": 3, "progress": False}
    return erg.sample(KEY, sampler, **arguments | options)


def same(a, b):
    for group in ("posterior", "sample_stats", "probe"):
        for name in a[group].data_vars:
            np.testing.assert_array_equal(a[group][name].values, b[group][name].values, err_msg=f"{group}/{name}")


def check_chains_over_devices_are_bitwise_those_of_one():
    """All eight on one device, and two on one device: what a device computes does not depend on where the others are."""
    for name, scheme in (("SGLD", "blocks"), ("BAOAB", "uniform")):
        sampler = kernel(name, scheme)
        spread = run(sampler, devices=jax.devices())
        same(spread, run(sampler))
        two = run(sampler, num_chains=2).posterior["position"].values
        np.testing.assert_array_equal(spread.posterior["position"].values[:2], two)


def check_chains_do_not_communicate():
    """The compiled program has no collective, and one program serves warm-up and sampling."""
    programs = []
    original = loop.advance

    class Spy:
        def __call__(self, *args, **kwargs):
            if not programs:
                programs.append(original.lower(*args, **kwargs).compile().as_text())
            return original(*args, **kwargs)

    loop.advance = Spy()
    try:
        before = original._cache_size()
        run(kernel(), devices=jax.devices())
    finally:
        loop.advance = original
    assert collectives(programs[0]) == 0
    assert "num_partitions=4" in programs[0]
    assert original._cache_size() - before <= 1


def check_a_run_may_go_on_with_other_devices():
    with tempfile.TemporaryDirectory() as folder:
        run(kernel(), num_samples=11, checkpoint=folder)
        resumed = run(kernel(), checkpoint=folder, devices=jax.devices()[:2])
    assert resumed.attrs["resumed_from"] == 11
    same(resumed, run(kernel()))


def check_bad_devices_are_refused():
    for devices, error, words in (
        ([], TypeError, "sequence of JAX devices"),
        ([0, 1], TypeError, "sequence of JAX devices"),
        (jax.devices()[:3], ValueError, "multiple of the number of devices, 3; got 8"),
        (jax.devices()[:1] * 2, ValueError, "different devices"),
    ):
        with pytest.raises(error, match=words):
            run(kernel(), devices=devices)


def collectives(program):
    return len(
        re.findall(r" (?:all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", program)
    )


def gradients(scheme):
    batch_size = None if scheme == "full" else 8
    alone = erg.estimators.Minibatch(logistic_regression(num_data=31), batch_size, scheme)
    return alone, erg.estimators.DataParallel(alone)


def check_data_parallel_gradient_is_that_of_one_device():
    """31 data in blocks of 8 and 7 rows, and all 31 rows over 4 devices. Single steps, then whole chains."""
    with jax.enable_x64(True):
        params = jnp.array([0.3, -0.5, 1.0])
        for scheme in ("blocks", "symmetric", "full"):
            alone, spread = gradients(scheme)
            first, second = alone.init(KEY, params), spread.init(KEY, params)
            estimate = jax.jit(lambda gradient, *arguments: gradient.estimate(*arguments))
            for i in range(10):
                a, first = estimate(alone, jax.random.key(i), params, first)
                b, second = estimate(spread, jax.random.key(i), params, second)
                np.testing.assert_allclose(b.gradient, a.gradient, rtol=1e-12)
                np.testing.assert_allclose(b.value, a.value, rtol=1e-12)
                assert a.n_grad == b.n_grad
        alone, spread = gradients("blocks")
        draws = [run(erg.samplers.SGLD(g, 0.02), probes=False).posterior["position"].values for g in (alone, spread)]
        np.testing.assert_allclose(draws[1], draws[0], rtol=1e-6, atol=1e-9)


def check_one_collective_a_gradient():
    _, spread = gradients("blocks")
    sampler, params = erg.samplers.SGLD(spread, 0.02), jnp.zeros((3, 3))
    keys = jax.random.split(KEY, 3)
    state = jax.vmap(sampler.init)(keys, params)
    step = jax.jit(lambda sampler, keys, state: jax.vmap(sampler.step)(keys, state))
    assert collectives(step.lower(sampler, keys, state).compile().as_text()) == 1


def check_no_device_holds_all_the_data():
    _, spread = gradients("blocks")
    rows = spread.shares.data[0]
    assert rows.shape[:2] == (4, 4)
    assert {shard.data.shape for shard in rows.addressable_shards} == {(4, 1, 2, 3)}
    assert not any(leaf.shape[:1] == (31,) for leaf in jax.tree.leaves(spread))


def check_a_mutant_that_forgets_a_device_is_seen():
    alone, spread = gradients("full")
    weight = spread.shares.weight.at[:, 3].set(0.0)
    mutant = jax.tree.map(lambda x: x, spread)
    object.__setattr__(mutant, "shares", spread.shares._replace(weight=weight))
    params = jnp.array([0.3, -0.5, 1.0])
    a, _ = alone.estimate(KEY, params, alone.init(KEY, params))
    b, _ = mutant.estimate(KEY, params, mutant.init(KEY, params))
    assert np.max(np.abs(a.gradient - b.gradient)) > 1e-2 * np.max(np.abs(a.gradient))


CHECKS = [name for name in list(globals()) if name.startswith("check_")]


def main():
    assert jax.device_count() == 4
    for name in CHECKS:
        try:
            globals()[name]()
        except Exception:
            print(f"FAILED {name}\n{traceback.format_exc()}", file=sys.stderr)
        else:
            print(name)


if __name__ == "__main__":
    main()
