"""Make ergodica/models/zoo/data/doctor_visits.npz from the file randhie.csv of statsmodels.

    python tools/make_doctor_visits.py PATH/TO/statsmodels/datasets/randhie/randhie.csv

The values are kept as they are: whole numbers in the smallest integer type, the others as float32.
"""

import hashlib
import pathlib
import sys

import numpy as np

SHA256 = "9f6c87d05aef087a82cc4465310c8cd3f38327be6eafa43bd81fb98c4f3d088c"
TARGET = pathlib.Path(__file__).resolve().parent.parent / "ergodica/models/zoo/data/doctor_visits.npz"


def compact(column: np.ndarray) -> np.ndarray:
    """Store whole numbers below 256 in one byte each."""
    if np.all(column == np.round(column)) and column.min() >= 0 and column.max() < 256:
        return column.astype(np.uint8)
    return column.astype(np.float32)


def main(source: pathlib.Path) -> None:
    """Convert, and say what was written."""
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{source} is not the file that was converted (its SHA-256 differs).")
    table = np.genfromtxt(source, delimiter=",", names=True)
    columns = {name: compact(table[name]) for name in table.dtype.names}
    np.savez_compressed(TARGET, **columns)
    print(f"{TARGET.name}: {len(table)} rows, {', '.join(columns)}, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
