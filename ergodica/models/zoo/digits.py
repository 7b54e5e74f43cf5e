"""Small pictures of handwritten digits: real data for a classification."""

import importlib.resources
from typing import NamedTuple

import numpy as np

_DATA = "data/digits.npz"


class ClassificationData(NamedTuple):
    """Data of a classification.

    Attributes
    ----------
    x : float32 array (N, K)
        One row a datum.
    y : int32 array (N,)
        Labels, 0 to ``num_classes - 1``.
    num_classes : int
    description : str
        What the data are, where they are from, and their licence.
    """

    x: np.ndarray
    y: np.ndarray
    num_classes: int
    description: str


def digits() -> ClassificationData:
    """Load 1,797 handwritten digits of 8 x 8 pixels.

    ``x`` holds the 64 pixels row by row, from 0 to 1; ``y`` is the digit. They are by 13 writers, who are not named: a random
    split puts digits of one writer on both sides, and so makes the task easier than digits of new writers would be.

    Returns
    -------
    ClassificationData

    References
    ----------
    Alpaydin and Kaynak (1998), Optical Recognition of Handwritten Digits (test set), UCI Machine Learning Repository; CC BY 4.0
    (``ergodica/models/zoo/data/LICENSE-digits``).

    Examples
    --------
    >>> data = digits()
    >>> data.x.shape, data.y[:5].tolist(), data.num_classes
    ((1797, 64), [0, 1, 2, 3, 4], 10)
    """
    with importlib.resources.files("ergodica.models.zoo").joinpath(_DATA).open("rb") as file:
        table = np.load(file)
        pixels, digit = table["pixels"], table["digit"]
    return ClassificationData(
        x=pixels.astype(np.float32) / np.float32(16),
        y=digit.astype(np.int32),
        num_classes=10,
        description=(
            f"{len(pixels):,} handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, the test set of UCI's Optical "
            "Recognition of Handwritten Digits, CC BY 4.0)."
        ),
    )
