"""Control variates from Stein's identity, around gradient estimators."""

from ergodica.estimators.stein.control import SteinControl

__all__ = ["SteinControl"]
