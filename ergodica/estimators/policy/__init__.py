"""Gradients of what a policy earns: expected reward, best of k, normalised rewards; and how to spread samples over questions."""

from ergodica.estimators.policy.advantages import AbstractAdvantage, BetaNormalised, ExpectedReward, MaxAtK
from ergodica.estimators.policy.allocation import gradient_variance_allocation, optimal_allocation
from ergodica.estimators.policy.gradient import PolicyGradient

__all__ = [
    "AbstractAdvantage",
    "BetaNormalised",
    "ExpectedReward",
    "MaxAtK",
    "PolicyGradient",
    "gradient_variance_allocation",
    "optimal_allocation",
]
