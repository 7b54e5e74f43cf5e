"""A journal of what a server has accepted, so that a restart loses nothing: records that are appended, and written through."""

import hashlib
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ergodica.run.checkpoint import CheckpointError

_MARK = b"ergodica journal 1\n"
_LENGTH, _HASH = 8, 32


class Journal:
    """Records of entries and arrays, in one file.

    Parameters
    ----------
    path : path
        The file; made, with its folder, where there is none.
    identity : dict of str
        What the run is (settings, shapes, versions). A journal of another run is refused.

    Attributes
    ----------
    records : list of (dict, list of array)
        What the file held when it was opened.
    dropped : int
        Bytes at the end that were no whole record, and were cut off: what was being written when the server died.

    Raises
    ------
    CheckpointError
        If the file is of another run, is open in another process, or is damaged anywhere but at its end.

    Notes
    -----
    A record is its length, its SHA-256 and an NPZ archive without pickles, and `append` returns when the disk has it: whoever
    acknowledges a result after that never loses it. Cost: one flush to the disk a record.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Journal(folder + "/run.journal", {"seed": "0"}) as journal:
    ...         journal.append({"kind": "accept", "visit": 3}, [np.arange(2.0)])
    ...     with Journal(folder + "/run.journal", {"seed": "0"}) as journal:
    ...         journal.records
    [({'kind': 'accept', 'visit': 3}, [array([0., 1.])])]
    """

    def __init__(self, path: str | os.PathLike, identity: dict[str, str]) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a+b")
        try:
            _lock(self._file, self.path)
            self.records, self.dropped = self._open(identity)
        except BaseException:
            self._file.close()
            raise

    def append(self, entry: dict[str, Any], arrays: Sequence[Any] = ()) -> None:
        """Write a record, and wait until the disk has it."""
        payload = _pack(entry, arrays)
        self._file.write(len(payload).to_bytes(_LENGTH) + hashlib.sha256(payload).digest() + payload)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Let another process open the file."""
        self._file.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, identity: dict[str, str]) -> tuple[list[tuple[dict, list[np.ndarray]]], int]:
        self._file.seek(0)
        content = self._file.read()
        if len(content) < len(_MARK) and _MARK.startswith(content):
            self._file.truncate(0)
            self._file.write(_MARK)
            self.append({"identity": identity})
            return [], len(content)
        if not content.startswith(_MARK):
            raise CheckpointError(f"{self.path} is no journal of ergodica; give another file.")
        records, end = [], len(_MARK)
        for payload, begin in _payloads(content, self.path):
            records.append(_unpack(payload))
            end = begin
        self._file.truncate(end)
        if not records:
            self.append({"identity": identity})
            return [], len(content) - end
        saved = records[0][0].get("identity", {})
        different = sorted(k for k in identity.keys() | saved.keys() if identity.get(k) != saved.get(k))
        if different:
            raise CheckpointError(
                f"The journal {self.path} is of another run: {', '.join(different)} differ. Give the settings of that run, or "
                "another file."
            )
        return records[1:], len(content) - end


def _payloads(content: bytes, path: Path) -> Iterator[tuple[bytes, int]]:
    """Give whole records, each with where the next begins; stop at one that was cut off."""
    begin = len(_MARK)
    while begin + _LENGTH + _HASH <= len(content):
        after = begin + _LENGTH + _HASH
        length = int.from_bytes(content[begin : begin + _LENGTH])
        if after + length > len(content):
            return
        payload = content[after : after + length]
        if hashlib.sha256(payload).digest() != content[begin + _LENGTH : after]:
            raise CheckpointError(
                f"{path} is damaged at byte {begin}: a record's hash is not the one that it holds. Take a copy of the file, or "
                "start anew."
            )
        begin = after + length
        yield payload, begin


def _pack(entry: dict[str, Any], arrays: Sequence[Any]) -> bytes:
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(entry).encode(), np.uint8)
    np.savez(buffer, text, *[np.asarray(x) for x in arrays], allow_pickle=False)
    return buffer.getvalue()


def _unpack(payload: bytes) -> tuple[dict[str, Any], list[np.ndarray]]:
    with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
        arrays = [archive[f"arr_{i}"] for i in range(len(archive.files))]
    return json.loads(arrays[0].tobytes()), arrays[1:]


def _lock(file: BinaryIO, path: Path) -> None:
    """Keep other processes out for as long as the file is open; where the system has no such locks, do without."""
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise CheckpointError(f"{path} is open in another process; end that server first.") from error
