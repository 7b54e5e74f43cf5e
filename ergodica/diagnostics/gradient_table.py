"""The result of `ergodica.compare_gradients`: a dataset, a table and a figure."""

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_statistics import BiasTest, Moments, Target
    from ergodica.diagnostics.timing import Times


class GradientComparison(xr.Dataset):
    """An `xarray.Dataset` of a comparison, with a table and a figure (see `ergodica.compare_gradients`)."""

    __slots__ = ()

    @property
    def summary(self) -> pd.DataFrame:
        """One row for each point and estimator.

        ``relative_work`` is the work-normalised variance (variance times datum gradients) over that of the first estimator.
        Print it whole by ``print(table.summary.to_string())``.
        """
        work = self["work_variance"]
        table = self[
            ["verdict", "bias_bound", "variance", "variance_lower", "variance_upper", "datum_gradients"]
        ].assign(relative_work=work / work.isel(estimator=0))
        if "time_ratio" in self:
            table = table.assign(time_ratio=self["time_ratio"])
        frame = table.to_dataframe(dim_order=["point", "estimator"])
        numbers = frame.select_dtypes("number").columns
        frame[numbers] = frame[numbers].map(lambda x: float(f"{x:.3g}"))
        return frame

    def plot(self) -> Any:
        """Draw variance times cost with its interval, and the largest z of the bias, by estimator and point.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 1.6 + 0.45 * self.sizes["estimator"]), layout="constrained")
        work_axes, bias_axes = figure.subplots(1, 2, sharey=True)
        rows = np.arange(self.sizes["estimator"])
        for j in range(self.sizes["point"]):
            height = rows + 0.12 * (j - (self.sizes["point"] - 1) / 2)
            at_point = self.isel(point=j)
            _draw_work(work_axes, at_point, height, label=self._point_name(j))
            bias_axes.plot(abs(at_point["z"]).max("coordinate"), height, "o", color=f"C{j}")
        work_axes.set(xscale="log", xlabel=f"variance × {self._cost_name}")
        work_axes.set_yticks(rows, list(self["estimator"].values))
        work_axes.invert_yaxis()
        limit = self.attrs["critical_z"]
        bias_axes.axvline(limit, color="0.5", linestyle="--")
        bias_axes.set(xscale="symlog", xlim=(0, None), xlabel=f"largest |z| of the bias (dashed: limit {limit:.1f})")
        if self.sizes["point"] > 1:
            work_axes.legend(fontsize="small")
        return figure

    def _point_name(self, j: int) -> str:
        """Name of a point: its label, where labels were assigned by ``assign_coords(point=[...])``."""
        label = self["point"].values[j]
        return str(label) if isinstance(label, str) else f"point {label}"

    @property
    def _cost_name(self) -> str:
        return "datum gradients" if bool(self["datum_gradients"].notnull().all()) else "cost (uncounted: 1)"


def _draw_work(axes: Any, at_point: xr.Dataset, height: np.ndarray, label: str) -> None:
    """Draw variance times cost with its interval; an estimator without noise is named instead, at the margin."""
    cost = at_point["datum_gradients"].fillna(1.0)
    middle, lower, upper = ((at_point[name] * cost).values for name in ("variance", "variance_lower", "variance_upper"))
    noisy = middle > float(at_point["rounding_variance"])
    axes.errorbar(
        middle[noisy],
        height[noisy],
        xerr=[(middle - lower)[noisy], (upper - middle)[noisy]],
        fmt="o",
        capsize=3,
        label=label,
    )
    for y in height[~noisy]:
        axes.annotate("no noise", (0.01, y), xycoords=("axes fraction", "data"), va="center", fontsize="small")


def assemble(
    moments: "dict[str, list[Moments]]",
    tests: "dict[str, list[BiasTest]]",
    targets: "list[Target]",
    times: "Times | None",
    coordinates: list[str],
    attrs: dict[str, Any],
) -> GradientComparison:
    """Put the figures of all estimators and points into one dataset."""
    from scipy.stats import norm

    by_point, by_coordinate = ("estimator", "point"), ("estimator", "point", "coordinate")

    def table(rows: dict[str, list], field: str) -> np.ndarray:
        return np.array([[getattr(entry, field) for entry in row] for row in rows.values()])

    variance, cost = table(moments, "variance"), table(moments, "cost")
    data: dict[str, Any] = {name: (by_coordinate, table(tests, name)) for name in ("bias", "standard_error", "z")}
    data |= {name: (by_point, table(tests, name)) for name in ("bias_bound", "verdict")}
    data |= {
        "p_value": (by_point, np.minimum(1.0, attrs["num_tests"] * table(tests, "p_value"))),
        "variance": (by_point, variance),
        "variance_lower": (by_point, table(moments, "lower")),
        "variance_upper": (by_point, table(moments, "upper")),
        "datum_gradients": (by_point, cost),
        "work_variance": (by_point, variance * cost),
        "repeats": (by_point, table(moments, "num_repeats")),
        "reference": (("point", "coordinate"), np.array([target.gradient for target in targets])),
        "rounding_variance": ("point", np.array([np.sum(target.rounding**2) for target in targets])),
    }
    if times is not None:
        data |= {
            "seconds": ("estimator", times.seconds),
            "time_ratio": ("estimator", times.ratio),
            "time_ratio_lower": ("estimator", times.ratio_lower),
            "time_ratio_upper": ("estimator", times.ratio_upper),
            "time_variance": (by_point, variance * times.seconds[:, None]),
        }
    limit = float(norm.isf((1 - attrs["confidence"]) / (2 * attrs["num_tests"])))
    coords = {"estimator": list(moments), "point": np.arange(len(targets)), "coordinate": coordinates}
    return GradientComparison(data, coords=coords, attrs=attrs | {"critical_z": limit})
