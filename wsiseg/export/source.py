"""The cells of a finished run as the exports read them: row group by row group, so that memory does not grow with the slide."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import shapely

from wsiseg.errors import RunError
from wsiseg.formats import FILE_NAMES
from wsiseg.formats.geoparquet import TYPE, as_format_error, read_header, type_column
from wsiseg.formats.parts import polygons_from_wkb
from wsiseg.formats.regions import read_regions
from wsiseg.records import SlideInfo
from wsiseg.runs.folder import RunFolder
from wsiseg.runs.manifest import FINISHED

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    import pyarrow as pa
    from numpy.typing import NDArray

UNLISTED = ("geometry", "descriptor", "bbox")  #: columns that are not one number or one name per cell


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """Settings of the exports.

    Attributes
    ----------
    mpp
        Microns per px of the label images; ``None``: those of the slide's level 0.
    square_um
        Side of a density map's squares. 100 um hold some 50 to 100 nuclei of dense tissue, so that their density is known to about 10 to 15 %.
    """

    mpp: float | None = None
    square_um: float = 100.0


@dataclass(frozen=True)
class Chunk:
    """A row group: the number of its first row in the file, which of its rows are wanted (n,), and its columns."""

    first: int
    wanted: NDArray[np.bool_]
    table: pa.Table

    @property
    def rows(self) -> NDArray[np.intp]:
        """Numbers of the wanted rows in the file."""
        return self.first + np.flatnonzero(self.wanted)

    @property
    def chosen(self) -> pa.Table:
        """The wanted rows."""
        return self.table if self.wanted.all() else self.table.filter(self.wanted)

    def polygons(self) -> NDArray[np.object_]:
        """Outlines of the wanted rows, level-0 px."""
        return polygons_from_wkb(self.chosen["geometry"])


@dataclass(frozen=True, kw_only=True)
class RunCells:
    """The cells of a finished run.

    Attributes
    ----------
    file
        Its cells.parquet.
    slide
        File name of the slide.
    box
        (x0, y0, x1, y1): the part of the slide that images show, whole level-0 px.
    corner
        Where QuPath counts from: the corner of the slide's OpenSlide bounds, level-0 px.
    mpp
        Microns per level-0 px.
    names, colors
        Types, ``unassigned`` first, and their RGB.
    columns
        Columns of the file.
    starts
        First row of each row group, and the number of rows.
    region
        Only cells whose centroid lies in it are wanted; ``None``: all.
    """

    file: Path
    slide: str
    box: tuple[int, int, int, int]
    corner: tuple[int, int]
    mpp: float
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    columns: tuple[str, ...]
    starts: tuple[int, ...]
    region: shapely.Geometry | None

    @property
    def listed(self) -> list[str]:
        """Columns that hold one number or one name per cell."""
        return [name for name in self.columns if name not in UNLISTED]

    @property
    def groups(self) -> int:
        """Number of row groups."""
        return len(self.starts) - 1

    @property
    def has_cells(self) -> bool:
        """Whether any cell is wanted."""
        return next(self.chunks(["x"]), None) is not None

    def chunks(self, columns: Sequence[str]) -> Iterator[Chunk]:
        """Read ``columns`` row group by row group; those without a wanted cell are left out."""
        for group in range(self.groups):
            chunk = self.chunk(group, columns)
            if chunk.wanted.any():
                yield chunk

    def chunk(self, group: int, columns: Sequence[str]) -> Chunk:
        """Read ``columns`` of one row group."""
        first, end = self.starts[group], self.starts[group + 1]
        with as_format_error(self.file), pq.ParquetFile(self.file) as file:
            held = {TYPE: type_column(file.schema_arrow) or TYPE}  # another name in tables of earlier versions
            wanted = np.ones(end - first, bool)
            if self.region is not None:
                at = file.read_row_group(group, columns=["x", "y"])
                wanted = shapely.contains_xy(self.region, at["x"].to_numpy(), at["y"].to_numpy())
            table = file.read_row_group(group, columns=[held.get(name, name) for name in columns])
            back = {name: new for new, name in held.items()}
            return Chunk(first, wanted, table.rename_columns([back.get(name, name) for name in table.column_names]))

    def no_cells(self, columns: Sequence[str]) -> Chunk:
        """``columns`` without a row."""
        with as_format_error(self.file):
            _, schema, _, _ = read_header(self.file)
        return Chunk(0, np.zeros(0, bool), schema.empty_table().select(columns))

    def codes(self, chunk: Chunk) -> NDArray[np.int32]:
        """Index into ``names`` of the wanted rows' types."""
        index = {name: k for k, name in enumerate(self.names)}
        column = chunk.chosen[TYPE].combine_chunks()
        translate = np.array([index[name] for name in column.dictionary.to_pylist()], np.int32)
        codes: NDArray[np.int32] = translate[column.indices.to_numpy()]
        return codes


def open_run(path: Path, region: Path | None = None) -> tuple[RunCells, list[str]]:
    """Open the run in a folder.

    Parameters
    ----------
    path
        Folder of one slide's run.
    region
        GeoJSON of the regions that are wanted, as for ``wsiseg run --roi``.

    Returns
    -------
    tuple of (RunCells, list of str)
        The cells, and warnings about the regions.

    Raises
    ------
    RunError
        It is not the folder of a finished run, or has no table.
    FormatError
        The table or the regions cannot be read.
    """
    manifest = RunFolder(path).manifest()
    if manifest is None:
        raise RunError(
            f"{path}: no manifest.json of wsiseg in it; pass the folder of one slide's run, for example wsiseg-out/slide"
        )
    if manifest.status not in FINISHED:
        raise RunError(f"{path}: the run is {manifest.status}, not finished; run the same command again, then export")
    file = path / FILE_NAMES["parquet"]
    if not file.exists():
        raise RunError(f"{path}: no {file.name} in it; run the same command with --format geojson,parquet, then export")
    with as_format_error(file):
        _, schema, note, _ = read_header(file)
        held = pq.read_metadata(file)
    rows = [held.row_group(group).num_rows for group in range(held.num_row_groups)]
    width, height = (int(side) for side in manifest.slide["size_px0"])
    box, area, warnings = (0, 0, width, height), None, list[str]()
    if region is not None:
        area, warnings = read_regions(region, _slide_of(manifest.slide))
        left, top, right, bottom = area.bounds
        box = (int(np.floor(left)), int(np.floor(top)), int(np.ceil(right)), int(np.ceil(bottom)))
        shapely.prepare(area)
    kinds = [(str(kind["name"]), tuple(int(c) for c in kind["color"])) for kind in note["types"]]
    run = RunCells(
        file=file,
        slide=str(note["slide"]),
        box=box,
        corner=(_slide_of(manifest.slide).bounds or (0, 0))[:2],
        mpp=float(note["mpp"]),
        names=tuple(name for name, _ in kinds),
        colors=tuple((r, g, b) for _, (r, g, b) in kinds),
        columns=tuple(schema.names),
        starts=(0, *np.cumsum(rows, dtype=int).tolist()),
        region=area,
    )
    return run, warnings


def _slide_of(facts: dict[str, Any]) -> SlideInfo:
    """The slide as the manifest knows it: its size and bounds place the regions."""
    bounds = facts.get("bounds")
    return SlideInfo(
        path=str(facts["path"]),
        reader=str(facts.get("reader", "")),
        format=str(facts.get("format", "")),
        level_sizes=((int(facts["size_px0"][0]), int(facts["size_px0"][1])),),
        downsamples=(1.0,),
        mpp=float(facts["mpp"]),
        mpp_source=str(facts.get("mpp_source", "")),
        bounds=None if bounds is None else (int(bounds[0]), int(bounds[1]), int(bounds[2]), int(bounds[3])),
    )
