"""The owners' side."""

from ergodica.integrations.flower import client_app
from tests.integrations.federated_study import rows, study


def of(context):
    config = context.run_config
    return study(
        num_visits=config["visits"], local_steps=config["local-steps"], stride=20, patience=config["patience"], seed=21
    )


app = client_app(of, lambda context: rows(context.node_config["name"]))
