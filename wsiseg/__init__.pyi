from .config import RunConfig
from .errors import WsisegError
from .evaluation.compare import evaluate
from .formats.cell_query import read_cells
from .formats.seeds import read_seeds
from .library import Run, read_run, segment_image, segment_slide
from .records import Seeds, SeedType, TypedCells
from .runtime.version import __version__

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
