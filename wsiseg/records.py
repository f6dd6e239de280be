"""Records passed between the stages: frozen dataclasses with named fields, their shapes, frames and units."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import shapely

from wsiseg.errors import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from geopandas import GeoDataFrame
    from numpy.typing import NDArray
    from torch import Tensor

    from wsiseg.geometry import Box

UNASSIGNED = "unassigned"  #: the type of a cell that no seed claims; always type code 0


@dataclass(frozen=True, kw_only=True)
class SlideInfo:
    """Metadata of a slide.

    Attributes
    ----------
    path, reader, format
        Path or URL, the reader that opened it (``openslide``, ``tiffslide``, ``image``), and the vendor or file format.
    level_sizes
        (width, height) of each level in its own pixels, level 0 first.
    downsamples
        Level-0 px per px of each level.
    mpp
        Microns per level-0 pixel.
    mpp_source
        Where ``mpp`` was found, in words: ``openslide.mpp-x``, ``--mpp``, ``OME-XML PhysicalSizeX``, ...
    bounds
        (x, y, width, height) of OpenSlide's non-empty region in level-0 px, which QuPath crops to; ``None`` when the slide has none.
    warnings
        Warnings about anything doubtful (mpp far from a cell model's, anisotropy, ...).
    ignored_scale
        Why a resolution that the file states was ignored; empty when none was. Also among ``warnings``.
    not_square
        Sentence about pixels far from square, as the file states them; empty when they are square enough, or ``--mpp`` was given. Also
        among ``warnings``.
    """

    path: str
    reader: str
    format: str
    level_sizes: tuple[tuple[int, int], ...]
    downsamples: tuple[float, ...]
    mpp: float
    mpp_source: str
    bounds: tuple[int, int, int, int] | None = None
    warnings: tuple[str, ...] = ()
    ignored_scale: str = ""
    not_square: str = ""

    @property
    def size_px0(self) -> tuple[int, int]:
        """(width, height) at level 0."""
        return self.level_sizes[0]


@dataclass(frozen=True)
class Tile:
    """One tile of the plan, in model px.

    Attributes
    ----------
    core
        Area that the tile owns: cells whose prompt lies in it. Cores of a plan do not overlap and cover the tissue.
    outer
        Area that is read: the core and its halo, starting on a multiple of the model's stride. May reach beyond the slide.
    """

    core: Box
    outer: Box


@dataclass(frozen=True)
class Block:
    """Tiles that are processed, written and resumed together. ``name`` is the stem of the part file."""

    name: str
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """A batch of encoded tiles, on the model's device.

    Attributes
    ----------
    high, low
        float of shape (B, C, h, w), unit norm along C: F_h (fine) and F_l (coarse) of Chain-of-Prompts.
    maps
        float of shape (B, 3, h, w): logits of foreground, centre distance, boundary distance; ``None`` when the model has none.
    extra
        Further tensors for the model's own decoder.
    """

    high: Tensor
    low: Tensor
    maps: Tensor | None
    extra: dict[str, Tensor]


@dataclass(frozen=True)
class PromptExtras:
    """Further points and a box for each of N prompts, besides its own point. Model px of the tile, corner frame.

    Attributes
    ----------
    points_xy
        float32 of shape (N, K, 2).
    labels
        float32 of shape (N, K), as in Segment Anything: 1 foreground, 0 background, -1 padding (not a point).
    boxes
        float32 of shape (N, 4): x0, y0, x1, y1; rows of NaN where there is no box.
    """

    points_xy: Tensor
    labels: Tensor
    boxes: Tensor


@dataclass(frozen=True, kw_only=True)
class WindowMasks:
    """Masks of N prompts, each on its own window of the tile, on the model's device.

    Attributes
    ----------
    logits
        float of shape (N, h, w); > 0 is inside.
    origin_xy
        int of shape (N, 2): outer corner of each window, model pixels of the tile.
    mask_stride_px
        Model pixels per logit; need not be whole (3.5 with SAM 3).
    predicted_iou
        float of shape (N,), in [0, 1].
    stability
        float of shape (N,): area at logit > 1 over area at logit > -1, in [0, 1].
    descriptors
        float of shape (N, D), unit norm.
    points_xy
        float of shape (N, 2): the prompts, model pixels of the tile.
    full_tile
        The windows are the whole tile: a mask that reaches their border is larger than the halo.
    concept_scores
        float of shape (N, T): score as each type that was asked for; from a detector 0 as all but one. ``None`` where no type was.
    """

    logits: Tensor
    origin_xy: Tensor
    mask_stride_px: float
    predicted_iou: Tensor
    stability: Tensor
    descriptors: Tensor
    points_xy: Tensor
    full_tile: bool = False
    concept_scores: Tensor | None = None

    def take(self, rows: Tensor) -> WindowMasks:
        """The masks at ``rows``, in that order."""
        return WindowMasks(
            logits=self.logits[rows],
            origin_xy=self.origin_xy[rows],
            mask_stride_px=self.mask_stride_px,
            predicted_iou=self.predicted_iou[rows],
            stability=self.stability[rows],
            descriptors=self.descriptors[rows],
            points_xy=self.points_xy[rows],
            full_tile=self.full_tile,
            concept_scores=None if self.concept_scores is None else self.concept_scores[rows],
        )

    @staticmethod
    def concatenate(batches: list[WindowMasks]) -> WindowMasks:
        """All masks in order, of at least one batch; windows must have one size."""
        import torch

        def all_of(name: str) -> Tensor:
            return torch.cat([getattr(b, name) for b in batches])

        return WindowMasks(
            logits=all_of("logits"),
            origin_xy=all_of("origin_xy"),
            mask_stride_px=batches[0].mask_stride_px,
            predicted_iou=all_of("predicted_iou"),
            stability=all_of("stability"),
            descriptors=all_of("descriptors"),
            points_xy=all_of("points_xy"),
            full_tile=batches[0].full_tile,
        )


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What a detector is asked for on one tile.

    Attributes
    ----------
    text
        float32 of shape (L, C): the tokens of a phrase, encoded.
    boxes_px
        float32 of shape (K, 4): x0, y0, x1, y1 around examples on the tile, model px of the tile, corner frame.
    is_example
        bool of shape (K,): the box holds an instance, or what is not one.
    """

    text: NDArray[np.float32]
    boxes_px: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 4), np.float32))
    is_example: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, bool))


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Boxes that show what a type is, and what it is not, on one tile.

    Attributes
    ----------
    positive, negative
        float32 of shape (K, 4): x0, y0, x1, y1, model px of the tile, corner frame; the surest first.
    """

    positive: NDArray[np.float32]
    negative: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Detections:
    """The N instances of a concept that a detector found on one tile, on the model's device.

    Attributes
    ----------
    scores
        float32 of shape (N,), in [0, 1].
    boxes_px
        float32 of shape (N, 4): x0, y0, x1, y1, model px of the tile, corner frame.
    logits
        float32 of shape (N, h, w): masks on the whole tile; > 0 is inside.
    mask_stride_px
        Model px per logit.
    """

    scores: Tensor
    boxes_px: Tensor
    logits: Tensor
    mask_stride_px: float


class CellSource(Protocol):
    """The cells of a slide in the order of its files, a few at a time: what writers take, so that no file needs all polygons in memory.

    :class:`Cells` is one; a run hands over one that reads its parts.

    Attributes
    ----------
    descriptor_size
        D.
    total_bounds
        xmin, ymin, xmax, ymax of all polygons, level-0 px; ``None`` without cells.
    measurement_names
        Names of the measurements that its cells have.
    """

    def __len__(self) -> int: ...

    @property
    def descriptor_size(self) -> int: ...  # noqa: D102

    @property
    def measurement_names(self) -> tuple[str, ...]: ...  # noqa: D102

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None: ...  # noqa: D102

    def chunks(self, rows: int) -> Iterator[Cells]:
        """All cells in order, ``rows`` at a time, the last ones fewer. May be called again for another pass."""
        ...


class CellIndex(CellSource, Protocol):
    """A :class:`CellSource` in which cells are found by position.

    Attributes
    ----------
    bounds
        (N, 4): xmin, ymin, xmax, ymax of each polygon, level-0 px.
    """

    @property
    def bounds(self) -> NDArray[np.float64]: ...  # noqa: D102

    def take(self, rows: NDArray[np.intp]) -> Cells:
        """The cells at ``rows``, in that order."""
        ...


@dataclass(frozen=True, kw_only=True)
class Cells:
    """N outlined cells.

    Attributes
    ----------
    polygons
        shapely Polygons of shape (N,), level-0 px.
    points_xy
        float64 of shape (N, 2): the prompt of each cell, level-0 px.
    scores
        float32 of shape (N,): predicted IoU x stability, in [0, 1].
    descriptors
        float16 of shape (N, D), unit norm.
    concept_scores
        float32 of shape (N, T), in [0, 1]: score of each type that the run describes (``--method text``, ``exemplar``); 0 where a detector
        did not find the cell as one of the type. ``None`` when the run describes none.
    measurements
        float32 of shape (N,) by name, as in cells.parquet; empty before the cells are measured.
    """

    polygons: NDArray[np.object_]
    points_xy: NDArray[np.float64]
    scores: NDArray[np.float32]
    descriptors: NDArray[np.float16]
    concept_scores: NDArray[np.float32] | None = None
    measurements: dict[str, NDArray[np.float32]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.polygons)

    @property
    def descriptor_size(self) -> int:
        """Size of a descriptor."""
        return int(self.descriptors.shape[1])

    @property
    def measurement_names(self) -> tuple[str, ...]:
        """Names of the measurements."""
        return tuple(self.measurements)

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        """xmin, ymin, xmax, ymax of all polygons, level-0 px; ``None`` without cells."""
        if not len(self):
            return None
        left, top, right, bottom = shapely.total_bounds(self.polygons)
        return float(left), float(top), float(right), float(bottom)

    @property
    def bounds(self) -> NDArray[np.float64]:
        """(N, 4): xmin, ymin, xmax, ymax of each polygon, level-0 px."""
        return np.asarray(shapely.bounds(self.polygons), np.float64).reshape(-1, 4)

    def chunks(self, rows: int) -> Iterator[Cells]:
        """The cells in order, ``rows`` at a time."""
        for start in range(0, len(self), rows):
            yield self.take(slice(start, start + rows))

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_] | slice) -> Cells:
        """The cells at ``rows``, in that order."""
        return Cells(
            polygons=self.polygons[rows],
            points_xy=self.points_xy[rows],
            scores=self.scores[rows],
            descriptors=self.descriptors[rows],
            concept_scores=None if self.concept_scores is None else self.concept_scores[rows],
            measurements={name: column[rows] for name, column in self.measurements.items()},
        )

    def __repr__(self) -> str:
        return f"Cells({counted(len(self), 'cell')}, descriptors of {self.descriptor_size} numbers)"

    @staticmethod
    def empty(descriptor_size: int) -> Cells:
        """No cells."""
        return Cells(
            polygons=np.empty(0, object),
            points_xy=np.empty((0, 2)),
            scores=np.empty(0, np.float32),
            descriptors=np.empty((0, descriptor_size), np.float16),
        )

    @staticmethod
    def concatenate(groups: list[Cells], descriptor_size: int) -> Cells:
        """All groups in order; the empty list gives no cells. Without scores of types beside cells with them: zeros; without a measurement: NaN."""
        filled = [g for g in groups if len(g)]
        measurements = {
            name: np.concatenate([g.measurements.get(name, np.full(len(g), np.nan, np.float32)) for g in filled])
            for name in dict.fromkeys(name for g in filled for name in g.measurement_names)
        }
        groups = [Cells.empty(descriptor_size), *groups]
        types = {g.concept_scores.shape[1] for g in groups if g.concept_scores is not None}
        return Cells(
            polygons=np.concatenate([g.polygons for g in groups]),
            points_xy=np.concatenate([g.points_xy for g in groups]),
            scores=np.concatenate([g.scores for g in groups]),
            descriptors=np.concatenate([g.descriptors for g in groups]),
            concept_scores=np.concatenate([scores_or_zeros(g, max(types)) for g in groups]) if types else None,
            measurements=measurements,
        )


def scores_or_zeros(cells: Cells, types: int) -> NDArray[np.float32]:
    """Scores of the types (N, T) that cells were described as; zeros for cells that were not."""
    return np.zeros((len(cells), types), np.float32) if cells.concept_scores is None else cells.concept_scores


@dataclass(frozen=True)
class SeedType:
    """The clicks and phrases of one cell type, level-0 px.

    Attributes
    ----------
    name
        As it will be in the files.
    color
        Red, green and blue, 0 to 255.
    points
        (x, y) of the clicks; of a :class:`Seeds` for an image in memory, px of the image. None for a type that has phrases instead.
    negative
        Clicks on cells that are *not* of the type.
    text
        Phrases that describe the type, for ``--method text`` and ``exemplar``.

    Examples
    --------
    >>> import wsiseg
    >>> wsiseg.SeedType("tumour", color=(200, 0, 0), points=((424.0, 112.0),)).name
    'tumour'
    """

    name: str
    color: tuple[int, int, int]
    points: tuple[tuple[float, float], ...] = ()
    negative: tuple[tuple[float, float], ...] = ()
    text: tuple[str, ...] = ()


def _content(kind: SeedType) -> str:
    """Clicks and phrases of a type, counted: ``2 clicks, 1 phrase``."""
    clicks, phrases = len(kind.points) + len(kind.negative), len(kind.text)
    said = [
        counted(n, thing)
        for n, thing in ((clicks, "click"), (phrases, "phrase"))
        if n or (thing == "click" and not phrases)
    ]
    return ", ".join(said)


@dataclass(frozen=True)
class Seeds:
    """The clicks of all types.

    Attributes
    ----------
    types
        In the order of the file.
    source
        The path they were read from; what messages call them.
    slide
        The slide's file name, when the file states it; another slide is refused.
    notes
        Sentences about what was skipped in the file.

    Examples
    --------
    >>> import wsiseg
    >>> wsiseg.Seeds(
    ...     (
    ...         wsiseg.SeedType("epithelium", color=(200, 80, 0), points=((424, 112), (310, 127))),
    ...         wsiseg.SeedType("stroma", color=(0, 140, 60), points=((189, 356),)),
    ...     )
    ... )
    Seeds(epithelium: 2 clicks, stroma: 1 click)
    """

    types: tuple[SeedType, ...]
    source: str = "seeds"
    slide: str | None = None
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{kind.name}: {_content(kind)}' for kind in self.types)})"


@dataclass(frozen=True)
class ChainPrototypes:
    """Prototypes of one type for Chain-of-Prompts, made from its clicks.

    Attributes
    ----------
    high, low
        (m, C) float32: F_h and F_l at the reliable places, the clicks' own first.
    similarity_threshold
        Similarity (product of the two cosines) from which a place is a candidate of the type; a float32.
    """

    high: NDArray[np.float32]
    low: NDArray[np.float32]
    similarity_threshold: float


@dataclass(frozen=True, kw_only=True)
class TypePrototypes:
    """One type of a bank.

    Attributes
    ----------
    name, color
        As in the seeds file.
    clicks
        (k, 2) float64: the clicks, level-0 px; of another slide's bank, none.
    clicked
        (k, D) float32: descriptors of the clicked cells.
    negative
        (n, D) float32: descriptors of cells clicked as *not* of the type.
    negative_clicks
        (n, 2) float64: the clicks against it, level-0 px; ``None`` where they are not known.
    chain
        For Chain-of-Prompts; ``None`` when the bank was made without.
    """

    name: str
    color: tuple[int, int, int]
    clicks: NDArray[np.float64]
    clicked: NDArray[np.float32]
    negative: NDArray[np.float32]
    negative_clicks: NDArray[np.float64] | None = None
    chain: ChainPrototypes | None = None


@dataclass(frozen=True, kw_only=True)
class DescribedType:
    """A type that a detector, or a decoder of phrases, is asked for.

    Attributes
    ----------
    name, color
        As in the seeds file.
    phrases
        As written; empty for a type that is shown by boxes alone.
    tokens
        float32 of shape (L, C) each: the phrases, encoded; one that stands for "what is in the boxes" for a type without phrases.
    """

    name: str
    color: tuple[int, int, int]
    phrases: tuple[str, ...]
    tokens: tuple[NDArray[np.float32], ...]


@dataclass(frozen=True)
class Bank:
    """Prototypes of T types, made from the clicks.

    Attributes
    ----------
    types
        In the order of the seeds file.
    cells
        The clicked cells themselves, type by type in the order of the clicks.
    from_other_slide
        The clicks are on another slide; ``clicks`` and ``cells`` do not refer to this one.
    """

    types: tuple[TypePrototypes, ...]
    cells: Cells
    from_other_slide: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each type."""
        return tuple(of.name for of in self.types)

    @property
    def chains(self) -> tuple[ChainPrototypes, ...]:
        """Prototypes of each type for Chain-of-Prompts; empty when the bank was made without."""
        return tuple(of.chain for of in self.types if of.chain is not None)

    def __repr__(self) -> str:
        clicks = [f"{of.name}: {counted(len(of.clicks), 'click')}" for of in self.types]
        return f"Bank({', '.join(clicks)})"


@dataclass(frozen=True, kw_only=True)
class TypeSpace:
    """Distribution of cell types in the descriptors of a model: learned with it (training/fit_types.py), or estimated on a slide.

    Attributes
    ----------
    transform
        float32 of shape (D, d): descriptors times this have covariance 1 within a type; below, d is the size of the space.
    mean, between_variance
        (d,): mean and variance of the means of types in general, in the space, without the slide effect.
    reference_classes
        (K, d): means of the classes of cell that the model knows; K = 0 is valid.
    class_variance
        (d,): variance of a class mean on one slide about its row in ``reference_classes``.
    slide_variance
        (d,): variance of the slide effect, the shift that all cells of a slide share.
    class_names
        Names of the K reference classes.
    """

    transform: NDArray[np.float32]
    mean: NDArray[np.float64]
    between_variance: NDArray[np.float64]
    reference_classes: NDArray[np.float64]
    class_variance: NDArray[np.float64]
    slide_variance: NDArray[np.float64]
    class_names: tuple[str, ...] = ()

    def project(self, descriptors: NDArray[np.float16] | NDArray[np.float32]) -> NDArray[np.float32]:
        """Project descriptors (N, D) into the space."""
        # Not by BLAS, whose last bits depend on the number of threads: types must not.
        projected: NDArray[np.float32] = np.einsum("ij,jk->ik", descriptors.astype(np.float32), self.transform)
        return projected


@dataclass(frozen=True, kw_only=True)
class Typing:
    """Types of N cells.

    Attributes
    ----------
    names
        Type names; ``names[0]`` is always ``unassigned``.
    colors
        RGB of each name.
    codes
        int32 of shape (N,): index into ``names``.
    scores, margins
        float32 of shape (N,): probability of the likeliest type, in [0, 1], and its difference to the second likeliest.
    prototypes
        int32 of shape (N,): the clicked cell of the type that is most similar, counted through all clicks in the order of the seeds;
        -1 for unassigned cells.
    """

    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    codes: NDArray[np.int32]
    scores: NDArray[np.float32]
    margins: NDArray[np.float32]
    prototypes: NDArray[np.int32]

    @staticmethod
    def untyped(count: int) -> Typing:
        """Types of a run without seeds: every cell unassigned."""
        zeros = np.zeros(count, np.float32)
        return Typing(
            names=(UNASSIGNED,),
            colors=((128, 128, 128),),
            codes=np.zeros(count, np.int32),
            scores=zeros,
            margins=zeros.copy(),
            prototypes=np.full(count, -1, np.int32),
        )

    def count(self) -> dict[str, int]:
        """Cells per type."""
        return dict(zip(self.names, np.bincount(self.codes, minlength=len(self.names)).tolist(), strict=True))

    def __repr__(self) -> str:
        return f"Typing({', '.join(f'{name} {count}' for name, count in self.count().items())})"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TypedCells:
    """The cells of a slide or an image with their types: what the library hands out.

    Attributes
    ----------
    cells
        Outlines, quality and descriptors; px of the slide's level 0, or of the image.
    typing
        The verdict on each of them.
    ids
        Text of shape (N,): a UUID each, the same in the files of a run.
    mpp
        Microns per px.
    slide
        File name of the slide; ``image`` for an image in memory.

    Examples
    --------
    >>> import wsiseg
    >>> from skimage import data
    >>> image = data.immunohistochemistry()[:256, 256:]
    >>> cells = wsiseg.segment_image(image, mpp=0.5)
    >>> cells  # doctest: +ELLIPSIS
    TypedCells(... cells of image: unassigned ...)
    >>> frame = cells.to_geodataframe()
    >>> len(frame) == len(cells)
    True
    >>> sorted(frame.columns)[:5]
    ['area_um2', 'cell_type', 'circularity', 'density_per_mm2', 'eccentricity']
    """

    cells: Cells
    typing: Typing
    ids: NDArray[np.str_]
    mpp: float
    slide: str

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        types = ", ".join(f"{name} {count}" for name, count in self.count().items())
        return f"TypedCells({counted(len(self), 'cell')} of {self.slide}: {types})"

    @property
    def polygons(self) -> NDArray[np.object_]:
        """Polygons (shapely) of shape (N,), px."""
        return self.cells.polygons

    @property
    def types(self) -> NDArray[np.object_]:
        """The name of each cell's type, of shape (N,); ``unassigned`` for none."""
        return np.array(self.typing.names, object)[self.typing.codes]

    @property
    def areas_um2(self) -> NDArray[np.float64]:
        """Area of each polygon, shape (N,)."""
        return np.asarray(shapely.area(self.polygons) * self.mpp**2, np.float64)

    def count(self) -> dict[str, int]:
        """Cells per type."""
        return self.typing.count()

    def to_geodataframe(self) -> GeoDataFrame:
        """Make a table with the columns of cells.parquet, without ``bbox`` and ``descriptor``; coordinates are px, so there is no CRS.

        Returns
        -------
        geopandas.GeoDataFrame
            One row per cell. ``cell_type`` is a category.
        """
        import geopandas
        import pandas as pd

        centroids = shapely.get_coordinates(shapely.centroid(self.polygons))
        columns = {
            "id": self.ids.astype(object),
            "cell_type": pd.Categorical.from_codes(self.typing.codes, list(self.typing.names)),
            "type_score": self.typing.scores,
            "type_margin": self.typing.margins,
            "prototype": self.typing.prototypes,
            "score": self.cells.scores,
            "area_um2": self.areas_um2.astype(np.float32),
            **self.cells.measurements,
            "x": centroids[:, 0],
            "y": centroids[:, 1],
            "prompt_x": self.cells.points_xy[:, 0],
            "prompt_y": self.cells.points_xy[:, 1],
        }
        return geopandas.GeoDataFrame(columns, geometry=self.polygons)


@dataclass(frozen=True)
class TypingNotes:
    """Findings of the typing beyond the types.

    Attributes
    ----------
    reference_classes
        Per type, the probability of each reference class, by name; the remainder to 1 is "none of them".
    warnings
        Messages about ambiguous types and clicks.
    """

    reference_classes: tuple[dict[str, float], ...] = ()
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Origin of the cells, stored in every output file (JSON-able)."""

    tool: str
    version: str
    slide: str
    config_hash: str
    details: dict[str, object] = field(default_factory=dict)
