"""Federated sampling over a network, on Flower (``pip install ergodica[flower]``).

`Study` says what is sampled and how; the server makes a ServerApp of it (`server_app`) and each owner of data a ClientApp
(`client_app`). What crosses the wire is listed in `ergodica.integrations.flower.messages`.
"""

from ergodica.integrations.flower.client import client_app as client_app
from ergodica.integrations.flower.server import server_app as server_app
from ergodica.integrations.flower.study import Study as Study

__all__ = ["Study", "client_app", "server_app"]
