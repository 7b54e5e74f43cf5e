"""What to believe: checks, temperatures, errors against a reference, predictions, and the report."""

from ergodica.diagnostics.calibration import calibration as calibration
from ergodica.diagnostics.checks import diagnose as diagnose
from ergodica.diagnostics.control_variates import control_variate_expectation as control_variate_expectation
from ergodica.diagnostics.diagnosis import Check as Check
from ergodica.diagnostics.diagnosis import Diagnosis as Diagnosis
from ergodica.diagnostics.expectation import weighted_mean as weighted_mean
from ergodica.diagnostics.flow_metrics import FlowMetrics as FlowMetrics
from ergodica.diagnostics.flow_report import FlowReport as FlowReport
from ergodica.diagnostics.flow_report import flow_report as flow_report
from ergodica.diagnostics.function_space import chain_disagreement as chain_disagreement
from ergodica.diagnostics.function_space import function_draws as function_draws
from ergodica.diagnostics.gradient_points import training_points as training_points
from ergodica.diagnostics.gradients import compare_gradients as compare_gradients
from ergodica.diagnostics.guide import GuideCheck as GuideCheck
from ergodica.diagnostics.guide import check_guide as check_guide
from ergodica.diagnostics.held_out import HeldOutSums as HeldOutSums
from ergodica.diagnostics.held_out import combine_held_out as combine_held_out
from ergodica.diagnostics.held_out import held_out_sums as held_out_sums
from ergodica.diagnostics.observables import chain_expectation as chain_expectation
from ergodica.diagnostics.observables import importance_expectation as importance_expectation
from ergodica.diagnostics.plots import plot_running_temperature as plot_running_temperature
from ergodica.diagnostics.plots import plot_temperature as plot_temperature
from ergodica.diagnostics.predictive import crps as crps
from ergodica.diagnostics.predictive import predictive as predictive
from ergodica.diagnostics.reference import reference_table as reference_table
from ergodica.diagnostics.report import report as report
from ergodica.diagnostics.scoring import binomial_interval as binomial_interval
from ergodica.diagnostics.scoring import brier_score as brier_score
from ergodica.diagnostics.scoring import crps_gaussian_mixture as crps_gaussian_mixture
from ergodica.diagnostics.scoring import expected_calibration_error as expected_calibration_error
from ergodica.diagnostics.training_plot import plot_fit as plot_fit

__all__ = [
    "Check",
    "Diagnosis",
    "FlowMetrics",
    "FlowReport",
    "GuideCheck",
    "HeldOutSums",
    "binomial_interval",
    "brier_score",
    "calibration",
    "chain_disagreement",
    "chain_expectation",
    "check_guide",
    "combine_held_out",
    "compare_gradients",
    "control_variate_expectation",
    "crps",
    "crps_gaussian_mixture",
    "diagnose",
    "expected_calibration_error",
    "flow_report",
    "function_draws",
    "held_out_sums",
    "importance_expectation",
    "plot_fit",
    "plot_running_temperature",
    "plot_temperature",
    "predictive",
    "reference_table",
    "report",
    "training_points",
    "weighted_mean",
]
