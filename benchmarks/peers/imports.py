"""Whether SGMCMCJax and jax-sgmc can be imported with the JAX of this interpreter; `old_environment.sh` puts them on its path."""

import importlib
import importlib.metadata
import json
import pathlib

RESULT = pathlib.Path(__file__).parents[1] / "results" / "peers_imports.json"


def error_of(module):
    """Say what importing raises; ``None`` if nothing."""
    try:
        importlib.import_module(module)
    except Exception as error:
        first = str(error).splitlines()[0]
        return f"{type(error).__name__}: {first.split(' (')[0]}"  # without the path of a file
    return None


def main():
    found = {
        name: {"version": importlib.metadata.version(name), "error": error_of(module)}
        for name, module in (("sgmcmcjax", "sgmcmcjax.samplers"), ("jax-sgmc", "jax_sgmc.alias"))
    }
    record = {"jax": importlib.metadata.version("jax"), "packages": found}
    print(json.dumps(record, indent=1))
    RESULT.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
