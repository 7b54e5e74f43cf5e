"""Make the data of three hospitals, each in a file of its own: ``python make_data.py FOLDER``."""

import pathlib
import sys

import numpy as np

folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(1)
for name, size, centre in (("north", 300, -0.5), ("south", 800, 0.3), ("west", 500, 0.6)):
    X = np.column_stack([np.ones(size), rng.normal(centre, 1, size), rng.normal(size=size)])
    y = rng.random(size) < 1 / (1 + np.exp(-X @ [-0.5, 1.0, -0.7]))
    np.savez(folder / f"{name}.npz", X=X.astype(np.float32), y=y.astype(np.float32))
