"""Summaries of the scores of images: mean, interval, retention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

DRAWS = 2000  #: of the bootstrap
SEED = 0
LEVEL = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over ``n`` images and its percentile bootstrap interval at 95 %; nan for fewer than two images."""

    mean: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class PointHits:
    """Points of a prediction: all, inside any cell of the truth, inside one of their own type (``None`` without types)."""

    points: int
    inside: int
    right: int | None

    def __add__(self, other: PointHits) -> PointHits:
        right = None if self.right is None or other.right is None else self.right + other.right
        return PointHits(self.points + other.points, self.inside + other.inside, right)

    def values(self) -> dict[str, float]:
        """Point precision; nan without a point."""
        whole = self.points or float("nan")
        out = {"point_precision": self.inside / whole}
        return out if self.right is None else out | {"typed_point_precision": self.right / whole}


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean over images with a percentile bootstrap interval: `scipy.stats.bootstrap`, 2000 draws, a fixed seed, the middle 95 % of their means.

    Parameters
    ----------
    values
        One per image; nan where the metric is undefined for the image, which is then left out.

    References
    ----------
    .. [1] Efron, Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13 (percentile interval).

    Examples
    --------
    >>> found = mean_interval([0.6, 0.7, 0.8, float("nan")])
    >>> f"{found.mean:.2f}, {found.low:.2f} to {found.high:.2f}, {found.n} images"
    '0.70, 0.60 to 0.80, 3 images'
    """
    from scipy.stats import bootstrap

    known = np.asarray(values, np.float64)
    known = known[np.isfinite(known)]
    if not len(known):
        return Interval(mean=np.nan, low=np.nan, high=np.nan, n=0)
    if len(known) == 1:
        return Interval(mean=float(known[0]), low=np.nan, high=np.nan, n=1)
    low, high = bootstrap(
        (known,),
        np.mean,
        n_resamples=DRAWS,
        batch=DRAWS // 20,  # bounds the memory
        confidence_level=LEVEL,
        method="percentile",
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Interval(mean=float(known.mean()), low=float(low), high=float(high), n=len(known))


def retention(values: Sequence[dict[str, float]], baseline: Sequence[dict[str, float]]) -> dict[str, float]:
    """Share of the baseline's score that is reached: mean over images of each, then the ratio.

    Parameters
    ----------
    values, baseline
        Scores by metric, image by image, of the same images. An image for which either is undefined is left out of both means.

    Returns
    -------
    dict
        By metric; nan where the baseline's mean is 0. Left out: metrics that only one of the two has.
    """
    out = {}
    for metric in dict.fromkeys(m for row in values for m in row):
        pairs = [(a.get(metric, np.nan), b.get(metric, np.nan)) for a, b in zip(values, baseline, strict=True)]
        both = [(a, b) for a, b in pairs if np.isfinite(a) and np.isfinite(b)]
        if both:
            top, bottom = np.mean(both, axis=0)
            out[metric] = float(top / bottom) if bottom else float("nan")
    return out
