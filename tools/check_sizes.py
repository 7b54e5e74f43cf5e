"""Fail where a file of the package is longer than 500 lines: it wants to be two."""

import pathlib
import sys

LIMIT = 500
long = [
    f"{path}: {count} lines"
    for path in sorted(pathlib.Path("ergodica").rglob("*.py"))
    if (count := len(path.read_text().splitlines())) > LIMIT
]
sys.exit("\n".join(long) or 0)
