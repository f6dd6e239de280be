"""Segment Anything: SAM, micro-sam and PathoSAM checkpoints on slides."""

from wsiseg.models.sam.model import SamModel

__all__ = ["SamModel"]  # the cards of imported models name it here
