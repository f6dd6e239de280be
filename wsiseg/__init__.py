"""Click one cell per type, get every cell of a whole-slide image outlined and typed."""

import lazy_loader

from wsiseg.runtime.version import __version__ as __version__

# The public names are those of __init__.pyi, loaded on first use (SPEC 1 of scientific Python): ``import wsiseg`` alone stays cheap.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
