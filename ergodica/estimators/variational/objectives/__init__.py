"""Objectives over a model and a guide, for `numpyro.infer.SVI`."""
