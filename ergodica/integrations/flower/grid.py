"""A `Transport` over Flower's grid: which SuperNode is which client, orders out, answers in."""

# pyright: reportMissingImports=false

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ergodica.integrations.flower import messages
from ergodica.integrations.flower.study import Study
from ergodica.run.orders import Reply, Visit

logger = logging.getLogger("ergodica.rounds")

_LOOK = 1.0  # seconds between looks at who is online
_LIFE = 24 * 3600.0  # of a message
_FAULTS_OF_APP = (
    1,
    2,
)  # codes of flwr: the ClientApp could not be loaded, or raised; others mean that no answer will come


class GridTransport:
    """Carries orders and answers through Flower's SuperLink.

    Parameters
    ----------
    grid : flwr.serverapp.Grid
    study : Study

    Attributes
    ----------
    surrogates : list of tuples of arrays
        What each client is sent with its orders.
    """

    def __init__(self, grid: Any, study: Study) -> None:
        self.grid, self.study = grid, study
        self.surrogates: list[tuple[np.ndarray, ...]] = []
        self._client_of: dict[int, int] = {}
        self._online: dict[int, int] = {}
        self._looked = -np.inf
        self._hellos: dict[str, int] = {}
        self._claims: dict[int, int] = {}
        self._strangers: set[int] = set()
        self._asked: dict[str, tuple[int, tuple[str, ...], float]] = {}
        self._queries: dict[str, int] = {}

    def available(self) -> set[int]:
        """Clients whose SuperNodes are online and known."""
        if time.monotonic() - self._looked > _LOOK:
            self._look()
        return set(self._online)

    def send(self, visits: Sequence[Visit]) -> None:
        """Send orders off, those for one client in one message."""
        by_client = defaultdict(list)
        for visit in visits:
            by_client[visit.client].append(visit)
        for client, orders in by_client.items():
            content = messages.encode_visits(orders, self.surrogates[client])
            id = self._push(content, messages.VISIT, self._online[client])
            self._asked[id] = (client, tuple(v.id for v in orders), time.monotonic())

    def receive(self, seconds: float) -> Iterable[Reply]:
        """Give answers that have come; wait for a while where none has."""
        old = time.monotonic() - _LIFE
        self._asked = {id: asked for id, asked in self._asked.items() if asked[2] > old}
        replies = list(self.grid.pull_messages(list(self._asked))) if self._asked else []
        if not replies:
            time.sleep(seconds)
        found: list[Reply] = []
        for reply in replies:
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if asked is None:
                continue
            client, ids, _ = asked
            if not reply.has_error():
                client = self._client_of.get(reply.metadata.src_node_id, -1)
                found += messages.decode_replies(reply.content, client, ids)
            elif reply.error.code in _FAULTS_OF_APP:
                found += [Reply(id, client, error=f"its app failed, code {reply.error.code}") for id in ids]
            else:
                logger.warning("no answer of client %d for %s: code %d", client, ids, reply.error.code)
                found += [Reply(id, client, lost=True) for id in ids]
        return found

    def ask(self, kind: str, theta: Sequence[np.ndarray], clients: set[int]) -> list[tuple[int, Any]]:
        """Send a query to clients that have not one under way, and give the answers that have come."""
        from flwr.app import RecordDict

        available = self.available()
        for client in (clients & available) - set(self._queries.values()):
            content = RecordDict({"theta": messages.to_arrays(theta)})
            self._queries[self._push(content, kind, self._online[client])] = client
        found = []
        replies = list(self.grid.pull_messages(list(self._queries))) if self._queries else []
        for reply in replies:
            client = self._queries.pop(reply.metadata.reply_to_message_id, None)
            if client is None or reply.has_error():
                logger.warning(
                    "a query of client %s failed: %s", client, reply.error if reply.has_error() else "unknown"
                )
            elif self._client_of.get(reply.metadata.src_node_id) == client and client in clients:
                found.append((client, reply.content))
        if not replies:
            time.sleep(0.2)
        return found

    def _push(self, content: Any, kind: str, node: int) -> str:
        from flwr.app import Message

        message = Message(content=content, dst_node_id=node, message_type=kind, ttl=_LIFE)
        (id,) = self.grid.push_messages([message])
        return id

    def _look(self) -> None:
        """See who is online, and find out who they are: by their keys, or by asking."""
        from flwr.app import RecordDict

        self._looked = time.monotonic()
        nodes = {n.node_id: n.public_key for n in self.grid.get_nodes()}
        self._online = {c: n for c, n in self._online.items() if n in nodes}
        by_key = {_plain(key): self.study.names.index(name) for name, key in self.study.keys.items()}
        for node, key in nodes.items():
            if node in self._claims:
                self._admit(node, self._claims[node])
            elif _plain(key) in by_key:
                self._admit(node, by_key[_plain(key)])
            elif node not in self._strangers and node not in self._hellos.values():
                self._hellos[self._push(RecordDict(), messages.HELLO, node)] = node
        for reply in self.grid.pull_messages(list(self._hellos)) if self._hellos else ():
            node = self._hellos.pop(reply.metadata.reply_to_message_id, None)
            if node is None or (reply.has_error() and reply.error.code not in _FAULTS_OF_APP):
                continue  # it went offline before it answered
            name = None if reply.has_error() else _said(reply.content)
            if name not in self.study.names or name in self.study.keys:
                logger.warning("SuperNode %s is none of the clients, or has not the key of one: %r", node, name)
                self._strangers.add(node)
            elif node in nodes:
                self._admit(node, self.study.names.index(name))

    def _admit(self, node: int, client: int) -> None:
        self._claims[node] = client
        if self._online.get(client, node) != node:
            return  # the name is taken, as long as the node that has it is online
        if self._client_of.get(node) is None:
            logger.info("client %r is SuperNode %d", self.study.names[client], node)
        self._client_of[node] = client
        self._online[client] = node


def _said(content: Any) -> str | None:
    try:
        return str(content.config_records["site"]["name"])
    except Exception:
        return None


def _plain(key: str | bytes) -> bytes:
    """A public key, PEM or as of ssh-keygen, without the form in which it is written; empty where there is none."""
    from cryptography.hazmat.primitives import serialization

    raw = key.encode() if isinstance(key, str) else key
    if not raw:
        return b""
    read = (
        serialization.load_ssh_public_key if raw.startswith((b"ssh-", b"ecdsa-")) else serialization.load_pem_public_key
    )
    form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return read(raw).public_bytes(*form)
