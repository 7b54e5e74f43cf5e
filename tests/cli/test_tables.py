"""What the tables of the command line show."""

import jax
import jax.numpy as jnp
from rich.console import Console

import ergodica as erg
from ergodica.cli.compare import print_tables


def test_names_of_estimators_are_shown_as_they_are():
    """In Rich's markup ':100:' is an emoji."""
    posterior = erg.Posterior(
        lambda t: -0.5 * t**2, lambda t, x: -0.5 * (x - t) ** 2, jnp.arange(6.0), initial=jnp.zeros(())
    )
    gradient = erg.estimators.Minibatch(posterior, 2)
    comparison = erg.compare_gradients(
        jax.random.key(0), {"minibatch:100:uniform": gradient}, jnp.zeros(()), num_repeats=50
    )
    console = Console(record=True, width=120)
    print_tables(console, comparison.assign_coords(point=["start"]))
    assert "minibatch:100:uniform" in console.export_text()
