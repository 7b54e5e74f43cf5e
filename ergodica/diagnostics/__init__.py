"""What to believe: checks, temperatures, errors against a reference, predictions, and the report."""

from ergodica.diagnostics.checks import diagnose as diagnose
from ergodica.diagnostics.diagnosis import Check as Check
from ergodica.diagnostics.diagnosis import Diagnosis as Diagnosis
from ergodica.diagnostics.expectation import weighted_mean as weighted_mean
from ergodica.diagnostics.gradients import compare_gradients as compare_gradients
from ergodica.diagnostics.plots import plot_running_temperature as plot_running_temperature
from ergodica.diagnostics.plots import plot_temperature as plot_temperature
from ergodica.diagnostics.predictive import predictive as predictive
from ergodica.diagnostics.reference import reference_table as reference_table
from ergodica.diagnostics.report import report as report

__all__ = [
    "Check",
    "Diagnosis",
    "compare_gradients",
    "diagnose",
    "plot_running_temperature",
    "plot_temperature",
    "predictive",
    "reference_table",
    "report",
    "weighted_mean",
]
