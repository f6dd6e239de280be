"""Scores of images, and their means, pooled values and scores per type."""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.errors import counted
from wsiseg.evaluation.detection import Detection, pool_detections
from wsiseg.evaluation.metrics import MetricSums, Quality, mean_pq, pool
from wsiseg.evaluation.summary import Interval, PointHits, mean_interval

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, kw_only=True)
class ImageScores:
    """Scores of one image.

    Attributes
    ----------
    name
        Stem of the files.
    tally
        ``None`` when one side is points.
    quality
        What PQ of each class is made of; empty without types on both sides.
    detection
        ``None`` when microns per px are not known.
    points
        Hits of predicted points on true areas.
    """

    name: str
    tally: MetricSums | None
    quality: dict[str, Quality]
    detection: Detection | None
    points: PointHits | None

    @property
    def counts(self) -> tuple[int, int]:
        """Cells in the truth and in the prediction."""
        if self.tally is not None:
            return self.tally.quality.truth, self.tally.quality.prediction
        d = self.detection
        return (0, 0) if d is None else (d.pairs.total() + d.missed.total(), d.pairs.total() + d.spurious.total())


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """One type over all images: cells on both sides, F1 pooled, mean PQ over images (as in mPQ) and PQ pooled (as in mPQ+); nan where unknown."""

    truth: int
    prediction: int
    f1: float
    pq: float
    pq_plus: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All numbers of a comparison.

    Attributes
    ----------
    images
        In order of name.
    values
        Values of each image, by metric; nan where a metric is undefined for the image.
    means
        Mean over images and its interval, by metric; and ``bpq`` and ``mpq``.
    pooled
        All images taken as one, by metric; and ``mpq_plus``.
    classes
        By type.
    confusion
        (type in the truth, type in the prediction, matched pairs); the empty name for no type.
    retention
        Mean of the prediction over mean of the baseline, by metric; empty without a baseline.
    notes
        Warnings about anything doubtful.
    options
        Options of the comparison, and versions.
    """

    images: tuple[ImageScores, ...]
    values: tuple[dict[str, float], ...]
    means: dict[str, Interval]
    pooled: dict[str, float]
    classes: dict[str, ClassScores]
    confusion: tuple[tuple[str, str, int], ...]
    retention: dict[str, float]
    notes: tuple[str, ...]
    options: dict[str, object]

    def __repr__(self) -> str:
        scores = [f"{name} {value:.3f}" for name, value in self.pooled.items()]
        return f"Evaluation({counted(len(self.images), 'image')}, pooled: {', '.join(scores)})"

    def as_dict(self) -> dict[str, object]:
        """Scores as a dict for JSON."""
        return {
            "images": [
                {"name": i.name, "truth": i.counts[0], "prediction": i.counts[1], **v}
                for i, v in zip(self.images, self.values, strict=True)
            ],
            "mean": {m: vars(interval) for m, interval in self.means.items()},
            "pooled": self.pooled,
            "classes": {name: vars(scores) for name, scores in self.classes.items()},
            "confusion": [{"truth": g, "prediction": p, "pairs": n} for g, p, n in self.confusion],
            "retention": self.retention,
            "notes": self.notes,
            "options": self.options,
        }


def has_types(images: Sequence[ImageScores]) -> bool:
    """Tell whether any truth and any prediction has types."""
    pooled = pool_detections(i.detection for i in images if i.detection is not None)
    predicted = {p for _, p in pooled.pairs} | set(pooled.spurious)
    return bool(pooled.classes) and bool(predicted - {""})


def image_values(image: ImageScores, *, typed: bool) -> dict[str, float]:
    """Every score of one image by its short name; those of types only where ``typed``."""
    parts = [
        {} if image.tally is None else image.tally.values(),
        {} if image.detection is None else image.detection.values(typed=typed),
        {} if image.points is None else image.points.values(),
    ]
    return reduce(lambda a, b: a | b, parts)


def pooled_values(images: Sequence[ImageScores]) -> dict[str, float]:
    """Every score of all images taken as one, and mPQ+."""
    out: dict[str, float] = {}
    tallies = [i.tally for i in images if i.tally is not None]
    if tallies:
        out |= pool(tallies).values()
    detections = [i.detection for i in images if i.detection is not None]
    if detections:
        out |= pool_detections(detections).values(typed=has_types(images))
    points = [i.points for i in images if i.points is not None]
    if points:
        out |= reduce(PointHits.__add__, points).values()
    if tallies and has_types(images):
        out["mpq_plus"] = _mean(mean_pq([i.quality for i in images])[1].values())
    return out


def means_of_truth(images: Sequence[ImageScores]) -> dict[str, Interval]:
    """bPQ, the mean PQ of the images whose truth is not empty, and mPQ, which has no interval: it is a mean over types of means over images."""
    tallies = [i.tally for i in images if i.tally is not None]
    out = {"bpq": mean_interval([t.quality.pq for t in tallies if t.quality.truth])} if tallies else {}
    if tallies and has_types(images):
        out["mpq"] = Interval(
            mean=_mean(mean_pq([i.quality for i in images])[0].values()), low=np.nan, high=np.nan, n=len(tallies)
        )
    return out


def _mean(values: Iterable[float]) -> float:
    known = list(values)
    return float(np.mean(known)) if known else float("nan")


def class_scores(images: Sequence[ImageScores]) -> dict[str, ClassScores]:
    """Scores of each type of the truth; empty without types on both sides."""
    if not has_types(images):
        return {}
    detection = pool_detections(i.detection for i in images if i.detection is not None)
    per_image, pooled = mean_pq([i.quality for i in images])
    nan = float("nan")
    return {
        c: ClassScores(
            truth=detection.truth(c),
            prediction=detection.prediction(c),
            f1=detection.class_f1(c),
            pq=per_image.get(c, nan),
            pq_plus=pooled.get(c, nan),
        )
        for c in detection.classes
    }
