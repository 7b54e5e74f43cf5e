"""Estimators at one sample site of a guide."""
