"""What crosses the wire: positions, momenta and surrogate parameters as arrays, and the numbers of an order.

==================  ======================================================  =========================================
message             to the site                                             back
==================  ======================================================  =========================================
``query.hello``     nothing                                                 the site's name
``query.expand``    ``theta``                                               ``expansion``: gradient, precision, noise; name
``train.visit``     ``surrogates``: centre, own and total parameters; for   for each visit: ``state``, ``positions``, id
                    each visit ``state`` and numbers (`VISIT_NUMBERS`)
==================  ======================================================  =========================================

Rows of data, and how many there are, are in none of them.
"""

# pyright: reportMissingImports=false

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ergodica.integrations.flower.study import Expansion
from ergodica.run.orders import Reply, Visit

HELLO, EXPAND, VISIT = "query.hello", "query.expand", "train.visit"
VISIT_NUMBERS = ("id", "chain", "client", "words", "first_step", "count", "num_steps", "stride", "share")

Arrays = Sequence[np.ndarray]


def to_arrays(arrays: Arrays) -> Any:
    """Make an ``ArrayRecord`` of some arrays, in their order."""
    from flwr.app import Array, ArrayRecord

    return ArrayRecord({str(i): Array(np.asarray(x)) for i, x in enumerate(arrays)})


def from_arrays(record: Any) -> tuple[np.ndarray, ...]:
    """Read the arrays of an ``ArrayRecord``; keys other than 0, 1, … raise."""
    return tuple(record[str(i)].numpy() for i in range(len(record)))


def encode_visits(visits: Sequence[Visit], surrogates: Arrays) -> Any:
    """Put the orders for one client into the content of a message."""
    from flwr.app import ConfigRecord, RecordDict

    content: dict[str, Any] = {"surrogates": to_arrays(surrogates)}
    for i, visit in enumerate(visits):
        numbers = {name: getattr(visit, name) for name in VISIT_NUMBERS}
        content[f"order.{i}"] = ConfigRecord({**numbers, "words": [int(w) for w in visit.words]})
        content[f"state.{i}"] = to_arrays(visit.state)
    return RecordDict(content)


def decode_visits(content: Any) -> tuple[list[Visit], tuple[np.ndarray, ...]]:
    """Read the orders, and the surrogates, at the site."""
    orders = content.config_records
    visits = []
    for i in range(len(orders)):
        numbers = {name: orders[f"order.{i}"][name] for name in VISIT_NUMBERS}
        numbers["words"] = np.asarray(numbers["words"], np.uint32)
        visits.append(Visit(**numbers, state=from_arrays(content.array_records[f"state.{i}"])))
    return visits, from_arrays(content.array_records["surrogates"])


def encode_replies(replies: Sequence[Reply]) -> Any:
    """Put a site's answers into the content of a message."""
    from flwr.app import ConfigRecord, RecordDict

    content: dict[str, Any] = {}
    for i, reply in enumerate(replies):
        content[f"answer.{i}"] = ConfigRecord({"id": reply.id, "error": reply.error or ""})
        content[f"state.{i}"] = to_arrays(reply.state)
        content[f"positions.{i}"] = to_arrays(reply.positions)
    return RecordDict(content)


def decode_replies(content: Any, client: int, asked: Iterable[str]) -> list[Reply]:
    """Read answers of a client at the server, which does not trust them: what cannot be read is an error of all that was asked."""
    try:
        answers = content.config_records
        found = []
        for i in range(len(answers)):
            answer = answers[f"answer.{i}"]
            state, positions = (from_arrays(content.array_records[f"{n}.{i}"]) for n in ("state", "positions"))
            error = str(answer["error"])[:500] or None
            found.append(Reply(str(answer["id"])[:64], client, state, positions, error))
    except Exception as error:
        why = f"its message cannot be read: {type(error).__name__}: {str(error)[:200]}"
        return [Reply(id, client, error=why) for id in asked]
    return found or [Reply(id, client, error="its message is empty") for id in asked]


def encode_expansion(name: str, expansion: Expansion) -> Any:
    """Put what a site says of its data into the content of a message."""
    from flwr.app import ConfigRecord, RecordDict

    return RecordDict({"expansion": to_arrays(expansion), "site": ConfigRecord({"name": name})})


def decode_expansion(content: Any) -> Expansion:
    """Read an expansion; its numbers are checked by `ergodica.run.admission.check_surrogate`."""
    return Expansion(*from_arrays(content.array_records["expansion"]))
