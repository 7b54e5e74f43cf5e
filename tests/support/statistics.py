"""Statistical tests with one tiny false-alarm rate, and with their power written down."""

import numpy as np

THRESHOLD = 5.0  # two-sided: 6e-7 a comparison
REJECTION = 8.0  # what a mutant must exceed


def standard_error(replicates):
    """Standard error of the mean over independent replicates (leading axis), from their spread."""
    return np.asarray(replicates, np.float64).std(axis=0, ddof=1) / np.sqrt(len(replicates))


def z_scores(replicates, exact):
    """z of the mean over independent replicates (leading axis) against exact values, entry by entry."""
    return (np.asarray(replicates, np.float64).mean(axis=0) - exact) / standard_error(replicates)


def assert_mean(replicates, exact, *, smallest_error):
    """Assert that the mean over the replicates is what it should be.

    Fails where an error of ``smallest_error`` (relative to the largest exact value) would not be seen at the threshold: a
    test without power must not pass.
    """
    visible = THRESHOLD * np.max(standard_error(replicates)) / np.max(np.abs(exact))
    assert visible <= smallest_error, f"the smallest error that could be seen is {visible:.3g}, not {smallest_error}"
    z = z_scores(replicates, exact)
    assert np.max(np.abs(z)) < THRESHOLD, f"z = {np.round(z, 1)}"
