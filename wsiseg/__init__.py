"""Click one cell per type, get every cell of a whole-slide image outlined and typed."""

from __future__ import annotations

__version__ = "0.1.0"
