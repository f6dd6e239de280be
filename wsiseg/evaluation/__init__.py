"""Metrics of instance segmentation and typing, each with its formula and source."""

from wsiseg.evaluation.compare import evaluate
from wsiseg.evaluation.scores import Evaluation

__all__ = ["Evaluation", "evaluate"]
