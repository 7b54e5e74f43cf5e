"""The server's side, with a grid that writes down the records of every message."""

import json
import logging
import time

from flwr.serverapp import ServerApp

from ergodica.integrations.flower.grid import GridTransport
from ergodica.integrations.flower.server import run_study
from study_app.client import of

logging.basicConfig(level=logging.INFO)
logging.getLogger("ergodica.rounds").setLevel(logging.INFO)

app = ServerApp()


class Recording:
    """Passes everything on to a grid, and writes the shapes of all arrays and the other values that pass."""

    def __init__(self, grid, path):
        self.grid, self.path = grid, path

    def __getattr__(self, name):
        return getattr(self.grid, name)

    def push_messages(self, messages):
        messages = list(messages)
        for message in messages:
            self.write("out", message)
        return self.grid.push_messages(messages)

    def pull_messages(self, ids):
        found = list(self.grid.pull_messages(ids))
        for message in found:
            self.write("back", message)
        return found

    def write(self, way, message):
        line = {
            "at": time.time(),
            "way": way,
            "type": message.metadata.message_type,
            "arrays": {},
            "configs": {},
            "metrics": [],
        }
        if message.has_content():
            content = message.content
            for name, record in content.array_records.items():
                line["arrays"][name] = [list(array.shape) for array in record.values()]
            line["configs"] = {name: dict(record) for name, record in content.config_records.items()}
            line["metrics"] = list(content.metric_records)
        else:
            line["error"] = message.error.code
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


@app.main()
def main(grid, context):
    config = context.run_config
    spec = of(context)
    transport = GridTransport(Recording(grid, config["record"]), spec)
    run_study(spec, transport, config["journal"], 1500.0).to_netcdf(config["output"], engine="h5netcdf")
