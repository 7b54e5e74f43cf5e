"""The loops: sampling from data that are held or streamed, and the search for a mode."""

from ergodica.run.stream import RowBlocks, stream

__all__ = ["RowBlocks", "stream"]
