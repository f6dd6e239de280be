"""The version of wsiseg; the package's metadata are made from it."""

__version__ = "0.1.0"
