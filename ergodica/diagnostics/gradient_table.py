"""The result of `ergodica.compare_gradients`: a dataset, a table, sentences and a figure."""

import pathlib
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

if TYPE_CHECKING:
    from ergodica.diagnostics.gradient_replicates import Parts
    from ergodica.diagnostics.gradient_settings import Settings
    from ergodica.diagnostics.gradients import Taken
    from ergodica.diagnostics.timing import Times

SUMMARY = ("verdict", "bias_bound", "relative_bias", "control", "variance", "variance_lower", "variance_upper")


class GradientComparison(xr.Dataset):
    """An `xarray.Dataset` of a comparison, with a table and a figure (see `ergodica.compare_gradients`).

    Notes
    -----
    By ``estimator`` and ``point``, and those marked † by ``coordinate`` too:

    - ``bias`` †, ``standard_error`` †, ``z`` † (corrected for skewness), ``p_adjusted`` † and ``p_joint`` (Holm's); ``p_value``,
      the smallest of them;
    - ``bias_bound``: with the given confidence no coordinate's bias is larger, as a fraction of the largest entry of
      the reference. A bias up to it would have gone unseen;
    - ``verdict``: ``"biased"``, ``"unbiased"`` (``bias_bound`` within ``bias_tolerance``, or nothing but rounding), or
      ``"undecided"``;
    - ``control``: whether the same repeats, shrunk by half of ``bias_tolerance``, were ``"found"`` or ``"missed"`` (``"none"``
      for the reference itself); ``detectable``: the shrinkage that is found with probability 95%;
    - ``relative_bias``, the norm of the bias (debiased) over that of the reference, with ``_lower`` and ``_upper``, which
      hold for all estimators and points together; ``cosine`` of
      the mean and the reference; ``mse``, squared bias plus variance of one call;
    - ``variance``, summed over the coordinates, with ``variance_lower`` and ``variance_upper``; ``variance_by_coordinate`` †;
      ``variance_ratio`` to the first estimator, with its ends (paired bootstrap); ``kurtosis``; ``trustworthy``, whether the
      interval is, and ``repeats_for_variance`` that would bring its standard error to 5%;
    - ``snr`` †, absolute value of the reference over the standard deviation of one call; ``snr_median``;
    - ``repeats`` taken, ``repeats_needed`` by the pilot's judgement;
    - ``datum_gradients`` of a call, ``value_evaluations`` and ``derivative_evaluations``; ``seconds``, and ``time_ratio`` to the
      first estimator with its range (by estimator);
    - ``work_variance``, ``value_variance``, ``derivative_variance``, ``time_variance``: the variance times each of these, what one
      gradient, value, derivative or second buys. The smaller the better; NaN where none is needed;
    - ``variance_data`` and ``variance_sampling`` with their ends, if asked for.

    By ``point``: ``reference`` †, and ``rounding_variance``: a variance below it is rounding, not noise.
    """

    __slots__ = ()

    @classmethod
    def open(cls, path: str | pathlib.Path) -> "GradientComparison":
        """Read what ``to_netcdf`` has written."""
        with xr.open_dataset(path) as stored:
            loaded = stored.load()
        return cls(loaded.data_vars, coords=loaded.coords, attrs=loaded.attrs)

    @property
    def summary(self) -> pd.DataFrame:
        """One row for each point and estimator.

        ``relative_work`` is the work-normalised variance (variance times datum gradients) over that of the first estimator.
        Print it whole by ``print(table.summary.to_string())``.
        """
        work = self["work_variance"]
        table = self[[*SUMMARY, "datum_gradients"]].assign(relative_work=work / work.isel(estimator=0))
        if "time_ratio" in self:
            table = table.assign(time_ratio=self["time_ratio"])
        frame = table.to_dataframe(dim_order=["point", "estimator"])
        numbers = frame.select_dtypes("number").columns
        frame[numbers] = frame[numbers].map(lambda x: float(f"{x:.3g}"))
        return frame

    @property
    def notes(self) -> list[str]:
        """What a reader must know beside the figures: caps that were met, intervals not to be trusted, biases that hid."""
        from ergodica.diagnostics.gradient_notes import notes_of

        return notes_of(self)

    def to_markdown(self) -> str:
        """A table for each point, and the notes, as Markdown."""
        from ergodica.diagnostics.gradient_notes import markdown_of

        return markdown_of(self)

    def plot(self) -> Any:
        """Draw variance times cost, and the bias as a fraction of the gradient, each with its interval, by estimator and point.

        Returns
        -------
        matplotlib.figure.Figure
        """
        from ergodica.diagnostics.gradient_plot import draw

        return draw(self)

    def point_name(self, j: int) -> str:
        """Name of a point: its label, where labels were assigned by ``assign_coords(point=[...])``."""
        label = self["point"].values[j]
        return str(label) if isinstance(label, str) else f"point {label}"


def assemble(
    taken: "list[Taken]",
    labels: list,
    coordinates: list[str],
    settings: "Settings",
    times: "Times | None",
    parts: "dict[str, list[Parts]] | None",
    evaluations: dict[str, tuple[float, float]],
    attrs: dict[str, Any],
) -> GradientComparison:
    """Put the figures of all estimators and points into one dataset."""
    from ergodica.diagnostics.gradient_judgement import judge, measure

    by_point, by_coordinate = ("estimator", "point"), ("estimator", "point", "coordinate")
    names = list(taken[0].replicates)
    judged, counts = judge(taken, settings)
    measured = measure(taken, settings)
    shape = {1: "point", 2: by_point, 3: by_coordinate}
    data: dict[str, Any] = {name: (shape[x.ndim], x) for name, x in (judged | measured).items()}
    cost = measured["datum_gradients"]
    values, derivatives = np.array([evaluations[name] for name in names], float).T[..., None]
    costs = {"work": cost, "value": values * cost, "derivative": derivatives * cost}
    data |= {f"{kind}_evaluations": (by_point, costs[kind]) for kind in ("value", "derivative")}
    data |= {
        f"{kind}_variance": (by_point, np.where(x > 0, measured["variance"] * x, np.nan)) for kind, x in costs.items()
    }
    data["reference"] = (("point", "coordinate"), np.array([cell.target.gradient for cell in taken]))
    if times is not None:
        data |= {
            "seconds": ("estimator", times.seconds),
            "time_ratio": ("estimator", times.ratio),
            "time_ratio_lower": ("estimator", times.ratio_lower),
            "time_ratio_upper": ("estimator", times.ratio_upper),
            "time_variance": (by_point, measured["variance"] * times.seconds[:, None]),
        }
    if parts is not None:
        fields = next(iter(parts.values()))[0]._fields
        data |= {
            "variance_" + field: (by_point, np.array([[getattr(p, field) for p in parts[name]] for name in names]))
            for field in fields
        }
    coords = {"estimator": names, "point": labels, "coordinate": coordinates}
    attrs = attrs | counts | {"confidence": settings.confidence, "bias_tolerance": settings.bias_tolerance}
    return GradientComparison(data, coords=coords, attrs=attrs)
