"""Instance metrics from one sparse table of overlaps between truth and prediction.

Symbol   meaning
g, p     an instance of the truth G, of the prediction P (label images, 0 = background)
IoU      |g & p| / |g | p|

References
----------
.. [1] Kumar et al., A Dataset and a Technique for Generalized Nuclear Segmentation, IEEE TMI 2017 (AJI), doi:10.1109/TMI.2017.2677499.
.. [2] Kirillov et al., Panoptic Segmentation, CVPR 2019 (PQ), arXiv:1801.00868.
.. [3] Caicedo et al., Nucleus segmentation across imaging experiments, Nature Methods 2019 (mSA), doi:10.1038/s41592-019-0612-7.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components

if TYPE_CHECKING:
    from numpy.typing import NDArray

THRESHOLDS = np.arange(0.5, 1.0, 0.05)  #: of mSA


@dataclass(frozen=True)
class Overlaps:
    """Pairs that share pixels, and the sizes of all instances (ids are made consecutive)."""

    truth: NDArray[np.intp]
    prediction: NDArray[np.intp]
    shared: NDArray[np.float64]
    truth_size: NDArray[np.float64]
    prediction_size: NDArray[np.float64]

    @property
    def union(self) -> NDArray[np.float64]:
        """|g | p| of each pair."""
        return self.truth_size[self.truth] + self.prediction_size[self.prediction] - self.shared

    @property
    def iou(self) -> NDArray[np.float64]:
        """IoU of each pair."""
        return self.shared / self.union


def overlaps(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> Overlaps:
    """Count shared pixels of two label images of one shape."""
    if truth.shape != prediction.shape:
        raise ValueError(f"label images differ in shape: truth {truth.shape}, prediction {prediction.shape}")
    ids_g, g = np.unique(truth.ravel(), return_inverse=True)
    ids_p, p = np.unique(prediction.ravel(), return_inverse=True)
    table = sparse.coo_matrix((np.ones(g.size), (g, p)), shape=(len(ids_g), len(ids_p))).tocsr()
    keep_g, keep_p = ids_g != 0, ids_p != 0
    sizes_g, sizes_p = np.asarray(table.sum(1)).ravel(), np.asarray(table.sum(0)).ravel()
    pairs = table[keep_g][:, keep_p].tocoo()
    return Overlaps(pairs.row.astype(np.intp), pairs.col.astype(np.intp), pairs.data, sizes_g[keep_g], sizes_p[keep_p])


def dice(o: Overlaps) -> float:
    """Pixel Dice 2|G & P| / (|G| + |P|); two empty images give 1."""
    total = o.truth_size.sum() + o.prediction_size.sum()
    return float(2 * o.shared.sum() / total) if total else 1.0


def aji(o: Overlaps) -> float:
    """Aggregated Jaccard index [1]_: every g with its best p; a p may serve several g, unused p count against."""
    if not len(o.truth_size) and not len(o.prediction_size):
        return 1.0
    order = np.lexsort((-o.iou, o.truth))
    first = order[np.unique(o.truth[order], return_index=True)[1]]
    found, used = np.zeros(len(o.truth_size), bool), np.zeros(len(o.prediction_size), bool)
    found[o.truth[first]], used[o.prediction[first]] = True, True
    missed = o.truth_size[~found].sum() + o.prediction_size[~used].sum()
    return float(o.shared[first].sum() / (o.union[first].sum() + missed))


def matched_iou(o: Overlaps) -> NDArray[np.float64]:
    """IoU of the one-to-one matching that maximises their sum (Hungarian, solved within each group of touching instances)."""
    n = len(o.truth_size)
    graph = sparse.coo_matrix((np.ones(len(o.shared)), (o.truth, n + o.prediction)), shape=(n + len(o.prediction_size),) * 2)
    _, group = connected_components(graph, directed=False)
    of_pair = group[o.truth]
    out = []
    for rows in np.split(np.argsort(of_pair, kind="stable"), np.flatnonzero(np.diff(np.sort(of_pair))) + 1):
        if not len(rows):
            continue
        g, gi = np.unique(o.truth[rows], return_inverse=True)
        p, pi = np.unique(o.prediction[rows], return_inverse=True)
        cost = np.zeros((len(g), len(p)))
        cost[gi, pi] = o.iou[rows]
        r, c = linear_sum_assignment(-cost)
        out.append(cost[r, c])
    matched = np.concatenate(out) if out else np.empty(0)
    return matched[matched > 0]


def pq(o: Overlaps) -> float:
    """Panoptic quality [2]_: sum of IoU > 0.5 over TP + FP / 2 + FN / 2; two empty images give 1."""
    good = o.iou[o.iou > 0.5]  # such pairs are one-to-one
    total = (len(o.truth_size) + len(o.prediction_size)) / 2
    return float(good.sum() / total) if total else 1.0


def msa(o: Overlaps) -> float:
    """Mean segmentation accuracy [3]_: TP / (TP + FP + FN) at IoU >= 0.50, 0.55 ... 0.95, averaged."""
    total = len(o.truth_size) + len(o.prediction_size)
    if not total:
        return 1.0
    hits = (matched_iou(o)[:, None] >= THRESHOLDS - 1e-9).sum(0)
    return float(np.mean(hits / (total - hits)))


def score(truth: NDArray[np.integer], prediction: NDArray[np.integer]) -> dict[str, float]:
    """AJI, PQ, mSA and Dice of two label images."""
    o = overlaps(truth, prediction)
    return {"aji": aji(o), "pq": pq(o), "msa": msa(o), "dice": dice(o)}
