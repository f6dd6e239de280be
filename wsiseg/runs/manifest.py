"""The words of ``status`` in manifest.json and in the records of shards."""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What a run has come to; the values are those in the files."""

    RUNNING = "running"  #: begun; or killed, when no process works on it
    INTERRUPTED = "interrupted"  #: stopped in an orderly way
    COMPLETE = "complete"
    INCOMPLETE = "incomplete"  #: finished without tiles that could not be read
    SHARD = "shard"  #: a shard's blocks are done
    RETYPING = "retyping"  #: the files are being replaced with other types


FINISHED = (Status.COMPLETE, Status.INCOMPLETE)  #: the final files are there
