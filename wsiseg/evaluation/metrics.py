"""Instance metrics from one sparse table of overlaps between truth and prediction.

Symbol   meaning
g, p     an instance of the truth G, of the prediction P (label images, 0 = background, or outlines that do not overlap)
IoU      |g & p| / |g | p|

Every metric is a ratio of sums over instances. The sums of an image are a `MetricSums`; the tallies of several images add up to the pooled ones.
Where truth and prediction are both empty, every metric is 1.

References
----------
.. [1] Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation, IEEE TMI 2017 (AJI), doi:10.1109/TMI.2017.2677499.
.. [2] Kirillov et al., Panoptic Segmentation, CVPR 2019 (PQ, there with DQ called RQ), arXiv:1801.00868.
.. [3] Caicedo et al., Nucleus segmentation across imaging experiments, Nature Methods 2019 (mSA), doi:10.1038/s41592-019-0612-7.
.. [4] Graham et al., HoVer-Net, Medical Image Analysis 2019 (AJI+ in its code; DQ, SQ; centroids within 3 um), doi:10.1016/j.media.2019.101563.
.. [5] Gamper et al., PanNuke Dataset Extension, Insights and Baselines, 2020 (bPQ, mPQ), arXiv:2003.10778.
.. [6] Graham et al., CoNIC Challenge, Medical Image Analysis 2024 (mPQ+), doi:10.1016/j.media.2023.103047.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from wsiseg.evaluation.assignment import assign
from wsiseg.evaluation.contingency import Overlaps, overlaps

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

__all__ = [
    "THRESHOLDS",
    "MetricSums",
    "Overlaps",
    "Quality",
    "aji",
    "aji_plus",
    "class_quality",
    "dice",
    "dq",
    "f1",
    "matched_iou",
    "mean_pq",
    "msa",
    "overlaps",
    "pool",
    "pq",
    "score",
    "sq",
    "tally",
]

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  #: of mSA
_EPSILON = 1e-9  #: a quotient of px counts that equals a threshold may come out this much below it


@dataclass(frozen=True)
class Quality:
    """Components of PQ. ``hits``: pairs of IoU > 0.5, one-to-one by themselves [2]_; ``iou``: the sum of their IoU."""

    truth: int
    prediction: int
    hits: int
    iou: float

    @property
    def dq(self) -> float:
        """Detection quality: TP / (TP + FP / 2 + FN / 2)."""
        return _ratio(2 * self.hits, self.truth + self.prediction)

    @property
    def sq(self) -> float:
        """Segmentation quality: mean IoU of the hits; 0 where there is none."""
        return _ratio(self.iou, self.hits) if self.hits or not self.truth + self.prediction else 0.0

    @property
    def pq(self) -> float:
        """Panoptic quality: DQ x SQ."""
        return _ratio(2 * self.iou, self.truth + self.prediction)


@dataclass(frozen=True)
class MetricSums:
    """The sums of one image that its metrics are ratios of; `pool` adds those of several images.

    Attributes
    ----------
    quality
        Instances on both sides, and hits.
    shared, size
        |G & P| and |G| + |P|.
    aji, aji_plus
        Numerator and denominator of each.
    hits_msa, hits_f1
        Pairs at IoU >= each of `THRESHOLDS`, and >= each of ``thresholds``, one-to-one.
    thresholds
        IoU thresholds of F1.
    """

    quality: Quality
    shared: float
    size: float
    aji: tuple[float, float]
    aji_plus: tuple[float, float]
    hits_msa: tuple[int, ...]
    hits_f1: tuple[int, ...]
    thresholds: tuple[float, ...]

    def values(self) -> dict[str, float]:
        """Every metric by its short name."""
        both = self.quality.truth + self.quality.prediction
        return {
            "aji": _ratio(*self.aji),
            "aji_plus": _ratio(*self.aji_plus),
            "pq": self.quality.pq,
            "dq": self.quality.dq,
            "sq": self.quality.sq,
            "msa": _msa(self.hits_msa, both),
            "dice": _dice(self.shared, self.size),
        } | {f"f1@{t:g}": _f1(h, both) for t, h in zip(self.thresholds, self.hits_f1, strict=True)}


def tally(o: Overlaps, thresholds: Sequence[float] = (0.5,)) -> MetricSums:
    """Sum up one image.

    Parameters
    ----------
    o
        Overlaps of truth and prediction.
    thresholds
        IoU in (0, 1] at which F1 is wanted.
    """
    return MetricSums(
        _quality(o),
        *_dice_sums(o),
        _aji_sums(o),
        _aji_plus_sums(o),
        tuple(_hits(o, t) for t in THRESHOLDS),
        tuple(_hits(o, t) for t in thresholds),
        tuple(thresholds),
    )


def pool(tallies: Iterable[MetricSums]) -> MetricSums:
    """Add up the sums of one or more images."""
    every = list(tallies)
    return MetricSums(
        pool_quality(t.quality for t in every),
        sum(t.shared for t in every),
        sum(t.size for t in every),
        (sum(t.aji[0] for t in every), sum(t.aji[1] for t in every)),
        (sum(t.aji_plus[0] for t in every), sum(t.aji_plus[1] for t in every)),
        tuple(map(sum, zip(*(t.hits_msa for t in every), strict=True))),
        tuple(map(sum, zip(*(t.hits_f1 for t in every), strict=True))),
        every[0].thresholds,
    )


def pool_quality(parts: Iterable[Quality]) -> Quality:
    """Add up qualities, as of one class over images [6]_."""
    rows = [dataclasses.astuple(q) for q in parts]
    return Quality(*map(sum, zip(*rows, strict=True))) if rows else Quality(0, 0, 0, 0.0)


def class_quality(
    o: Overlaps, truth_types: NDArray[np.object_], prediction_types: NDArray[np.object_]
) -> dict[str, Quality]:
    """Components of PQ of each class: only instances of that class on both sides count.

    Parameters
    ----------
    o
        Overlaps of truth and prediction, all classes.
    truth_types, prediction_types
        Names of shape (N,) and (M,); the empty name is not a class.
    """
    good = (o.iou > 0.5) & (truth_types[o.truth] == prediction_types[o.prediction])
    of_hit, iou = truth_types[o.truth[good]], o.iou[good]
    names = sorted({*truth_types, *prediction_types} - {""})
    return {
        c: Quality(
            int((truth_types == c).sum()),
            int((prediction_types == c).sum()),
            int((of_hit == c).sum()),
            float(iou[of_hit == c].sum()),
        )
        for c in names
    }


def mean_pq(images: Sequence[dict[str, Quality]]) -> tuple[dict[str, float], dict[str, float]]:
    """PQ of each class in two ways; the means over classes are mPQ [5]_ and mPQ+ [6]_.

    Parameters
    ----------
    images
        `class_quality` of each image.

    Returns
    -------
    tuple of (dict, dict)
        Mean over the images whose truth holds the class, and PQ of all images pooled. Classes that no truth holds are left out.
    """
    names = sorted({c for image in images for c, q in image.items() if q.truth})
    per_image = {c: float(np.mean([image[c].pq for image in images if c in image and image[c].truth])) for c in names}
    pooled = {c: pool_quality(image[c] for image in images if c in image).pq for c in names}
    return per_image, pooled


def dice(o: Overlaps) -> float:
    """Pixel Dice 2|G & P| / (|G| + |P|)."""
    return _dice(*_dice_sums(o))


def aji(o: Overlaps) -> float:
    """Aggregated Jaccard index [1]_: every g with its best p (the first of equals); a p may serve several g, unused p count against."""
    return _ratio(*_aji_sums(o))


def aji_plus(o: Overlaps) -> float:
    """AJI with a one-to-one matching, the one of largest summed IoU [4]_. Neither of AJI and AJI+ is always the larger one."""
    return _ratio(*_aji_plus_sums(o))


def matched_iou(o: Overlaps) -> NDArray[np.float64]:
    """IoU of the one-to-one matching that maximises their sum."""
    return np.asarray(o.iou[assign(o.truth, o.prediction, o.iou)])


def dq(o: Overlaps) -> float:
    """Detection quality [2]_ [4]_: F1 at IoU > 0.5."""
    return _quality(o).dq


def sq(o: Overlaps) -> float:
    """Segmentation quality [2]_ [4]_: mean IoU of the pairs with IoU > 0.5; 0 where there is none."""
    return _quality(o).sq


def pq(o: Overlaps) -> float:
    """Panoptic quality [2]_: sum of IoU > 0.5 over TP + FP / 2 + FN / 2."""
    return _quality(o).pq


def msa(o: Overlaps) -> float:
    """Mean segmentation accuracy [3]_: TP / (TP + FP + FN) at IoU >= 0.50, 0.55 ... 0.95, averaged."""
    return _msa([_hits(o, t) for t in THRESHOLDS], len(o.truth_size) + len(o.prediction_size))


def f1(o: Overlaps, threshold: float = 0.5) -> float:
    """2 TP / (2 TP + FP + FN) at IoU >= ``threshold``."""
    return _f1(_hits(o, threshold), len(o.truth_size) + len(o.prediction_size))


def score(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> dict[str, float]:
    """AJI, PQ, mSA and Dice of two label images."""
    o = overlaps(truth, prediction)
    return {"aji": aji(o), "pq": pq(o), "msa": msa(o), "dice": dice(o)}


def _quality(o: Overlaps) -> Quality:
    good = o.iou > 0.5
    return Quality(len(o.truth_size), len(o.prediction_size), int(good.sum()), float(o.iou[good].sum()))


def _dice_sums(o: Overlaps) -> tuple[float, float]:
    """|G & P| and |G| + |P|."""
    return float(o.shared.sum()), float(o.truth_size.sum() + o.prediction_size.sum())


def _dice(shared: float, size: float) -> float:
    return _ratio(2 * shared, size)


def _msa(hits: Sequence[int], both: int) -> float:
    """``hits`` at each of `THRESHOLDS`; ``both``: instances on both sides."""
    return float(np.mean([_ratio(h, both - h) for h in hits]))


def _f1(hits: int, both: int) -> float:
    return _ratio(2 * hits, both)


def _aji_sums(o: Overlaps) -> tuple[float, float]:
    order = np.lexsort((-o.iou, o.truth))
    best = order[np.unique(o.truth[order], return_index=True)[1]]
    return _with_rest(o, best)


def _aji_plus_sums(o: Overlaps) -> tuple[float, float]:
    return _with_rest(o, assign(o.truth, o.prediction, o.iou))


def _with_rest(o: Overlaps, pairs: NDArray[np.intp]) -> tuple[float, float]:
    """Shared sizes of the pairs, and their unions with all instances that are in none of them."""
    lone_g, lone_p = np.ones(len(o.truth_size), bool), np.ones(len(o.prediction_size), bool)
    lone_g[o.truth[pairs]], lone_p[o.prediction[pairs]] = False, False
    rest = o.truth_size[lone_g].sum() + o.prediction_size[lone_p].sum()
    return float(o.shared[pairs].sum()), float(o.union[pairs].sum() + rest)


def _hits(o: Overlaps, threshold: float) -> int:
    """The most pairs of IoU >= threshold, one-to-one. Not those of the matching of largest sum: it may give up one good pair for two poor ones."""
    good = o.iou >= threshold - _EPSILON
    g, p, iou = o.truth[good], o.prediction[good], o.iou[good]
    if _all_differ(g) and _all_differ(p):  # always so above 0.5
        return len(iou)
    return len(assign(g, p, 1 + 1e-6 * iou))


def _all_differ(rows: NDArray[np.intp]) -> bool:
    return not len(rows) or int(np.bincount(rows).max()) == 1


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 1.0
