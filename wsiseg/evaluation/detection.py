"""Cells as points: matching by distance, and the counts of types.

A cell of the prediction and one of the truth are the same when their centroids lie within a radius, 3 um by default [1]_, one to one, nearest
pairs first. Types play no part in that.

References
----------
.. [1] Graham et al., HoVer-Net, Medical Image Analysis 2019, doi:10.1016/j.media.2019.101563 (12 px at 0.25 um/px; there the matching of least
       total distance, which on nuclei 8 um apart is nearly always the same).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.spatial import cKDTree

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

RADIUS_UM = 3.0  #: convention of the field [1]_


@dataclass(frozen=True)
class Detection:
    """Counts of matched and unmatched cells by type; the empty name means no type. `pool_detections` adds several images.

    Attributes
    ----------
    pairs
        Matched cells by (type in the truth, type in the prediction).
    missed, spurious
        Cells of the truth, of the prediction, without a partner, by type.
    """

    pairs: Counter[tuple[str, str]]
    missed: Counter[str]
    spurious: Counter[str]

    @property
    def classes(self) -> list[str]:
        """Types of the truth."""
        return sorted(({g for g, _ in self.pairs} | set(self.missed)) - {""})

    @property
    def f1(self) -> float:
        """Detection F1, whatever the type; 1 where both sides are empty."""
        hits = self.pairs.total()
        both = 2 * hits + self.missed.total() + self.spurious.total()
        return 2 * hits / both if both else 1.0

    @property
    def precision(self) -> float:
        """Share of the prediction that has a partner; nan without a prediction."""
        return _share(self.pairs.total(), self.pairs.total() + self.spurious.total())

    @property
    def recall(self) -> float:
        """Share of the truth that has a partner; nan without a truth."""
        return _share(self.pairs.total(), self.pairs.total() + self.missed.total())

    def truth(self, name: str) -> int:
        """Cells of a type in the truth."""
        return self.missed[name] + sum(n for (g, _), n in self.pairs.items() if g == name)

    def prediction(self, name: str) -> int:
        """Cells of a type in the prediction."""
        return self.spurious[name] + sum(n for (_, p), n in self.pairs.items() if p == name)

    def class_f1(self, name: str) -> float:
        """2 TP / (truth + prediction) of one type: what is missed, spurious or wrongly typed counts against it; nan when it occurs nowhere."""
        return _share(2 * self.pairs[name, name], self.truth(name) + self.prediction(name))

    @property
    def macro_f1(self) -> float:
        """Mean F1 of the types of the truth; nan when it has none."""
        return float(np.mean([self.class_f1(name) for name in self.classes])) if self.classes else np.nan

    @property
    def type_accuracy(self) -> float:
        """Share of the matched pairs, both with a type, whose types agree; nan when there is none."""
        typed = {pair: n for pair, n in self.pairs.items() if all(pair)}
        return _share(sum(n for (g, p), n in typed.items() if g == p), sum(typed.values()))

    @property
    def unassigned(self) -> float:
        """Share of the prediction without a type; nan without a prediction."""
        return _share(self.prediction(""), self.pairs.total() + self.spurious.total())

    def values(self, *, typed: bool) -> dict[str, float]:
        """Every number by its short name."""
        found = {"detection_f1": self.f1, "detection_precision": self.precision, "detection_recall": self.recall}
        return found | (
            {"macro_f1": self.macro_f1, "type_accuracy": self.type_accuracy, "unassigned": self.unassigned}
            if typed
            else {}
        )


def detect(
    truth_xy: NDArray[np.float64],
    prediction_xy: NDArray[np.float64],
    radius_px: float,
    truth_types: NDArray[np.object_] | None = None,
    prediction_types: NDArray[np.object_] | None = None,
) -> Detection:
    """Match cells as points and count them by type.

    Parameters
    ----------
    truth_xy, prediction_xy
        float64 of shape (N, 2) and (M, 2), px.
    radius_px
        A pair at exactly this distance still matches.
    truth_types, prediction_types
        Names of shape (N,) and (M,), the empty name for no type; ``None``: no types at all.
    """
    g, p = match_points(truth_xy, prediction_xy, radius_px)
    names_g = np.full(len(truth_xy), "", object) if truth_types is None else truth_types
    names_p = np.full(len(prediction_xy), "", object) if prediction_types is None else prediction_types
    return Detection(
        Counter(zip(names_g[g].tolist(), names_p[p].tolist(), strict=True)),
        Counter(np.delete(names_g, g).tolist()),
        Counter(np.delete(names_p, p).tolist()),
    )


def pool_detections(parts: Iterable[Detection]) -> Detection:
    """Pool several images into one."""
    pairs: Counter[tuple[str, str]] = Counter()
    missed: Counter[str] = Counter()
    spurious: Counter[str] = Counter()
    for one in parts:
        pairs.update(one.pairs)
        missed.update(one.missed)
        spurious.update(one.spurious)
    return Detection(pairs, missed, spurious)


def match_points(
    a: NDArray[np.float64], b: NDArray[np.float64], radius: float
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """One-to-one pairs within ``radius``, nearest first; of equal distances the one further left, then further up.

    Parameters
    ----------
    a, b
        float64 of shape (N, 2) and (M, 2).
    radius
        Same unit; inclusive.

    Returns
    -------
    tuple of (ndarray, ndarray)
        Rows of ``a`` and of ``b``, pair by pair. The order of the points does not change which points are paired.
    """
    if not len(a) or not len(b):
        return np.empty(0, np.intp), np.empty(0, np.intp)
    near = cKDTree(a).sparse_distance_matrix(cKDTree(b), radius * (1 + 1e-12), output_type="ndarray")
    i, j = near["i"].astype(np.intp), near["j"].astype(np.intp)
    order = np.lexsort((b[j, 1], b[j, 0], a[i, 1], a[i, 0], near["v"]))
    free_a, free_b = [True] * len(a), [True] * len(b)
    chosen = []
    for k, one, other in zip(order.tolist(), i[order].tolist(), j[order].tolist(), strict=True):
        if free_a[one] and free_b[other]:
            free_a[one] = free_b[other] = False
            chosen.append(k)
    return i[chosen], j[chosen]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
