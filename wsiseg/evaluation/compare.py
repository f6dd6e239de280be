"""Comparison of a prediction with the truth, for one image or many: what `wsiseg evaluate` calls."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy
import shapely
from scipy.ndimage import label as label_pieces

from wsiseg.errors import ConfigError, FormatError
from wsiseg.evaluation.contingency import Overlaps, centroids, disjoint, instances, majority, outline_overlaps, overlaps
from wsiseg.evaluation.detection import RADIUS_UM, detect, pool_detections
from wsiseg.evaluation.metrics import class_quality, tally
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.evaluation.scores import (
    Evaluation,
    ImageScores,
    class_scores,
    has_types,
    image_values,
    means_of_truth,
    pooled_values,
)
from wsiseg.evaluation.summary import PointHits, mean_interval, retention
from wsiseg.formats.outlines import (
    Labels,
    Outlines,
    Points,
    Side,
    files_in,
    read_label,
    read_side,
    run_file,
    type_names,
)
from wsiseg.runtime.paths import kind_of
from wsiseg.runtime.text import did_you_mean, parse_json, read_text
from wsiseg.runtime.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Source = str | Path | NDArray[np.integer]

THRESHOLDS_F1 = (0.5,)  #: IoU


@dataclass(frozen=True)
class _Pair:
    """Sources of one image, and the options of its comparison."""

    name: str
    prediction: Path | NDArray[np.integer]
    truth: Path | NDArray[np.integer]
    prediction_types: Path | NDArray[np.integer] | None
    truth_types: Path | NDArray[np.integer] | None


@dataclass(frozen=True, kw_only=True)
class _Options:
    names: dict[str, str]
    mpp: float | None
    radius_um: float
    thresholds: tuple[float, ...]


def evaluate(
    prediction: Source,
    truth: Source,
    *,
    prediction_types: Source | None = None,
    truth_types: Source | None = None,
    classes: str | Path | Mapping[str, str] | None = None,
    mpp: float | None = None,
    radius_um: float = RADIUS_UM,
    thresholds: Sequence[float] = THRESHOLDS_F1,
    baseline: Source | None = None,
) -> Evaluation:
    """Compare a prediction with the truth.

    Parameters
    ----------
    prediction, truth
        Two label images (integers of shape (H, W)), two files, or two folders whose files are paired by stem; kinds of files: `inputs`.
        Outlines and a label image are compared on the grid of the image, two sets of outlines exactly.
    prediction_types, truth_types
        Images of type ids that go with label images; the type of an instance is the one of most of its px.
    classes
        Names of type ids, ``{"1": "tumour"}``, or a JSON file of that form.
    mpp
        Microns per px; beats what a file says. Needed for types and points, where no file says it.
    radius_um
        Within which two centroids are the same cell.
    thresholds
        IoU in (0, 1] at which F1 is wanted.
    baseline
        Another prediction; retention is the share of its scores that ``prediction`` reaches.

    Returns
    -------
    Evaluation
        Scores of each image and of all together, with and without types, and what is doubtful.

    Raises
    ------
    FormatError
        A file cannot be read or holds something else, an image has no partner, or two do not fit.
    ConfigError
        An option is out of range, or microns per px are needed and not known.

    Examples
    --------
    >>> import numpy as np
    >>> import wsiseg
    >>> truth = np.zeros((64, 64), int)
    >>> truth[8:24, 8:24], truth[40:56, 40:56] = 1, 2
    >>> prediction = np.zeros((64, 64), int)
    >>> prediction[8:24, 8:24] = 1
    >>> scores = wsiseg.evaluate(prediction, truth)
    >>> round(scores.pooled["pq"], 3)
    0.667
    """
    options = _Options(names=_class_names(classes), mpp=mpp, radius_um=radius_um, thresholds=tuple(thresholds))
    _check(options)
    notes: list[str] = []
    pairs = _pairs(prediction, truth, prediction_types, truth_types, notes)
    images = tuple(_compare(pair, options, notes) for pair in pairs)
    typed = has_types(images)
    values = tuple(image_values(image, typed=typed) for image in images)
    detection = pool_detections(i.detection for i in images if i.detection is not None)
    predicted = {p for _, p in detection.pairs} | set(detection.spurious)
    if typed and not predicted & set(detection.classes):
        theirs, ours = _format_names(sorted(predicted - {""})), _format_names(detection.classes)
        hint = next((hint for name in sorted(predicted - {""}) if (hint := did_you_mean(name, detection.classes))), "")
        notes.append(
            f"no type in common: {theirs} predicted, {ours} in the truth; {hint}names must be alike, --classes names the ids"
        )
    ratios: dict[str, float] = {}
    if baseline is not None:
        # The baseline's own types, if it has any, are in its files: an image of types belongs to one prediction only.
        other = tuple(_compare(pair, options, notes) for pair in _pairs(baseline, truth, None, truth_types, notes))
        typed_too = has_types(other)
        ratios = retention(values, [image_values(image, typed=typed_too) for image in other])
    said: dict[str, object] = {
        "prediction": _describe_source(prediction),
        "truth": _describe_source(truth),
        "baseline": _describe_source(baseline),
        "mpp": mpp,
        "radius_um": radius_um,
        "thresholds": list(thresholds),
        "versions": {
            "wsiseg": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
            "shapely": shapely.__version__,
        },
    }
    means = {
        m: mean_interval([row.get(m, np.nan) for row in values])
        for m in dict.fromkeys(m for row in values for m in row)
    }
    means |= means_of_truth(images)
    confusion = tuple((g, p, n) for (g, p), n in sorted(detection.pairs.items())) if typed else ()
    return Evaluation(
        images=images,
        values=values,
        means=means,
        pooled=pooled_values(images),
        classes=class_scores(images),
        confusion=confusion,
        retention=ratios,
        notes=tuple(dict.fromkeys(notes)),
        options=said,
    )


def _check(options: _Options) -> None:
    for value, name in ((options.mpp, "--mpp"), (options.radius_um, "--radius")):
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ConfigError(f"{name}: {value:g} is not allowed; a positive number of microns is needed")
    for threshold in options.thresholds:
        if not 0 < threshold <= 1:
            raise ConfigError(
                f"--thresholds: {threshold:g} is not an IoU; it must be above 0 and at most 1, for example 0.5,0.75"
            )


def _class_names(classes: str | Path | Mapping[str, str] | None) -> dict[str, str]:
    if classes is None:
        return {}
    if isinstance(classes, str | Path):
        classes = parse_json(read_text(Path(classes), FormatError), str(classes), FormatError)
        if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
            raise FormatError('--classes: an object of type ids and their names is needed, {"1": "tumour"}')
    return {str(key): name for key, name in classes.items()}


def _describe_source(source: Source | None) -> str | None:
    return None if source is None else "array" if isinstance(source, np.ndarray) else str(source)


def _pairs(
    prediction: Source, truth: Source, prediction_types: Source | None, truth_types: Source | None, notes: list[str]
) -> list[_Pair]:
    """The images, each with its files; those of folders by stem."""
    sides = {"prediction": _located(prediction), "truth": _located(truth)}
    kinds = {"types of the prediction": prediction_types, "types of the truth": truth_types}
    others = {what: None if source is None else _located(source) for what, source in kinds.items()}
    p, g = sides["prediction"], sides["truth"]
    if not isinstance(p, dict) and not isinstance(g, dict):
        t = [other if not isinstance(other, dict) else _wrong_kind(what, other) for what, other in others.items()]
        name = g.name if isinstance(g, Path) else "image"
        return [_Pair(name, p, g, *t)]
    if not isinstance(p, dict) or not isinstance(g, dict):
        raise FormatError(
            f"{_describe_source(prediction)} and {_describe_source(truth)}: one is a folder, the other a file; give two files or two folders"
        )
    missing = sorted(set(g) - set(p))
    if not set(g) & set(p):
        raise FormatError(
            f"{prediction} and {truth}: no name in common ({_format_names(sorted(p))}; {_format_names(missing)}); "
            "files are paired by their name without suffix"
        )
    if missing:
        raise FormatError(
            f"{prediction}: nothing for {_format_names(missing)} of {truth}; every image of the truth needs a prediction of the same name"
        )
    if set(p) - set(g):
        notes.append(f"{prediction}: {_format_names(sorted(set(p) - set(g)))} not in {truth}, left out")
    for what, other in others.items():
        if other is not None and (not isinstance(other, dict) or set(g) - set(other)):
            lacking = sorted(set(g) - set(other)) if isinstance(other, dict) else sorted(g)
            raise FormatError(
                f"{what}: nothing for {_format_names(lacking)}; a folder with an image of each name is needed"
            )
    return [
        _Pair(name, p[name], g[name], *(o[name] if isinstance(o, dict) else None for o in others.values()))
        for name in sorted(g)
    ]


def _located(source: Source) -> Path | NDArray[np.integer] | dict[str, Path]:
    """An array, a file, or the files of a folder by stem."""
    if isinstance(source, np.ndarray):
        return source
    path = Path(source)
    found = kind_of(path, FormatError)
    if found == "nothing":
        raise FormatError(f"{path}: no such file or folder; check the path")
    return run_file(path) or (files_in(path) if found == "folder" else path)


def _wrong_kind(what: str, files: dict[str, Path]) -> Path:
    raise FormatError(f"{what}: {_format_names(sorted(files))} in a folder; for one image give one file")


def _format_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _compare(pair: _Pair, options: _Options, notes: list[str]) -> ImageScores:
    p, g = _side(pair.prediction, pair.prediction_types, options), _side(pair.truth, pair.truth_types, options)
    notes += [*p.notes, *g.notes]
    where = (
        pair.name
        if isinstance(pair.truth, np.ndarray)
        else f"{_describe_source(pair.prediction)} and {_describe_source(pair.truth)}"
    )
    p, g = _in_one_frame(p, g, where, notes)
    if isinstance(p, Outlines) and isinstance(g, Labels):
        p = _within(p, g.ids.shape, where, notes)
    if isinstance(g, Outlines) and isinstance(p, Labels):
        g = _within(g, p.ids.shape, where, notes)
    o = None if isinstance(p, Points) or isinstance(g, Points) else _overlaps(p, g, where, notes)
    mpp = _mpp(p, g, options, where)
    names_p = _names(p, None if o is None else len(o.prediction_size))
    names_g = _names(g, None if o is None else len(o.truth_size))
    typed = p.types is not None and g.types is not None
    if mpp is None and (typed or o is None):
        raise ConfigError(
            f"{where}: types and points are matched within {options.radius_um:g} um, and no file says microns per px; pass --mpp"
        )
    detection = None if mpp is None else detect(_xy(g), _xy(p), options.radius_um / mpp, g.types, p.types)
    hits = _inside(p, g) if isinstance(p, Points) and not isinstance(g, Points) else None
    if (
        len(names_p)
        and len(names_g)
        and not (len(o.shared) if o is not None else detection is not None and detection.pairs)
    ):
        notes.append(
            f"{where}: the prediction does not overlap the truth anywhere; check that both have the same origin and scale"
        )
    notes += [
        f"{where}: one id for {parts} separate pieces in the {which}; is it a mask of the foreground? Every nucleus needs an id of its own"
        for which, side, names in (("prediction", p, names_p), ("truth", g, names_g))
        if isinstance(side, Labels) and len(names) == 1 and (parts := int(label_pieces(side.ids > 0)[1])) > 1
    ]
    quality = class_quality(o, names_g, names_p) if o is not None else {}
    return ImageScores(
        name=pair.name,
        tally=None if o is None else tally(o, options.thresholds),
        quality=quality,
        detection=detection,
        points=hits,
    )


def _side(source: Path | NDArray[np.integer], types: Path | NDArray[np.integer] | None, options: _Options) -> Side:
    if isinstance(source, np.ndarray) and (source.ndim != 2 or source.dtype.kind not in "uib"):
        raise FormatError(
            f"an array of {source.dtype} and shape {source.shape}; integers of shape (height, width) are needed"
        )
    side = Labels(source) if isinstance(source, np.ndarray) else read_side(source, options.names)
    notes = list(side.notes)
    if types is None:
        return side
    if not isinstance(side, Labels):
        raise FormatError(
            f"{_describe_source(source)}: an image of types was given for it, but only label images need one; leave it out"
        )
    ids = majority(side.ids, types if isinstance(types, np.ndarray) else read_label(types, notes))
    return Labels(side.ids, type_names(options.names, [i or None for i in ids.tolist()]), tuple(notes))


def _in_one_frame(p: Side, g: Side, where: str, notes: list[str]) -> tuple[Side, Side]:
    """Move outlines in QuPath's frame by the bounds of the slide when the other side is absolute."""
    if not isinstance(p, Outlines) or not isinstance(g, Outlines) or p.frame == g.frame:
        return p, g
    origin = p.origin or g.origin
    if origin is None or origin == (0.0, 0.0):
        return p, g
    notes.append(
        f"{where}: the GeoJSON was moved by ({origin[0]:g}, {origin[1]:g}) px, from QuPath's origin to that of the slide"
    )
    return _moved(p, origin), _moved(g, origin)


def _moved(side: Outlines, origin: tuple[float, float]) -> Outlines:
    if side.frame == "slide":
        return side
    return Outlines(
        polygons=shapely.transform(side.polygons, lambda xy: xy + origin),
        types=side.types,
        mpp=side.mpp,
        frame="slide",
        origin=origin,
        notes=side.notes,
    )


def _within(side: Outlines, shape: tuple[int, ...], where: str, notes: list[str]) -> Outlines:
    """Drop the outlines that lie wholly outside the label image: it holds no annotation for them."""
    x0, y0, x1, y1 = shapely.bounds(side.polygons).reshape(-1, 4).T
    kept = (x1 > 0) & (y1 > 0) & (x0 < shape[1]) & (y0 < shape[0])
    if kept.all():
        return side
    size = f"{shape[1]} x {shape[0]} px"
    if not kept.any():
        raise FormatError(
            f"{where}: all {len(kept)} outlines lie outside the label image of {size}; both must have the same origin and scale"
        )
    notes.append(
        f"{where}: {int((~kept).sum())} of {len(kept)} outlines lie outside the label image of {size} and were left out"
    )
    types = None if side.types is None else side.types[kept]
    return Outlines(
        polygons=side.polygons[kept], types=types, mpp=side.mpp, frame=side.frame, origin=side.origin, notes=side.notes
    )


def _overlaps(p: Labels | Outlines, g: Labels | Outlines, where: str, notes: list[str]) -> Overlaps:
    if isinstance(p, Outlines) and isinstance(g, Outlines):
        (outlines_g, cut_g), (outlines_p, cut_p) = disjoint(g.polygons), disjoint(p.polygons)
        for cut, n, which in ((cut_g, len(g.polygons), "truth"), (cut_p, len(p.polygons), "prediction")):
            if cut:
                notes.append(
                    f"{where}: {cut} of {n} outlines of the {which} partly overlap others; the overlap was given to the later one"
                )
        return outline_overlaps(outlines_g, outlines_p)
    if isinstance(p, Labels) and isinstance(g, Labels) and p.ids.shape != g.ids.shape:
        raise FormatError(f"{where}: {_size(p.ids)} and {_size(g.ids)} px; two label images must have the same size")
    shape = p.ids.shape if isinstance(p, Labels) else g.ids.shape if isinstance(g, Labels) else (0, 0)
    (ids_g, count_g), (ids_p, count_p) = _ids(g, shape), _ids(p, shape)
    return overlaps(ids_g, ids_p, truth_count=count_g, prediction_count=count_p)


def _ids(side: Labels | Outlines, shape: tuple[int, ...]) -> tuple[NDArray[np.integer], int | None]:
    if isinstance(side, Labels):
        return side.ids, None
    return rasterise(side.polygons, (shape[0], shape[1])), len(side.polygons)


def _size(image: NDArray[np.integer]) -> str:
    return f"{image.shape[1]} x {image.shape[0]}"


def _mpp(p: Side, g: Side, options: _Options, where: str) -> float | None:
    """Microns per px from ``--mpp``, else from a file; two files that disagree are not in one frame."""
    if options.mpp is not None:
        return options.mpp
    found = [side.mpp for side in (p, g) if isinstance(side, Outlines) and side.mpp is not None]
    if len(found) == 2 and abs(found[0] - found[1]) > 0.01 * found[0]:
        raise FormatError(
            f"{where}: {found[0]:g} and {found[1]:g} microns per px; both must be in px of the same slide; pass --mpp if they are"
        )
    return found[0] if found else None


def _names(side: Side, count: int | None) -> NDArray[np.object_]:
    """Types of all cells, empty for none."""
    if side.types is not None:
        return side.types
    if count is None:
        count = (
            len(side.polygons)
            if isinstance(side, Outlines)
            else len(side.xy)
            if isinstance(side, Points)
            else len(instances(side.ids))
        )
    return np.full(count, "", object)


def _xy(side: Side) -> NDArray[np.float64]:
    if isinstance(side, Points):
        return side.xy
    return centroids(side.ids) if isinstance(side, Labels) else shapely.get_coordinates(shapely.centroid(side.polygons))


def _inside(p: Points, g: Labels | Outlines) -> PointHits:
    """Points in a cell of the truth, and in one of their own type. A point with both coordinates whole is that pixel."""
    owner = np.full(len(p.xy), -1, np.intp)
    if isinstance(g, Outlines):
        point, polygon = shapely.STRtree(g.polygons).query(shapely.points(p.xy), predicate="intersects")
        owner[point[::-1]] = polygon[::-1]
    else:
        ids = instances(g.ids)
        column, row = np.floor(p.xy).astype(np.int64).T
        seen = (column >= 0) & (row >= 0) & (column < g.ids.shape[1]) & (row < g.ids.shape[0])
        value = np.zeros(len(p.xy), g.ids.dtype)
        value[seen] = g.ids[row[seen], column[seen]]
        owner[value > 0] = np.searchsorted(ids, value[value > 0])
    inside = owner >= 0
    if p.types is None or g.types is None:
        return PointHits(len(owner), int(inside.sum()), None)
    right = (g.types[owner[inside]] == p.types[inside]) & (p.types[inside] != "")
    return PointHits(len(owner), int(inside.sum()), int(right.sum()))
