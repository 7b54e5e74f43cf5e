"""Flower for real: a SuperLink and SuperNodes on loopback."""

import json
import pathlib

import numpy as np
import pytest
import xarray

from ergodica.run.journal import _payloads, _unpack
from tests.integrations import flower_network
from tests.integrations.federated_study import NAMES, exact_law
from tests.support.statistics import assert_mean

APP = pathlib.Path(__file__).parent / "flower_app"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]
if (reason := flower_network.why_not()) is not None:
    pytestmark.append(pytest.mark.skip(reason=reason))


def accepted(journal):
    """How many visits a journal that is being written holds."""
    return journal.read_bytes().count(b'"kind": "accept"') if journal.exists() else 0


def visits_of(journal):
    records = [_unpack(payload) for payload, _ in _payloads(journal.read_bytes(), journal)]
    return {e["id"]: arrays for e, arrays in records if e.get("kind") == "accept"}


def test_one_node_and_the_server_are_ended_half_way_and_the_law_is_right(tmp_path):
    """Three SuperNodes; one is killed and started again, then the server's run is stopped and started again.

    No accepted visit is lost, only parameters cross the wire, and mean and variances are those of the exact law of the
    in-process sampler: 18 visits of 100 stored positions see an error of 6% in the mean and of 25% in the variances.
    """
    journal, output, record = (tmp_path / n for n in ("journal", "result.nc", "messages.jsonl"))
    config = {"journal": str(journal), "output": str(output), "record": str(record)}
    with flower_network.Network(tmp_path) as network:
        for name in NAMES:
            network.node(name)
        first = network.run(APP, **config)
        network.wait(lambda: accepted(journal) >= 6, 1200, "6 visits are accepted")
        network.kill("west")
        network.node("west")
        network.wait(lambda: accepted(journal) >= 12, 1200, "12 visits are accepted after the restart of a node")
        network.cli("stop", first, "local")
        before = visits_of(journal)
        network.wait(lambda: _stopped(network, first), 120, "the run is stopped")
        network.run(APP, **config)
        network.wait(output.exists, 1500, "there is a result")
    after = visits_of(journal)
    assert len(after) == 21
    assert list((tmp_path / "compiled").iterdir()), "programs are kept for the next process"
    for id, arrays in before.items():
        for x, y in zip(arrays, after[id], strict=True):
            np.testing.assert_array_equal(x, y)
    with xarray.open_datatree(output, engine="h5netcdf") as dt:
        draws, clients = dt.posterior["position"].values, dt.sample_stats["client_index"].values
        assert json.loads(dt.attrs["left_out"]) == []
    check_moments(draws.reshape(18, 100, 2), clients.reshape(18, 100)[:, 0])
    check_messages([json.loads(line) for line in record.read_text().splitlines()])


def check_moments(by_visit, clients):
    """Mean of all visits, and variances of each relative to the law at its client, which long visits reach."""
    mean, _ = exact_law()
    assert_mean(by_visit.mean(1), mean, smallest_error=0.06)
    variances = np.stack([np.diag(exact_law([client])[1]) for client in clients])
    assert_mean(((by_visit - mean) ** 2).mean(1) / variances, np.ones(2), smallest_error=0.25)


def _stopped(network, run):
    return '"status": "finished' in json.dumps(network.cli("list", "local", "--run-id", run, check=False))


def check_messages(messages):
    """Nothing but positions, surrogate parameters and the numbers of orders; shapes that know nothing of the data's."""
    theta, matrix, count = [2], [2, 2], []
    allowed = {
        ("out", "query.hello"): {},
        ("back", "query.hello"): {},
        ("out", "query.expand"): {"theta": [theta]},
        ("back", "query.expand"): {"expansion": [theta, matrix, matrix]},
        ("out", "train.visit"): {
            "surrogates": [theta, theta, matrix, theta, matrix],
            "state": ([theta], [theta, count]),
        },
        ("back", "train.visit"): {"state": [theta, count], "positions": [[100, 2]]},
    }
    numbers = {"id", "chain", "client", "words", "first_step", "count", "num_steps", "stride", "share"}
    seen = set()
    for message in messages:
        if "error" in message:
            continue
        kind = (message["way"], message["type"])
        seen.add(kind)
        assert message["metrics"] == []
        for name, shapes in message["arrays"].items():
            expected = allowed[kind][name.split(".")[0]]
            assert shapes in expected if isinstance(expected, tuple) else shapes == expected, (kind, name, shapes)
        for name, values in message["configs"].items():
            keys = {"order": numbers, "answer": {"id", "error"}, "site": {"name"}}[name.split(".")[0]]
            assert set(values) == keys
    assert seen == set(allowed)


def test_tls_and_authenticated_nodes(tmp_path):
    """With TLS on the SuperLink and a registered key for each SuperNode, the study runs; two that want in do not get in.

    One has a key that is not registered, and cannot connect. The other's key is registered, but it is not that of the client
    whose name it claims, and it is sent no order.
    """
    secure, keys = flower_network.certificates(tmp_path / "tls"), tmp_path / "keys"
    private = {name: flower_network.key_pair(keys, name) for name in (*NAMES, "mallory", "stranger")}
    journal, output, record = (tmp_path / n for n in ("journal", "result.nc", "messages.jsonl"))
    config = {"journal": str(journal), "output": str(output), "record": str(record), "keys": str(keys), "visits": 2}
    with flower_network.Network(tmp_path, secure) as network:
        for name in (*NAMES, "mallory"):
            network.cli("supernode", "register", str(keys / f"{name}.pub"), "local")
        for name in NAMES:
            network.node(name, private[name])
        network.start_node("mallory", private["mallory"], name="south")
        network.start_node("stranger", private["stranger"], name="south")
        run = network.run(APP, **config)
        network.wait(output.exists, 1500, "there is a result")
        said = network.cli("log", run, "local", "--show", check=False, plain=True)["text"]
        refused = (tmp_path / "stranger.log").read_text()
    assert len(visits_of(journal)) == 6
    assert "is none of the clients, or has not the key of one: 'south'" in said
    assert "ERROR" in refused
    assert "SuperNode ID" not in refused
