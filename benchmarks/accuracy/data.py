"""The data of the Gaussian problem: plain NumPy, for the interpreters that old packages need as well as for new ones."""

import numpy as np

NUM_DATA, SIZE, BATCH_SIZE = 10_000, 10, 100


def gaussian_rows():
    """Rows (N, D) and the precision (D,) of their mean under a flat prior: 0.5 to 2, the sum over the data."""
    precision = np.geomspace(0.5, 2.0, SIZE)
    rows = np.random.default_rng(3).normal(size=(NUM_DATA, SIZE)) * np.sqrt(NUM_DATA / precision)
    return rows.astype(np.float32), precision
