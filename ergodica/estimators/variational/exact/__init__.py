"""Exact gradients of objectives, by enumeration and quadrature."""
