"""Which cases of a law every change is held against, and which wait for `make sweep`."""

import pytest


def swept(case, *others):
    """A case of a parametrisation that is run by `make sweep` alone: its neighbours test the same law at other settings."""
    return pytest.param(case, *others, marks=pytest.mark.sweep)


def quick(cases, kept):
    """Cases by name, of which those in ``kept`` are run with every change and the others by `make sweep`."""
    return [case if case in kept else swept(case) for case in cases]
