"""Click one cell per type, get every cell of a whole-slide image outlined and typed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from wsiseg.config import RunConfig
    from wsiseg.runs.image import segment_image
    from wsiseg.runs.slide import segment_slide

__all__ = ["RunConfig", "__version__", "segment_image", "segment_slide"]

_HOMES = {"RunConfig": "wsiseg.config", "segment_image": "wsiseg.runs.image", "segment_slide": "wsiseg.runs.slide"}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Load the library on first use: ``import wsiseg`` alone stays cheap."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'wsiseg' has no attribute {name!r}")
