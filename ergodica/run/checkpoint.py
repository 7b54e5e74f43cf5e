"""Checkpoints that survive a kill: arrays without pickle, shards of draws, and a manifest that is replaced last."""

import hashlib
import importlib.metadata
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ergodica.core.types import PyTree

_MANIFEST = "manifest.json"
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is damaged, or that belongs to another run."""


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often a run is saved.

    Parameters
    ----------
    path : path
        A directory; made where there is none. A run finds there what it saved before, and goes on from it.
    every : float
        Seconds between saves (the first comes after that time; the end of the run is always saved).
    """

    path: str | os.PathLike
    every: float = 60.0


class Store:
    """Reads and writes one checkpoint directory.

    Parameters
    ----------
    path : path
    fingerprint : dict
        What identifies the run (see `fingerprint`); a directory with another one is refused.
    """

    def __init__(self, path: str | os.PathLike, fingerprint: dict[str, str]) -> None:
        self.path, self.fingerprint = Path(path), fingerprint
        self._shards: list[dict[str, Any]] = []

    def load(self) -> tuple[dict[str, Any], list[np.ndarray], list[list[np.ndarray]]] | None:
        """Read what was saved: progress, arrays of the state, arrays of each shard; ``None`` where there is nothing.

        Raises
        ------
        CheckpointError
            If a file is missing or damaged, or another run was saved here.
        """
        if not (self.path / _MANIFEST).exists():
            if self.path.exists() and any(self.path.iterdir()):
                raise CheckpointError(
                    f"{self.path} is not empty and holds no checkpoint; give an empty or a new directory."
                )
            return None
        try:
            manifest = json.loads((self.path / _MANIFEST).read_text())
            if manifest.pop("sha256") != _hash_of(manifest):
                raise ValueError("its hash is not the one that it holds")
            saved, progress = manifest["fingerprint"], manifest["progress"]
            self._shards, state_entry = manifest["shards"], manifest["state"]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.path / _MANIFEST} is damaged ({error!r}); delete the directory to start anew."
            ) from error
        different = sorted(k for k in self.fingerprint.keys() | saved.keys() if self.fingerprint.get(k) != saved.get(k))
        if different:
            raise CheckpointError(
                f"The checkpoint in {self.path} was made by another run: {', '.join(different)} differ. Give the arguments of "
                "that run, or another directory."
            )
        return progress, self._read(state_entry), [self._read(entry) for entry in self._shards]

    def save(self, progress: dict[str, Any], state: PyTree, draws: PyTree | None) -> None:
        """Write the state and the draws since the last save; what stood before stays whole until the last moment."""
        self.path.mkdir(parents=True, exist_ok=True)
        shards = list(self._shards)
        if draws is not None:
            shards.append(self._write(f"draws-{len(shards):06d}.npz", jax.tree.leaves(draws)))
        state_entry = self._write(f"state-{progress['step']}.npz", jax.tree.leaves(state))
        manifest = {"fingerprint": self.fingerprint, "progress": progress, "state": state_entry, "shards": shards}
        self._replace(_MANIFEST, json.dumps({**manifest, "sha256": _hash_of(manifest)}, indent=1).encode())
        self._shards = shards
        for old in self.path.glob("state-*.npz"):
            if old.name != state_entry["file"]:
                old.unlink()

    def _write(self, name: str, arrays: list) -> dict[str, Any]:
        with tempfile.TemporaryFile() as buffer:
            np.savez(buffer, *[np.asarray(x) for x in arrays], allow_pickle=False)
            buffer.seek(0)
            content = buffer.read()
        self._replace(name, content)
        return {"file": name, "sha256": hashlib.sha256(content).hexdigest(), "arrays": len(arrays)}

    def _replace(self, name: str, content: bytes) -> None:
        temporary = self.path / f".{name}.tmp"
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path / name)

    def _read(self, entry: dict[str, Any]) -> list[np.ndarray]:
        file = self.path / entry["file"]
        if not file.exists():
            raise CheckpointError(f"{file} is missing; delete the directory to start anew.")
        if hashlib.sha256(file.read_bytes()).hexdigest() != entry["sha256"]:
            raise CheckpointError(
                f"{file} is damaged: its hash is not the one in the manifest. Delete the directory to start anew."
            )
        with np.load(file, allow_pickle=False) as archive:
            return [archive[f"arr_{i}"] for i in range(entry["arrays"])]


def _hash_of(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fingerprint(tree: PyTree, what: str = "sampler and data", **settings: Any) -> dict[str, str]:
    """Identify a run by its settings, the structure, shapes, dtypes and content of a tree, and the versions in use.

    What the tree is, an error says with the words of ``what``. Functions are known by their qualified names alone: a
    function edited between two runs is not noticed.
    """
    structure, content = hashlib.sha256(), hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        structure.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype};".encode())
        content.update(np.ascontiguousarray(array).tobytes())
    versions = " ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("ergodica", "jax", "jaxlib", "equinox")
    )
    return {
        "format": str(_FORMAT),
        "versions": versions,
        f"{what}: structure": structure.hexdigest(),
        f"{what}: values": content.hexdigest(),
        **{name: str(value) for name, value in settings.items()},
    }
