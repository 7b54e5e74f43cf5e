"""Consumption of cars: real data for a small nonlinear regression."""

import importlib.resources

import numpy as np

from ergodica.models.zoo.doctor_visits import RegressionData

_DATA = "data/auto_mpg.npz"
_NUMBERS = ("cylinders", "displacement", "horsepower", "weight", "acceleration", "year")


def auto_mpg() -> RegressionData:
    """Load the consumption of 392 cars of the years 1970 to 1982.

    ``y`` is in miles per gallon; ``x`` holds six properties of the car, and whether it was made in Europe or in Japan (the others
    in the USA), in eight standardised columns. Consumption goes with one over the weight and the power, so that a linear
    regression leaves curvature behind.

    Returns
    -------
    RegressionData

    References
    ----------
    Ramos and Donoho (1982); Quinlan (1993), Combining Instance-Based and Model-Based Learning, ICML. CC BY 4.0
    (``ergodica/models/zoo/data/LICENSE-auto_mpg``).

    Examples
    --------
    >>> data = auto_mpg()
    >>> data.x.shape, data.y.shape, data.columns[-3:]
    ((392, 8), (392,), ('year', 'europe', 'japan'))
    """
    with importlib.resources.files("ergodica.models.zoo").joinpath(_DATA).open("rb") as file:
        table = np.load(file)
        columns = [table[name].astype(np.float64) for name in _NUMBERS]
        columns += [(table["origin"] == code).astype(np.float64) for code in (1, 2)]
        consumption = table["mpg"]
    raw = np.stack(columns, axis=1)
    return RegressionData(
        x=((raw - raw.mean(axis=0)) / raw.std(axis=0)).astype(np.float32),
        y=consumption.astype(np.float32),
        columns=(*_NUMBERS, "europe", "japan"),
        description=(
            f"Miles per gallon of {len(raw)} cars, 1970 to 1982 (Ramos and Donoho 1982; UCI Auto MPG, CC BY 4.0), 8 features."
        ),
    )
