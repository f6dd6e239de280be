"""The sparse table that every metric is computed from: which instances share how much.

Label images are counted by runs: along a row the pair of ids stays the same for many px, and only where it changes is there something to sort.
Outlines are intersected exactly, in px², without a raster: that is how whole slides are compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats.geojson_geometry import polygonal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

BAND_PX = 4_000_000  #: px processed together: some 100 MB of working memory whatever the image
PAIRS = 200_000  #: outlines intersected together


@dataclass(frozen=True, kw_only=True)
class Overlaps:
    """Pairs that share something, and the sizes of all instances; px of label images, px² of outlines.

    Attributes
    ----------
    truth, prediction
        intp of shape (K,): rows of each pair in ``truth_size`` and ``prediction_size``.
    shared
        float64 of shape (K,), > 0.
    truth_size, prediction_size
        float64 of shape (N,) and (M,); of label images in ascending order of id. 0 for an instance that lies wholly beneath others.
    """

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


def overlaps(
    truth: NDArray[np.integer],
    prediction: NDArray[np.integer],
    *,
    truth_count: int | None = None,
    prediction_count: int | None = None,
) -> Overlaps:
    """Count the shared px of two label images.

    Parameters
    ----------
    truth, prediction
        Integers of one shape, 0 = background, no negative id.
    truth_count, prediction_count
        When given, the instances are those of id 1 ... count, with or without a px; else the ids that occur, in ascending order.

    Returns
    -------
    Overlaps
        In px. 1,000,000 cells on 20,000 x 20,000 px take seconds.

    Raises
    ------
    FormatError
        The shapes differ, or an id is negative.
    """
    if truth.shape != prediction.shape:
        raise FormatError(
            f"label images differ in shape: truth {truth.shape}, prediction {prediction.shape}; both must show the same pixels"
        )
    g, p, count = pair_counts(truth, prediction)
    ids_g, size_g = _sizes(g, count, truth_count)
    ids_p, size_p = _sizes(p, count, prediction_count)
    both = (g > 0) & (p > 0)
    return Overlaps(
        truth=np.searchsorted(ids_g, g[both]),
        prediction=np.searchsorted(ids_p, p[both]),
        shared=count[both].astype(np.float64),
        truth_size=size_g,
        prediction_size=size_p,
    )


def pair_counts(
    a: NDArray[np.integer], b: NDArray[np.integer]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Each pair of values that two images of one shape have at the same place, zeros included, and its px; in ascending order of the pair."""
    top_a, top_b = _top(a), _top(b)
    if (top_a + 1) * (top_b + 1) > np.iinfo(np.int64).max:  # large ids, such as hashes: renumber them
        ids_a, ids_b = np.unique(a), np.unique(b)
        i, j, count = pair_counts(np.searchsorted(ids_a, a), np.searchsorted(ids_b, b))
        return ids_a[i].astype(np.int64), ids_b[j].astype(np.int64), count
    codes, counts = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for band in _bands(a):
        x, y = a[band].ravel(), b[band].ravel()
        starts = np.flatnonzero(np.concatenate([[True], (x[1:] != x[:-1]) | (y[1:] != y[:-1])]))
        code, count = _sums(
            x[starts].astype(np.int64) * (top_b + 1) + y[starts].astype(np.int64), np.diff(starts, append=x.size)
        )
        codes.append(code)
        counts.append(count)
    code, count = _sums(np.concatenate(codes), np.concatenate(counts))
    return code // (top_b + 1), code % (top_b + 1), count


def instances(label: NDArray[np.integer]) -> NDArray[np.int64]:
    """The ids of a label image, ascending, without the background."""
    found = pair_counts(label, label)[0]
    return found[found > 0]


def centroids(label: NDArray[np.integer]) -> NDArray[np.float64]:
    """(x, y) of the centre of mass of each instance, in ascending order of id; px, corner frame (the centre of px 0 is 0.5)."""
    width = label.shape[1]
    ids: list[NDArray[np.int64]] = [np.empty(0, np.int64)]
    moments: list[NDArray[np.float64]] = [np.empty((0, 3))]
    for band in _bands(label):
        values = label[band]
        new = np.ones(values.shape, bool)
        new[:, 1:] = values[:, 1:] != values[:, :-1]
        starts = np.flatnonzero(new)
        length = np.diff(starts, append=values.size)
        of_run = values.ravel()[starts].astype(np.int64)
        starts, length, of_run = starts[of_run > 0], length[of_run > 0], of_run[of_run > 0]
        row, column = np.divmod(starts, width)
        moment = np.stack([length, length * (column + length / 2), length * (row + band.start + 0.5)], axis=1)
        found, summed = _sums(of_run, moment)
        ids.append(found)
        moments.append(summed)
    _, total = _sums(np.concatenate(ids), np.concatenate(moments))
    return np.asarray(total[:, 1:] / total[:, :1])


def majority(label: NDArray[np.integer], classes: NDArray[np.integer]) -> NDArray[np.int64]:
    """Class id of the most px of each instance, in ascending order of id; 0 where no px has one, ties to the lower id.

    Raises
    ------
    FormatError
        The shapes differ, or an id is negative.
    """
    if label.shape != classes.shape:
        raise FormatError(
            f"the image of types has the shape {classes.shape}, its label image {label.shape}; both must show the same pixels"
        )
    instance, kind, count = pair_counts(label, classes)
    ids = np.unique(instance[instance > 0])
    out = np.zeros(len(ids), np.int64)
    typed = (instance > 0) & (kind > 0)
    instance, kind, count = instance[typed], kind[typed], count[typed]
    order = np.lexsort((kind, -count, instance))
    owner, first = np.unique(instance[order], return_index=True)
    out[np.searchsorted(ids, owner)] = kind[order][first]
    return out


def outline_overlaps(truth: NDArray[np.object_], prediction: NDArray[np.object_]) -> Overlaps:
    """Shared areas of two sets of outlines.

    Parameters
    ----------
    truth, prediction
        Valid shapely Polygons or MultiPolygons of shape (N,) and (M,), px, those of one set disjoint (`disjoint`).

    Returns
    -------
    Overlaps
        In px².
    """
    g, p = shapely.STRtree(prediction).query(truth, predicate="intersects")
    order = np.lexsort((p, g))
    g, p = g[order], p[order]
    parts = [slice(k, k + PAIRS) for k in range(0, len(g), PAIRS)]
    shared = np.concatenate(
        [np.empty(0), *(shapely.area(shapely.intersection(truth[g[k]], prediction[p[k]])) for k in parts)]
    )
    some = shared > 0  # outlines that touch along a line share nothing
    return Overlaps(
        truth=g[some],
        prediction=p[some],
        shared=shared[some],
        truth_size=shapely.area(truth),
        prediction_size=shapely.area(prediction),
    )


def disjoint(polygons: NDArray[np.object_]) -> tuple[NDArray[np.object_], int]:
    """Clip overlapping outlines in favour of the later one, as a label image does, and count those that lost more than 1 %.

    Without this a prediction that outlines a nucleus twice would count its area twice. An outline that lies wholly beneath later ones becomes
    empty and stays in the list: it is one too many, and counts as such.
    """
    i, j = shapely.STRtree(polygons).query(polygons, predicate="intersects")
    i, j = i[i < j], j[i < j]
    some = shapely.area(shapely.intersection(polygons[i], polygons[j])) > 0
    i, j = i[some], j[some]
    out, cut = polygons.copy(), 0
    for rows in np.split(np.argsort(i, kind="stable"), np.flatnonzero(np.diff(np.sort(i))) + 1):
        if len(rows):
            k = int(i[rows[0]])
            out[k] = polygonal(shapely.difference(polygons[k], shapely.union_all(polygons[j[rows]])))
            cut += shapely.area(out[k]) < 0.99 * shapely.area(polygons[k])
    return out, cut


def _sizes(
    ids: NDArray[np.int64], count: NDArray[np.int64], wanted: int | None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    found, size = _sums(ids[ids > 0], count[ids > 0])
    if wanted is None:
        return found, size.astype(np.float64)
    sizes = np.zeros(wanted)
    sizes[found - 1] = size
    return np.arange(1, wanted + 1), sizes


def _sums(keys: NDArray[np.int64], values: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[Any]]:
    """Distinct keys, ascending, and the sum of the values of each."""
    if not len(keys):
        return keys, values
    order = np.argsort(keys)
    keys = keys[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
    return keys[starts], np.add.reduceat(values[order], starts, axis=0)


def _bands(image: NDArray[np.integer]) -> Iterator[slice]:
    rows = max(1, BAND_PX // max(1, image[:1].size))
    return (slice(k, min(k + rows, len(image))) for k in range(0, len(image) if image.size else 0, rows))


def _top(image: NDArray[np.integer]) -> int:
    if image.size and int(image.min()) < 0:
        raise FormatError(
            f"a label image holds the id {int(image.min())}; ids are 0 for the background and positive for instances"
        )
    return int(image.max(initial=0))
