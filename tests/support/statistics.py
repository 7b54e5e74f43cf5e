"""Statistical assertions with a stated power."""

import numpy as np

LIMIT = 5.0
"""In standard errors: a false alarm about once in two million tests."""


def z_scores(replicates, exact):
    """(mean - exact) / standard error, for independent replicates along the leading axis."""
    replicates = np.asarray(replicates, float)
    error = replicates.std(0, ddof=1) / np.sqrt(len(replicates))
    return (replicates.mean(0) - np.asarray(exact, float)) / error, error


def assert_mean_close(replicates, exact, *, detects):
    """Fail where a mean is off by more than five standard errors, or where the test could not see ``detects`` of the value.

    Parameters
    ----------
    replicates : array (num_replicates, ...)
        Independent along the leading axis.
    exact : array
        What their mean should be.
    detects : float
        The relative error that the test must be able to see: five standard errors, over the exact value.
    """
    z, error = z_scores(replicates, exact)
    smallest = LIMIT * error / np.abs(np.asarray(exact, float))
    assert np.all(smallest <= detects), f"can only see relative errors above {smallest.max():.3g}"
    assert np.all(np.abs(z) < LIMIT), f"z = {z}, means {np.mean(replicates, 0)} against {exact}"
