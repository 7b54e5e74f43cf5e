"""The app of a site: reads the rows that its SuperNode was told of, which never leave it."""

import numpy as np

from ergodica.integrations.flower import client_app
from regression.study import study


def load(context):
    with np.load(context.node_config["data"]) as file:
        return {"X": file["X"], "y": file["y"]}


app = client_app(study, load)
