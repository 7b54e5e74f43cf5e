"""Streamed runs: batch i at step i, epochs that stay unbiased, and nothing of how they were read in the draws."""

import functools
import itertools

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray

import ergodica as erg
from ergodica.core.types import Batch
from ergodica.run import RowBlocks, feed, stream
from ergodica.run.checkpoint import CheckpointError
from ergodica.run.feed import Feed

KEY = jax.random.key(7)
NUM_DATA, BATCH_SIZE = 23, 5
Y = np.random.default_rng(0).normal(1.0, 1.0, NUM_DATA).astype(np.float32)


def posterior(data=None):
    return erg.Posterior(
        lambda theta: -0.5 * jnp.sum(theta**2),
        lambda theta, y: -0.5 * (y - theta[0]) ** 2 - 0.1 * theta[1] ** 2,
        data,
        num_data=NUM_DATA,
        initial=jnp.zeros(2),
    )


def sampler(target=None):
    return erg.samplers.BAOAB(erg.estimators.Minibatch(target or posterior(), BATCH_SIZE), 0.05, 1.0)


def run(batches=None, **options):
    arguments = {"num_samples": 30, "num_warmup": 20, "num_chains": 3, "thin": 2, "progress": False}
    kernel = options.pop("kernel", None) or sampler()
    return stream(KEY, kernel, RowBlocks(Y, BATCH_SIZE) if batches is None else batches, **arguments | options)


def draws(dt):
    return dt.posterior["position"].values


def test_equals_a_plain_loop():
    """Step i uses batch i and fold_in(key, i); the init sees batch 0."""
    kernel, batches = sampler(), list(itertools.islice(RowBlocks(Y, BATCH_SIZE)(0), 80))
    batches = [Batch(jnp.asarray(b.data), jnp.asarray(b.weight, jnp.float32)) for b in batches]
    _, key_init, key_run, *_ = jax.random.split(KEY, 5)
    init_keys, run_keys = jax.random.split(key_init, 3), jax.random.split(key_run, 3)
    step = jax.jit(lambda kernel, key, state, batch: kernel.step(key, state, batch)[0])
    dt = run()
    for chain in range(3):
        state, kept = kernel.init(init_keys[chain], jnp.zeros(2), batches[0]), []
        for i in range(80):
            state = step(kernel, jax.random.fold_in(run_keys[chain], i), state, batches[i])
            if i >= 20 and i % 2 == 1:
                kept.append(np.asarray(state.position))
        np.testing.assert_allclose(draws(dt)[chain], kept, rtol=2e-5, atol=1e-6)


def test_all_data_at_each_step_is_the_full_gradient():
    full = erg.samplers.BAOAB(erg.estimators.Minibatch(posterior(Y), scheme="full"), 0.05, 1.0)
    held = erg.sample(KEY, full, 30, 20, 3, thin=2, progress=False)
    np.testing.assert_allclose(draws(run([Y])), draws(held), rtol=1e-4, atol=1e-5)


class TestEpochs:
    def weight_by_row(self, batches):
        """How much each row weighs in the mean over an epoch."""
        total = np.zeros(NUM_DATA)
        for batch in batches:
            np.add.at(total, batch.data, batch.weight)
        return total / len(batches)

    @pytest.mark.parametrize("batch_size", [1, 4, 5, 12, NUM_DATA])
    def test_blocks_average_to_all_the_data(self, batch_size):
        blocks = RowBlocks(np.arange(NUM_DATA), batch_size)
        for epoch in range(2):
            start = epoch * blocks.batches_per_epoch
            batches = list(itertools.islice(blocks(start), blocks.batches_per_epoch))
            np.testing.assert_allclose(self.weight_by_row(batches), 1 / NUM_DATA, rtol=1e-12)
            assert len({batch.weight.shape for batch in batches}) == 1

    def short_last(self, start_step=0):
        rows = np.arange(NUM_DATA)
        return (rows[i : i + BATCH_SIZE] for i in range(start_step % 5 * BATCH_SIZE, NUM_DATA, BATCH_SIZE))

    def test_short_last_batch(self):
        source = Feed(self.short_last, NUM_DATA, batches_per_epoch=5)
        _, stack = source.take(0, 5)
        batches = [jax.tree.map(lambda x, i=i: x[i], stack) for i in range(5)]
        np.testing.assert_allclose(self.weight_by_row(batches), 1 / NUM_DATA, rtol=1e-6)

    def test_mutant_weights_are_rejected(self):
        """One over the length of each batch counts the rows of the short one too much."""
        batches = [Batch(rows, np.full(len(rows), 1 / len(rows))) for rows in self.short_last()]
        assert np.max(np.abs(self.weight_by_row(batches) * NUM_DATA - 1)) > 0.1

    def test_short_batch_without_a_weight_is_refused(self):
        with pytest.raises(ValueError, match=r"A batch of 3 rows came after one of 5.*batches_per_epoch="):
            run(lambda step: (Y[rows] for rows in self.short_last(step)))

    def test_orders(self):
        def order(blocks, epoch):
            return [int(b.data[0]) for b in itertools.islice(blocks(8 * epoch), 8)]

        blocks = RowBlocks(np.arange(32), 4)
        orders = [order(blocks, epoch) for epoch in range(4)]
        assert all(sorted(o) == list(range(0, 32, 4)) for o in orders)
        assert len(set(map(tuple, orders))) == 4
        assert orders != [order(RowBlocks(np.arange(32), 4, jax.random.key(1)), epoch) for epoch in range(4)]

    @pytest.mark.parametrize("step", [1, 5, 12])
    def test_reads_on_from_any_step(self, step):
        blocks = RowBlocks(Y, BATCH_SIZE)
        expected = next(itertools.islice(blocks(0), step, None))
        jax.tree.map(np.testing.assert_array_equal, next(blocks(step)), expected)


@pytest.mark.parametrize("num_bytes", [1, 200, 1000])
def test_how_much_is_read_at_a_time_does_not_show(monkeypatch, num_bytes):
    whole = run()
    monkeypatch.setattr(feed, "_FEED_BYTES", num_bytes)
    np.testing.assert_array_equal(draws(run()), draws(whole))


class TestSources:
    def test_memory_map(self, tmp_path):
        np.save(tmp_path / "y.npy", Y)
        mapped = np.load(tmp_path / "y.npy", mmap_mode="r")
        np.testing.assert_array_equal(draws(run(RowBlocks(mapped, BATCH_SIZE))), draws(run()))

    def test_hdf5(self, tmp_path):
        with h5py.File(tmp_path / "y.h5", "w") as file:
            file["y"] = Y
            np.testing.assert_array_equal(draws(run(RowBlocks(file["y"], BATCH_SIZE))), draws(run()))

    def test_xarray_that_is_not_loaded(self, tmp_path):
        xarray.Dataset({"y": ("row", Y)}).to_netcdf(tmp_path / "y.nc", engine="h5netcdf")
        with xarray.open_dataset(tmp_path / "y.nc", engine="h5netcdf") as dataset:
            np.testing.assert_array_equal(draws(run(RowBlocks(dataset["y"], BATCH_SIZE))), draws(run()))

    def test_zarr_through_xarray(self, tmp_path):
        pytest.importorskip("zarr")
        xarray.Dataset({"y": ("row", Y)}).to_zarr(tmp_path / "y.zarr", consolidated=False)
        lazy = xarray.open_zarr(tmp_path / "y.zarr", chunks=None, consolidated=False)["y"]
        np.testing.assert_array_equal(draws(run(RowBlocks(lazy, BATCH_SIZE))), draws(run()))

    def test_an_iterable_begins_anew(self):
        rows = [Y[:5], Y[5:10], Y[10:15]]
        np.testing.assert_array_equal(draws(run(rows)), draws(run(iter(rows * 100))))

    def test_an_iterator_that_ends(self):
        with pytest.warns(UserWarning, match="ended before step 50"):
            dt = run(iter([Y[:5]] * 50))
        assert dt.attrs["result"] == "interrupted"
        np.testing.assert_array_equal(draws(dt), draws(run([Y[:5]]))[:, :15])


class TestResume:
    def at(self, start_step, data=Y):
        return (data[5 * (i % 4) : 5 * (i % 4) + 5] for i in itertools.count(start_step))

    @pytest.mark.parametrize(
        "make", [lambda self: RowBlocks(Y, BATCH_SIZE), lambda self: self.at], ids=["blocks", "function"]
    )
    def test_bit_identical(self, make, tmp_path):
        run(make(self), num_samples=11, checkpoint=tmp_path / "run")
        resumed = run(make(self), checkpoint=tmp_path / "run")
        assert resumed.attrs["resumed_from"] == 11
        np.testing.assert_array_equal(draws(resumed), draws(run(make(self))))

    def test_a_source_that_ignores_the_step_would_be_seen(self, tmp_path):
        """Mutant of the source: resumes from its start."""
        run(lambda step: self.at(0), num_samples=11, checkpoint=tmp_path / "run")
        resumed = run(lambda step: self.at(0), checkpoint=tmp_path / "run")
        assert not np.array_equal(draws(resumed), draws(run(self.at)))

    @pytest.mark.parametrize(
        "other", [RowBlocks(Y + 1, BATCH_SIZE), RowBlocks(Y, BATCH_SIZE, jax.random.key(1)), RowBlocks(Y, 4)]
    )
    def test_other_batches_are_refused(self, other, tmp_path):
        run(num_samples=11, checkpoint=tmp_path / "run")
        with pytest.raises(CheckpointError, match="batches differ"):
            run(other, checkpoint=tmp_path / "run")

    @pytest.mark.parametrize("batches", [[Y[:5]], iter([Y[:5]])], ids=["list", "iterator"])
    def test_needs_batches_that_can_be_read_from_the_middle(self, batches, tmp_path):
        with pytest.raises(ValueError, match="A checkpoint needs batches that can be read from any step"):
            run(batches, checkpoint=tmp_path / "run")


def test_without_data_at_hand_there_is_nothing_to_probe():
    dt = run()
    assert "probe" not in dt.children
    assert "observed_data" not in dt.children
    assert erg.diagnose(dt)["temperature"].status == "not run"
    assert dt.attrs["num_data"] == NUM_DATA


def test_probes_where_the_posterior_holds_its_data():
    dt = run(kernel=sampler(posterior(jnp.asarray(Y))))
    assert {"t_conf", "grad_noise"} <= set(dt.sample_stats.data_vars)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: run([]), ValueError, "at least one batch"),
        (lambda: run(3), TypeError, "batches must be an iterable"),
        (lambda: run([Y[:5], Y[:6]]), ValueError, "it is not known what its rows stand for"),
        (
            lambda: run([Y[:5], Y[:6]], batches_per_epoch=2),
            ValueError,
            "longer than the first, of 5 rows; got one of 6",
        ),
        (lambda: run([Batch(Y[:5], np.ones(4))]), ValueError, r"must have the shape \(5,\); got \(4,\)"),
        (lambda: run(batches_per_epoch=0), ValueError, "batches_per_epoch must be between 1 and 23"),
        (lambda: run(RowBlocks(Y[:-1], 5)), ValueError, "have 22 rows, and the posterior num_data=23"),
        (lambda: RowBlocks(Y, 24), ValueError, "batch_size must be between 1 and 23"),
        (lambda: RowBlocks({"a": Y, "b": Y[:-1]}, 4), ValueError, "the same length"),
        (lambda: RowBlocks(Y, 4, key=3), TypeError, "typed key"),
        (lambda: stream(KEY, "SGLD", [Y]), TypeError, "sampler must be an AbstractKernel"),
        (
            lambda: run(kernel=erg.samplers.SGLD(erg.estimators.Minibatch(flat(), scheme="full"), 0.1)),
            ValueError,
            "no posterior with data to stream",
        ),
        (lambda: run(num_samples=0), ValueError, "num_samples must be at least 1"),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error, match=words):
        call()


@functools.cache
def flat():
    return erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), initial=jnp.zeros(2))
