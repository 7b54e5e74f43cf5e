"""The owners' side."""

import pathlib

from ergodica.integrations.flower import client_app
from tests.integrations.federated_study import NAMES, rows, study


def of(context):
    config, keys = context.run_config, {}
    if config["keys"]:
        keys = {name: (pathlib.Path(config["keys"]) / f"{name}.pub").read_text() for name in NAMES}
    return study(
        keys=keys,
        num_visits=config["visits"],
        local_steps=config["local-steps"],
        stride=config["stride"],
        num_chains=config["chains"],
        patience=config["patience"],
        seed=21,
    )


app = client_app(of, lambda context: rows(context.node_config["name"]))
