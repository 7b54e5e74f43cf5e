"""The client's side on Flower: an owner of data who makes visits."""

# pyright: reportMissingImports=false

import hashlib
import os
import pathlib
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ergodica.core.types import PyTree
from ergodica.estimators.federated.surrogates import Natural
from ergodica.integrations.flower import messages
from ergodica.integrations.flower.study import Study
from ergodica.run.orders import Reply, Visit


def client_app(study: Study | Callable[[Any], Study], load: Callable[[Any], PyTree]) -> Any:
    """Make the ClientApp of a study, which is the same at all sites.

    Parameters
    ----------
    study : Study or callable
        As at the server: ``study(context) -> Study`` may read the run's configuration, which all sites are sent.
    load : callable
        ``load(context) -> rows``: the site's own data, found by what its SuperNode was started with (``context.node_config``).

    Returns
    -------
    flwr.clientapp.ClientApp

    Notes
    -----
    ``--node-config`` of the SuperNode may hold

    ``name``
        Which client this is. Required.
    ``secret``
        Path of a file with at least 16 random bytes. The noise of the site's steps is then drawn from keys that nobody
        else can compute. Without it the server, who made the keys, can subtract the noise and read off exact gradients.
    ``cache``
        Folder for compiled programs. Flower starts a process for each message; without such a folder each would compile
        anew. The user's cache folder unless given.

    Cost of a message: the start of a process and the imports, then reading the data and the compiled programs, then the steps.
    """
    from flwr.app import ConfigRecord, Message, RecordDict
    from flwr.clientapp import ClientApp

    app = ClientApp()

    def of(context: Any) -> Study:
        return study if isinstance(study, Study) else study(context)

    @app.query("hello")
    def hello(message: Any, context: Any) -> Any:
        content = RecordDict({"site": ConfigRecord({"name": _name(of(context), context)})})
        return Message(content, reply_to=message)

    @app.query("expand")
    def expand(message: Any, context: Any) -> Any:
        keep_compiled_programs(context)
        ours = of(context)
        name, posterior = _name(ours, context), ours.make(load(context))
        centre = _position(ours, messages.from_arrays(message.content.array_records["theta"]))
        expansion = ours.expand(posterior, ours.names.index(name), centre)
        return Message(messages.encode_expansion(name, expansion), reply_to=message)

    @app.train("visit")
    def visit(message: Any, context: Any) -> Any:
        keep_compiled_programs(context)
        visits, surrogates = messages.decode_visits(message.content)
        ours = of(context)
        replies = make_visits(ours, ours.make(load(context)), visits, surrogates, _secret(context))
        return Message(messages.encode_replies(replies), reply_to=message)

    return app


def make_visits(
    study: Study, posterior: Any, visits: list[Visit], surrogates: tuple[np.ndarray, ...], secret: bytes | None
) -> list[Reply]:
    """Make the visits of one message; one that fails is answered by what went wrong, without a word of the data."""
    size = len(jax.tree.leaves(study.start()))
    centre = _position(study, surrogates[:size])
    own, total = (Natural(*(jnp.asarray(x) for x in surrogates[i : i + 2])) for i in (size, size + 2))
    replies = []
    for order in visits:
        try:
            site = study.site(posterior, order.share, centre, own, total)
            state, positions = site.visit(
                site_words(order, secret),
                order.state,
                num_steps=order.num_steps,
                stride=order.stride,
                first_step=order.first_step,
                share=order.share,
            )
            replies.append(Reply(order.id, order.client, state, positions))
        except Exception as error:
            traceback.print_exc()
            replies.append(Reply(order.id, order.client, error=f"{type(error).__name__} at the site"))
    return replies


def site_words(order: Visit, secret: bytes | None) -> np.ndarray:
    """Key of a visit (uint32 words): the server's, or one from a secret and the server's, the same for an order sent twice."""
    if secret is None:
        return order.words
    message = np.asarray(order.words, "<u4").tobytes() + order.id.encode()
    digest = hashlib.blake2b(message, key=secret[:64], digest_size=8).digest()
    return np.frombuffer(digest, "<u4").astype(np.uint32)


def keep_compiled_programs(context: Any) -> None:
    """Keep compiled programs on disk, since the next message comes to another process."""
    default = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ergodica" / "flower"
    folder = context.node_config.get("cache") or os.environ.get("JAX_COMPILATION_CACHE_DIR") or str(default)
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _name(study: Study, context: Any) -> str:
    name = context.node_config.get("name")
    if name not in study.names:
        raise ValueError(
            f'--node-config of the SuperNode must say which client it is, name="…" with one of {study.names}; got {name!r}.'
        )
    return str(name)


def _secret(context: Any) -> bytes | None:
    path = context.node_config.get("secret")
    if path is None:
        return None
    secret = pathlib.Path(str(path)).read_bytes()
    if len(secret) < 16:
        raise ValueError("The file of secret= must hold at least 16 random bytes.")
    return secret


def _position(study: Study, leaves: tuple[np.ndarray, ...]) -> Any:
    example = study.start()
    expected = [(x.shape, x.dtype) for x in jax.tree.leaves(example)]
    if [(x.shape, x.dtype) for x in leaves] != expected:
        raise ValueError(f"The server's position must have the arrays {expected}; do both have the same study?")
    return jax.tree.unflatten(jax.tree.structure(example), [jnp.asarray(x) for x in leaves])
