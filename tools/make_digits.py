"""Make ergodica/models/zoo/data/digits.npz from the file digits.csv.gz of scikit-learn.

    python tools/make_digits.py PATH/TO/sklearn/datasets/data/digits.csv.gz

The values, whole numbers, are kept as they are, in one byte each.
"""

import gzip
import hashlib
import pathlib
import sys

import numpy as np

SHA256 = "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22"
TARGET = pathlib.Path(__file__).resolve().parent.parent / "ergodica/models/zoo/data/digits.npz"


def main(source: pathlib.Path) -> None:
    """Convert, and say what was written."""
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{source} is not the file that was converted (its SHA-256 differs).")
    table = np.loadtxt(gzip.decompress(content).decode().splitlines(), delimiter=",").astype(np.uint8)
    np.savez_compressed(TARGET, pixels=table[:, :-1], digit=table[:, -1])
    print(f"{TARGET.name}: {len(table)} rows of 64 pixels and a digit, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
