"""Click one cell per type, get every cell of a whole-slide image outlined and typed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wsiseg.config import RunConfig
    from wsiseg.errors import WsisegError
    from wsiseg.evaluation.compare import evaluate
    from wsiseg.formats.cell_query import read_cells
    from wsiseg.formats.seeds import read_seeds
    from wsiseg.library import Run, read_run, segment_image, segment_slide
    from wsiseg.records import Seeds, SeedType, TypedCells

__all__ = [
    "Run",
    "RunConfig",
    "SeedType",
    "Seeds",
    "TypedCells",
    "WsisegError",
    "__version__",
    "evaluate",
    "read_cells",
    "read_run",
    "read_seeds",
    "segment_image",
    "segment_slide",
]

_HOMES = {
    "Run": "wsiseg.library",
    "RunConfig": "wsiseg.config",
    "SeedType": "wsiseg.records",
    "Seeds": "wsiseg.records",
    "TypedCells": "wsiseg.records",
    "WsisegError": "wsiseg.errors",
    "evaluate": "wsiseg.evaluation.compare",
    "read_cells": "wsiseg.formats.cell_query",
    "read_run": "wsiseg.library",
    "read_seeds": "wsiseg.formats.seeds",
    "segment_image": "wsiseg.library",
    "segment_slide": "wsiseg.library",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Load the library on first use: ``import wsiseg`` alone stays cheap."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'wsiseg' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names, before any of them is loaded."""
    return sorted(__all__)
