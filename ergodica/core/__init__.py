"""The contracts that everything composes with: posterior, gradient estimator, kernel."""
