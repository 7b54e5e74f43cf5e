"""What crosses the wire, who is believed to be whom, and what nonsense a client may send; needs flwr, but no network."""

# ruff: noqa: E402

from types import SimpleNamespace

import numpy as np
import pytest

flwr_app = pytest.importorskip("flwr.app", reason="flwr is not installed (pip install ergodica[flower])")

from ergodica.integrations.flower import client_app, messages
from ergodica.integrations.flower import grid as grid_module
from ergodica.integrations.flower.grid import GridTransport
from ergodica.integrations.flower.server import run_study
from ergodica.run.orders import Reply, Visit
from tests.integrations import flower_network
from tests.integrations.federated_study import NAMES, exact_posterior, rows, study
from tests.support.statistics import assert_mean

APP_FAILED, NODE_GONE = 2, 5


class FakeGrid:
    """SuperNodes in this process: a push runs the real ClientApp's functions, a pull gives their answers."""

    def __init__(self, spec, nodes):
        self.spec, self.nodes, self.keys, self.gone = spec, dict(nodes), {}, set()
        self.replies, self.seen = {}, []
        self.app = client_app(spec, lambda context: rows(context.node_config["data"]))

    def get_nodes(self):
        return [SimpleNamespace(node_id=n, public_key=self.keys.get(n, b"")) for n in self.nodes if n not in self.gone]

    def push_messages(self, pushed):
        ids = []
        for message in pushed:
            id, node = f"m{len(self.seen)}", message.metadata.dst_node_id
            self.seen.append((message.metadata.message_type, message.content))
            ids.append(id)
            self.replies[id] = (node, self.answer(node, message))
        return ids

    def answer(self, node, message):
        if node in self.gone:
            return NODE_GONE
        context = SimpleNamespace(node_config={"data": self.nodes[node], "name": self.nodes[node], "cache": CACHE[0]})
        try:
            return self.app(message, context).content
        except ValueError:
            return APP_FAILED

    def pull_messages(self, ids):
        found = []
        for id in ids:
            if id not in self.replies:
                continue
            node, answer = self.replies.pop(id)
            metadata = SimpleNamespace(reply_to_message_id=id, src_node_id=node)
            failed = isinstance(answer, int)
            if not failed:
                self.seen.append(("back", answer))
            error = SimpleNamespace(code=answer) if failed else None
            found.append(
                SimpleNamespace(
                    metadata=metadata, has_error=lambda f=failed: f, content=None if failed else answer, error=error
                )
            )
        return found


CACHE = [""]


@pytest.fixture(autouse=True)
def at_once(monkeypatch, tmp_path):
    """Look at who is online at every call, and keep the test's compile cache."""
    import jax
    from flwr.supercore.task_identity import TaskIdentity

    for name in ("task_id", "run_id", "node_id"):  # which a real SuperLink sets
        monkeypatch.setattr(TaskIdentity, f"_{name}", 1)
    CACHE[0] = jax.config.jax_compilation_cache_dir or str(tmp_path)
    monkeypatch.setattr(grid_module, "_LOOK", -1.0)


def spec(**settings):
    return study(**{"num_visits": 4, "num_warmup": 1, "local_steps": 200, "stride": 10, **settings})


def settle(transport, times=3):
    for _ in range(times):
        transport.available()
    return transport


def test_a_run_sends_parameters_alone():
    """All numbers that pass are counted: their number does not grow with the data, and no row is among them."""
    ours = spec()
    grid = FakeGrid(ours, dict(enumerate(NAMES, 1)))
    result = run_study(ours, GridTransport(grid, ours), None, 60.0)
    mean, _ = exact_posterior()
    by_visit = result.posterior["position"].values.reshape(9, 20, 2)
    assert_mean(by_visit.mean(1), mean, smallest_error=0.2)
    known = np.concatenate([np.concatenate([rows(n)["X"].ravel(), rows(n)["y"]]) for n in NAMES])
    arrays = 0
    for _, content in grid.seen:
        assert not content.metric_records
        for record in content.array_records.values():
            for array in messages.from_arrays(record):
                arrays += 1
                assert array.size <= 40
                assert not np.isin(array.astype(np.float32).ravel(), known[known != 0]).any()
        for name, record in content.config_records.items():
            expected = {"order": set(messages.VISIT_NUMBERS), "answer": {"id", "error"}, "site": {"name"}}[
                name.split(".")[0]
            ]
            assert set(record) == expected
    assert arrays > 100


def test_visits_and_replies_survive_the_way():
    state = (np.array([1.5, -2.0], np.float32), np.asarray(7, np.int32))
    visit = Visit("1.2.0", 1, 2, np.array([0, 2**32 - 1], np.uint32), 3, 7, 10, 5, 1 / 3, state)
    surrogates = (np.zeros(2), np.eye(2))
    (found,), back = messages.decode_visits(messages.encode_visits([visit], surrogates))
    for x, y in zip(found.state + back, state + surrogates, strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
    assert found._replace(state=(), words=None) == visit._replace(state=(), words=None)
    assert found.words.tolist() == visit.words.tolist()
    reply = Reply("1.2.0", 2, state, (np.ones((2, 2), np.float32),))
    (again,) = messages.decode_replies(messages.encode_replies([reply]), 2, ["1.2.0"])
    np.testing.assert_array_equal(again.positions[0], reply.positions[0], strict=True)
    assert (again.id, again.client, again.error) == ("1.2.0", 2, None)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"answer.0": flwr_app.ConfigRecord({})},
        {"answer.0": flwr_app.ConfigRecord({"id": "0.0.0", "error": ""})},
        {"answer.7": flwr_app.ConfigRecord({"id": "0.0.0", "error": ""})},
        {
            "answer.0": flwr_app.ConfigRecord({"id": "0.0.0", "error": ""}),
            "state.0": flwr_app.ArrayRecord(
                {"0": flwr_app.Array("object", (2,), "numpy.ndarray", b"cos\nsystem\n(S'true'\ntR.")}
            ),
            "positions.0": flwr_app.ArrayRecord({}),
        },
    ],
)
def test_nonsense_is_an_error_of_what_was_asked(content):
    found = messages.decode_replies(flwr_app.RecordDict(content), 1, ["0.0.0", "2.1.0"])
    assert [r.id for r in found] == ["0.0.0", "2.1.0"]
    assert all(r.client == 1 and r.error for r in found)


def test_a_name_is_taken_while_its_node_is_online():
    ours = spec()
    grid = FakeGrid(ours, dict(enumerate(NAMES, 1)))
    transport = settle(GridTransport(grid, ours))
    assert transport.available() == {0, 1, 2}
    grid.nodes[9] = "south"
    asked = len(grid.seen)
    settle(transport, 5)
    assert transport._online[1] == 2
    assert len(grid.seen) == asked + 2, "the newcomer is asked once"
    grid.gone.add(2)
    settle(transport)
    assert transport._online[1] == 9


def test_a_key_decides_where_it_is_known(tmp_path):
    private = flower_network.key_pair(tmp_path, "south")
    other = flower_network.key_pair(tmp_path, "other")
    public = {p: (tmp_path / f"{p.name}.pub").read_text() for p in (private, other)}
    ours = spec(keys={"south": public[private]})
    grid = FakeGrid(ours, {1: "north", 2: "south", 3: "west", 9: "south", 4: "nobody"})
    grid.keys = {9: public[private].encode(), 2: public[other].encode()}
    transport = settle(GridTransport(grid, ours), 5)
    assert transport._online == {0: 1, 1: 9, 2: 3}
    assert {2, 4} <= transport._strangers


def test_who_is_gone_is_a_lost_order_and_who_fails_an_error():
    ours = spec()
    grid = FakeGrid(ours, dict(enumerate(NAMES, 1)))
    transport = settle(GridTransport(grid, ours))
    transport.surrogates = [()] * 3
    visits = [
        Visit(f"{c}.0.0", c, c, np.zeros(2, np.uint32), 0, 0, 10, 10, 1 / 3, (np.zeros(2, np.float32),)) for c in (0, 1)
    ]
    grid.gone.add(1)
    transport._online[0] = 1
    transport.send(visits)
    replies = {r.client: r for r in transport.receive(0.0)}
    assert replies[0].lost
    assert not replies[1].lost
    assert replies[1].error
