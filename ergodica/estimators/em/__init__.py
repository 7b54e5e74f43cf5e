"""Gradients of marginal likelihoods and posterior expectations, with a Markov chain for the E-step."""

from ergodica.estimators.em.monte_carlo import MonteCarloEM
from ergodica.estimators.em.persistent import PersistentChains

__all__ = ["MonteCarloEM", "PersistentChains"]
