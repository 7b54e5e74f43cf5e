"""Make ergodica/models/zoo/data/auto_mpg.npz from the file cars.json of vega_datasets.

    python tools/make_auto_mpg.py PATH/TO/vega_datasets/_data/cars.json

Rows in which the consumption or the power is missing are left out; the other values are kept as they are.
"""

import hashlib
import json
import pathlib
import sys

import numpy as np

SHA256 = "f686a53678b21f4231e2f6a5ba7ce5761d9d39204fccdea1caa29fb8c460e319"
TARGET = pathlib.Path(__file__).resolve().parent.parent / "ergodica/models/zoo/data/auto_mpg.npz"
NUMBERS = {
    "mpg": "Miles_per_Gallon",
    "cylinders": "Cylinders",
    "displacement": "Displacement",
    "horsepower": "Horsepower",
    "weight": "Weight_in_lbs",
    "acceleration": "Acceleration",
}


def main(source: pathlib.Path) -> None:
    """Convert, and say what was written."""
    content = source.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{source} is not the file that was converted (its SHA-256 differs).")
    rows = [row for row in json.loads(content) if None not in row.values()]
    columns = {name: np.array([row[key] for row in rows], np.float32) for name, key in NUMBERS.items()}
    columns["year"] = np.array([int(row["Year"][:4]) for row in rows], np.int16)
    columns["origin"] = np.array([("USA", "Europe", "Japan").index(row["Origin"]) for row in rows], np.uint8)
    np.savez_compressed(TARGET, **columns)
    print(f"{TARGET.name}: {len(rows)} rows, {', '.join(columns)}, {TARGET.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
