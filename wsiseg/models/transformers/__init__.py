"""SAM 2.1 and SAM 3 on slides, from checkpoints of the library transformers: points and boxes, and SAM 3's detector."""

from wsiseg.models.transformers.sam2 import Sam2
from wsiseg.models.transformers.sam3 import Sam3

__all__ = ["Sam2", "Sam3"]  # the cards of imported models name them here
