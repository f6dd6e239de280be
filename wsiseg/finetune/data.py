"""Labelled images to learn from: folders of images, slides with outlines, and corrected runs.

What is read::

    DATA/image/*.png .tif .jpg          RGB; the folder may be called images
    DATA/label/*.png .tif .npy          of the same stems: integer ids, 0 = background; labels, mask, masks
    DATA/type/*.png ...                 optional: type ids; types
    DATA/classes.json                   optional: names of the type ids, {"1": "tumour"}

    DATA/a.svs  DATA/a.geojson          slides, and outlines of the same stem (.geojson .geojson.gz .parquet ...)
    DATA/a.roi.geojson                  optional: where all cells are outlined

    DATA/manifest.json                  a run, or DATA/*/manifest.json: several
    DATA/corrected.geojson              its cells as somebody corrected them, exported from QuPath
    DATA/corrected.roi.geojson          optional: where they were corrected

    DATA/images.csv                     optional: columns image (stem), group (slide or patient), mpp

Without a region, only what lies within ``NEAR_UM`` of an outline is taken as known: an empty place may be one where nobody looked.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import shapely
from scipy import ndimage
from skimage.measure import label as components

from wsiseg.config import check_mpp
from wsiseg.errors import FormatError, SlideError, counted
from wsiseg.evaluation.contingency import majority
from wsiseg.evaluation.rasterize import rasterise
from wsiseg.formats.outlines import DOCUMENTS, IMAGES, Outlines, read_label, read_side
from wsiseg.formats.regions import read_regions
from wsiseg.formats.text_tables import read_table
from wsiseg.geometry import Box, Lattice
from wsiseg.runs.folder import RunFolder
from wsiseg.runtime.paths import kind_of, names_in, normal, readable
from wsiseg.runtime.text import parse_json, read_text
from wsiseg.slide import open_slide, read_region

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from wsiseg.records import SlideInfo

FIELD_PX = 1024  #: side of the pieces that slides are cut into, model px
NEAR_UM = 5.0  #: how far from an outline the background is known: less than a nucleus
LARGEST_PX = 60_000_000  #: of an image that is not a slide
_IMAGE_FOLDERS, _LABEL_FOLDERS, _TYPE_FOLDERS = (
    ("image", "images"),
    ("label", "labels", "mask", "masks"),
    ("type", "types"),
)
_PICTURES = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".bmp")
_OUTLINES = (*DOCUMENTS, ".parquet")
_CORRECTED = "corrected"
_BARCODE = re.compile(r"TCGA-[0-9A-Z]{2}-[0-9A-Z]{4}")  # patient in the names of TCGA's slides
_HOW = "give a folder with image/ and label/, slides with outlines of the same names, or a corrected run"


@dataclass(frozen=True, kw_only=True)
class LabelledImage:
    """An image with its labels, at the model's scale.

    Attributes
    ----------
    name
        Stem of the image; of a piece of a slide with its corner.
    group
        Slide or patient: images of one group never lie on both sides of a split.
    image
        uint8 RGB of shape (H, W, 3).
    label
        int32 of shape (H, W): 1 to n, without gaps.
    known
        bool of shape (H, W): where it is known what is a nucleus and what is not.
    types
        int64 of shape (n + 1,): 0 = unknown, k = ``type_names[k - 1]`` of the dataset.
    digest
        sha256 of the files, hexadecimal.
    """

    name: str
    group: str
    image: NDArray[np.uint8]
    label: NDArray[np.int32]
    known: NDArray[np.bool_]
    types: NDArray[np.int64]
    digest: str


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """Labelled images and the names of their types. ``place``: what was read; ``notes``: what is doubtful."""

    place: str
    images: tuple[LabelledImage, ...]
    type_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def nuclei(self) -> int:
        """Instances in all images."""
        return sum(len(image.types) - 1 for image in self.images)

    def digest(self) -> str:
        """sha256 over the files of all images."""
        lines = sorted(f"{image.name} {image.digest}" for image in self.images)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    def with_types(self, names: Sequence[str]) -> Dataset:
        """The same with types numbered by ``names``; a type that is not among them becomes unknown."""
        code = np.array([0, *(names.index(name) + 1 if name in names else 0 for name in self.type_names)])
        images = tuple(replace(image, types=code[image.types]) for image in self.images)
        return replace(self, images=images, type_names=tuple(names))


def read_dataset(folder: Path, *, model_mpp: float, mpp: float | None = None) -> Dataset:
    """Read labelled images at a model's scale.

    Parameters
    ----------
    folder
        Of one of the forms above.
    model_mpp
        Microns per px to read them at.
    mpp
        Microns per px of images that ``images.csv`` does not name one for; it beats what their files say.

    Returns
    -------
    Dataset
        Images in order of their names; at least one nucleus in all of them together.

    Raises
    ------
    FormatError
        The folder has none of the forms, an image lacks its label or has one of another size, or labels hold no instances.
    SlideError
        An image cannot be read, or its scale is not known.
    """
    check_mpp(mpp)
    if kind_of(folder, FormatError) != "folder":
        raise FormatError(f"{folder}: no such folder; {_HOW}")
    table = _read_table(folder)
    names = _class_names(folder)
    kinds: list[tuple[LabelledImage, list[str]]] = []
    notes: list[str] = []
    runs = [folder, *(folder / name for name in names_in(folder, FormatError))]
    runs = [run for run in runs if kind_of(run / "manifest.json", FormatError) == "file"]
    if image_folder := _folder(folder, _IMAGE_FOLDERS):
        kinds += _images(folder, image_folder, table, names, model_mpp, mpp)
    elif runs:
        for run in runs:
            kinds += _corrected_run(run, names, model_mpp, notes)
    else:
        kinds += _slides(folder, table, names, model_mpp, mpp, notes)
    images, type_names = _number_types(kinds)
    data = Dataset(place=str(folder), images=images, type_names=type_names, notes=tuple(dict.fromkeys(notes)))
    if not data.nuclei:
        raise FormatError(
            f"{folder}: {counted(len(images), 'image')}, and no nucleus is labelled in any; check the labels"
        )
    return data


# Folders of images


def _images(
    folder: Path,
    image_folder: Path,
    table: Mapping[str, dict[str, str]],
    names: Mapping[str, str],
    model_mpp: float,
    mpp: float | None,
) -> Iterator[tuple[LabelledImage, list[str]]]:
    label_folder, type_folder = _folder(folder, _LABEL_FOLDERS), _folder(folder, _TYPE_FOLDERS)
    if label_folder is None:
        raise FormatError(f"{folder}: {image_folder.name}/, and no label/ beside it; {_HOW}")
    pictures, labels = _by_stem(image_folder, _PICTURES), _by_stem(label_folder, IMAGES)
    types = _by_stem(type_folder, IMAGES) if type_folder else {}
    if not pictures:
        raise FormatError(f"{image_folder}: no image in it; {', '.join(_PICTURES)} are read")
    for stem, path in pictures.items():
        if stem not in labels:
            raise FormatError(f"{path}: no label of this name in {label_folder}; add it, or take the image out")
        row = table.get(stem, {})
        yield _image(path, labels[stem], types.get(stem), row, names, model_mpp, mpp)


def _image(
    path: Path,
    label_path: Path,
    type_path: Path | None,
    row: Mapping[str, str],
    names: Mapping[str, str],
    model_mpp: float,
    mpp: float | None,
) -> tuple[LabelledImage, list[str]]:
    ids = read_label(label_path, [])
    with open_slide(path, mpp=_scale(row, mpp, path), reader="image") as reader:
        width, height = reader.info.size_px0
        if width * height > LARGEST_PX:
            raise SlideError(
                f"{path}: {width} x {height} px is a slide; give outlines of its cells instead of a label image"
            )
        if ids.shape != (height, width):
            found = f"{ids.shape[1]} x {ids.shape[0]} px, and {path.name} {width} x {height}"
            raise FormatError(f"{label_path}: the label has {found}; both must show the same pixels")
        lattice = Lattice(reader.info.mpp, model_mpp)
        columns, rows = lattice.model_size((width, height))
        image = read_region(reader, Box(0, 0, columns, rows), lattice)
    _require_instances(ids, label_path)
    kind = np.zeros(0, np.int64)
    if type_path is not None:
        try:
            kind = majority(ids, read_label(type_path, []))
        except FormatError as error:
            raise FormatError(f"{type_path}: {error}") from error
    values = np.unique(ids[ids > 0])
    x, y = (
        np.minimum(((np.arange(n) + 0.5) * lattice.scale).astype(int), m - 1)
        for n, m in ((columns, width), (rows, height))
    )
    code = np.searchsorted(values, ids) + 1
    label, kept = _without_gaps(np.where(ids > 0, code, 0)[y[:, None], x])
    words = ["", *(names.get(str(kind[k - 1]), str(kind[k - 1])) if len(kind) and kind[k - 1] else "" for k in kept)]
    files = [path, label_path, *([type_path] if type_path else [])]
    labelled = LabelledImage(
        name=path.stem,
        group=_group(row, path.stem),
        image=image,
        label=label,
        known=np.ones(label.shape, bool),
        types=np.zeros(len(words), np.int64),
        digest=_digest(files),
    )
    return labelled, words


def _require_instances(ids: NDArray[np.integer], path: Path) -> None:
    """Refuse a mask of the foreground: one id for several pieces."""
    if len(np.unique(ids[ids > 0])) == 1 and (pieces := int(components(ids > 0, connectivity=2).max())) > 1:
        raise FormatError(
            f"{path}: one id for {pieces} separate pieces, a mask of the foreground; every nucleus needs an id of its own"
        )


# Slides


def _slides(
    folder: Path,
    table: Mapping[str, dict[str, str]],
    names: Mapping[str, str],
    model_mpp: float,
    mpp: float | None,
    notes: list[str],
) -> Iterator[tuple[LabelledImage, list[str]]]:
    present = names_in(folder, FormatError)
    outlined = {
        normal(name[: -len(s)]): folder / name for name in present if (s := _suffix(name)) and ".roi." not in name
    }
    found = False
    for name in present:
        stem = normal(Path(name).stem)
        if (
            stem not in outlined
            or _suffix(name)
            or kind_of(folder / name, FormatError) != "file"
            or name.startswith(".")
        ):
            continue
        found = True
        row = table.get(stem, {})
        region = next((folder / n for n in present if n.startswith(f"{stem}.roi.") and _suffix(n)), None)
        yield from _pieces(
            folder / name,
            outlined[stem],
            region,
            names,
            model_mpp,
            _scale(row, mpp, folder / name),
            _group(row, stem),
            notes,
        )
    if not found:
        raise FormatError(f"{folder}: neither image/ and label/, nor slides with outlines, nor a run; {_HOW}")


def _corrected_run(
    folder: Path, names: Mapping[str, str], model_mpp: float, notes: list[str]
) -> Iterator[tuple[LabelledImage, list[str]]]:
    manifest = RunFolder(folder).manifest()
    present = names_in(folder, FormatError)
    corrected = [n for n in present if _suffix(n) and n == f"{_CORRECTED}{_suffix(n)}"]
    if manifest is None or not corrected:
        raise FormatError(
            f"{folder}: a run without corrected.geojson; correct its cells in QuPath, export them as GeoJSON and save them there"
        )
    region = next((folder / n for n in present if n.startswith(f"{_CORRECTED}.roi.") and _suffix(n)), None)
    slide = Path(str(manifest.slide.get("path", "")))
    yield from _pieces(
        slide,
        folder / corrected[0],
        region,
        names,
        model_mpp,
        float(manifest.slide["mpp"]),
        _group({}, slide.stem),
        notes,
    )


def _pieces(
    slide: Path,
    outlines_path: Path,
    region_path: Path | None,
    names: Mapping[str, str],
    model_mpp: float,
    mpp: float | None,
    group: str,
    notes: list[str],
) -> Iterator[tuple[LabelledImage, list[str]]]:
    """The pieces of a slide that hold outlined cells, or lie in a region where all are outlined."""
    side = read_side(outlines_path, names)
    if not isinstance(side, Outlines):
        raise FormatError(f"{outlines_path}: points, not outlines; outlined cells are needed")
    notes += side.notes
    with open_slide(slide, mpp=mpp) as reader:
        digest = _digest([outlines_path, *([region_path] if region_path else []), slide])
        lattice = Lattice(reader.info.mpp, model_mpp)
        polygons = shapely.transform(side.polygons, _to_model(reader.info, lattice, side.frame))
        width, height = lattice.model_size(reader.info.size_px0)
        if not shapely.intersects(shapely.box(0, 0, width, height), polygons).any():
            raise FormatError(f"{outlines_path}: all outlines lie outside {slide.name}; do the two belong together?")
        if region_path:
            drawn, more = read_regions(region_path, reader.info)
            notes += more
            known = shapely.transform(drawn, lattice.to_model)
        else:
            notes.append(
                f"{outlines_path}: no region beside it, so only what is within {NEAR_UM:g} um of an outline is learned"
            )
            known = shapely.union_all(shapely.buffer(shapely.envelope(polygons), NEAR_UM / model_mpp))
        tree, shapes = shapely.STRtree(polygons), known
        shapely.prepare(shapes)
        types = side.types if side.types is not None else np.full(len(polygons), "", object)
        for y in range(0, height, FIELD_PX):
            for x in range(0, width, FIELD_PX):
                box = Box(x, y, min(x + FIELD_PX, width), min(y + FIELD_PX, height))
                if not shapely.intersects(shapes, shapely.box(*box)):
                    continue
                rows = np.sort(tree.query(shapely.box(*box), predicate="intersects"))
                yield _piece(
                    reader, lattice, box, polygons[rows], types[rows], known, f"{slide.stem}_{x}_{y}", group, digest
                )


def _to_model(info: SlideInfo, lattice: Lattice, frame: str) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    shift = (0, 0) if frame == "slide" or info.bounds is None else info.bounds[:2]
    return lambda xy: lattice.to_model(xy + shift)


def _piece(
    reader: Any,  # noqa: ANN401 - a SlideReader
    lattice: Lattice,
    box: Box,
    polygons: NDArray[np.object_],
    types: NDArray[np.object_],
    known: shapely.Geometry,
    name: str,
    group: str,
    digest: str,
) -> tuple[LabelledImage, list[str]]:
    shape = (box.height, box.width)
    painted = rasterise(shapely.transform(polygons, lambda xy: xy - (box.x0, box.y0)), shape)
    label, kept = _without_gaps(painted)
    inside = shapely.intersection(known, shapely.box(*box))
    parts = np.array([p for p in shapely.get_parts(inside) if p.geom_type == "Polygon"], object)
    sure = rasterise(shapely.transform(parts, lambda xy: xy - (box.x0, box.y0)), shape) > 0
    labelled = LabelledImage(
        name=name,
        group=group,
        image=read_region(reader, box, lattice),
        label=label,
        known=sure | ndimage.binary_dilation(label > 0, iterations=2),
        types=np.zeros(len(kept) + 1, np.int64),
        digest=digest,
    )
    return labelled, ["", *(str(types[k - 1]) for k in kept)]


# What all have in common


def _number_types(found: list[tuple[LabelledImage, list[str]]]) -> tuple[tuple[LabelledImage, ...], tuple[str, ...]]:
    """Images whose types are numbers, and the names of the types in alphabetical order."""
    names = sorted({word for _, words in found for word in words if word})
    code = {"": 0} | {name: k for k, name in enumerate(names, 1)}
    return tuple(replace(image, types=np.array([code[w] for w in words], np.int64)) for image, words in found), tuple(
        names
    )


def _without_gaps(label: NDArray[np.integer]) -> tuple[NDArray[np.int32], NDArray[np.integer]]:
    """Ids 1 to n, and the former id of each."""
    kept = np.unique(label[label > 0])
    return np.where(label > 0, np.searchsorted(kept, label) + 1, 0).astype(np.int32), kept


def _read_table(folder: Path) -> dict[str, dict[str, str]]:
    """Rows of ``images.csv`` by image."""
    path = folder / "images.csv"
    if kind_of(path, FormatError) != "file":
        return {}
    table = read_table(
        read_text(path, FormatError), str(path), FormatError, known=("image", "group", "mpp"), numbers=("mpp",)
    )
    if "image" not in table.columns:
        raise FormatError(
            f"{path}: the columns are {', '.join(table.columns)}; image is needed, and group, mpp or both"
        )
    out: dict[str, dict[str, str]] = {}
    for line, row in table.rows:
        if row.get("mpp", "") and (value := table.number(row["mpp"])) is not None:
            check_mpp(value, where=f"{path}: line {line}: mpp")
            row = row | {"mpp": str(value)}  # noqa: PLW2901 - a number as Python writes it
        out[normal(row["image"])] = row
    return out


def _scale(row: Mapping[str, str], mpp: float | None, path: Path) -> float | None:
    if not row.get("mpp"):
        return mpp
    try:
        return float(row["mpp"])
    except ValueError as error:
        raise FormatError(
            f"images.csv: mpp of {path.stem} is {row['mpp']!r}; give microns per pixel, such as 0.25"
        ) from error


def _group(row: Mapping[str, str], stem: str) -> str:
    """Slide or patient of an image: as the table says, else the patient in a name of TCGA's, else the image itself."""
    if row.get("group"):
        return row["group"]
    found = _BARCODE.search(stem)
    return found[0] if found else stem


def _class_names(folder: Path) -> dict[str, str]:
    for path in (folder / "classes.json", folder.parent / "classes.json"):
        if kind_of(path, FormatError) == "file":
            classes = parse_json(read_text(path, FormatError), str(path), FormatError)
            if not isinstance(classes, dict) or not all(isinstance(name, str) for name in classes.values()):
                raise FormatError(f'{path}: an object of type ids and their names is needed, {{"1": "tumour"}}')
            return {str(key): name for key, name in classes.items()}
    return {}


def _folder(folder: Path, names: Sequence[str]) -> Path | None:
    return next((folder / name for name in names if kind_of(folder / name, FormatError) == "folder"), None)


def _by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    names = [
        name for name in names_in(folder, FormatError) if name.lower().endswith(tuple(suffixes)) and name[0] != "."
    ]
    return {normal(Path(name).stem): folder / name for name in names}


def _suffix(name: str) -> str:
    """Suffix of a file of outlines; empty for others."""
    return next((s for s in _OUTLINES if name.lower().endswith(s)), "")


def _digest(files: Sequence[Path]) -> str:
    total = hashlib.sha256()
    for file in files:
        with readable(file, FormatError), file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()
