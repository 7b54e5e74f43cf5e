"""A run that is killed half-way and called again gives the draws of a run that was never interrupted."""

import json
import pathlib
import subprocess
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

import ergodica as erg


def run(checkpoint=None):
    """About a million steps of a small target, saved every fifth of a second."""
    posterior = erg.Posterior(lambda theta: -0.5 * jnp.sum(theta**2), initial=jnp.zeros(5))
    gradient = erg.estimators.Minibatch(posterior, scheme="full")
    sampler = erg.samplers.BAOAB(gradient, step_size=0.5)
    if checkpoint is not None:
        checkpoint = erg.Checkpoint(checkpoint, every=0.2)
    return erg.sample(jax.random.key(0), sampler, num_samples=2000, thin=500, checkpoint=checkpoint)


def draws_saved(manifest):
    return json.loads(manifest.read_text())["progress"]["stored"] if manifest.exists() else 0


def main():
    with tempfile.TemporaryDirectory() as folder:
        manifest = pathlib.Path(folder) / "run" / "manifest.json"
        process = subprocess.Popen([sys.executable, __file__, str(manifest.parent)])
        while process.poll() is None and draws_saved(manifest) < 100:
            time.sleep(0.02)
        process.kill()
        print("killed" if process.wait() != 0 else "had ended before it could be killed")
        resumed = run(manifest.parent)
    unbroken = run()
    print(f"resumed from {resumed.attrs['resumed_from']} of {resumed.posterior.sizes['draw']} draws a chain")
    same = np.array_equal(resumed.posterior["position"], unbroken.posterior["position"])
    print("the draws are", "the same" if same else "NOT the same")
    sys.exit(not same)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run(sys.argv[1])
    else:
        main()
