"""Numbers of a report, read from the folder of a run: of its table only the columns that are needed, and the polygons of a few cells."""

from __future__ import annotations

import dataclasses
import math
import shlex
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq

from wsiseg.config import RunConfig
from wsiseg.formats.geoparquet import AREA, TYPE, as_format_error, read_header, type_codes
from wsiseg.records import UNASSIGNED
from wsiseg.runs.folder import flat_settings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.report.summary import FinishedRun

EXAMPLES = 4  #: crops of each kind and type
MOST_TYPES = 24  #: types with crops, the most frequent ones: more would not fit into 5 MB
BINS = 30  #: of a histogram
_CIRCULARITY, _HAEMATOXYLIN = "circularity", "nucleus_haematoxylin_mean"
_SEED = 0  #: of the random examples: the same run gives the same page


@dataclass(frozen=True, kw_only=True)
class CellColumns:
    """Columns of all N cells of a run.

    Attributes
    ----------
    codes
        (N,): index into the names of the types.
    areas_um2, xy
        (N,) and (N, 2): area, and centroid in level-0 px.
    scores, type_scores, type_margins
        (N,): quality of the outline; probability of the type, and its lead.
    circularity, haematoxylin
        (N,); ``None`` in tables of earlier versions.
    """

    codes: NDArray[np.int32]
    areas_um2: NDArray[np.float32]
    xy: NDArray[np.float64]
    scores: NDArray[np.float32]
    type_scores: NDArray[np.float32]
    type_margins: NDArray[np.float32]
    circularity: NDArray[np.float32] | None
    haematoxylin: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class TypeFacts:
    """One type, or all cells of a run without types."""

    name: str
    color: tuple[int, int, int]
    rows: NDArray[np.intp]
    share: float
    per_mm2: float
    median_area_um2: float
    median_score: float
    histograms: tuple[Histogram, ...]
    examples: tuple[tuple[str, NDArray[np.intp]], ...]


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """Shares of a type's cells in ``BINS`` equal bins from 0 to ``top``; what lies beyond is in the last one."""

    title: str
    unit: str
    top: float
    shares: NDArray[np.float64]
    quartiles: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class ReportContents:
    """Everything that the page says in words and numbers."""

    run: FinishedRun
    slide: str
    columns: CellColumns
    types: tuple[TypeFacts, ...]
    typed: bool
    area_mm2: float
    settings: tuple[tuple[str, str, str], ...]
    commands: tuple[str, ...]


def read_contents(run: FinishedRun) -> ReportContents:
    """Read what a report says.

    Raises
    ------
    FormatError
        The table is damaged.
    """
    path = run.table
    with as_format_error(path):
        held, schema, note, _ = read_header(path)
        names = tuple(str(kind["name"]) for kind in note["types"])
        colors = [tuple(int(part) for part in kind["color"]) for kind in note["types"]]
        wanted = [TYPE, AREA, "x", "y", "score", "type_score", "type_margin"]
        measured = [name for name in (_CIRCULARITY, _HAEMATOXYLIN) if name in schema.names]
        wanted += measured
        stored = [held.names[schema.get_field_index(name)] for name in wanted]
        table = pq.read_table(path, columns=stored, partitioning=None).rename_columns(wanted)
        columns = CellColumns(
            codes=type_codes(table[TYPE], names),
            areas_um2=table[AREA].to_numpy(),
            xy=np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1),
            scores=table["score"].to_numpy(),
            type_scores=table["type_score"].to_numpy(),
            type_margins=table["type_margin"].to_numpy(),
            circularity=table[_CIRCULARITY].to_numpy() if _CIRCULARITY in measured else None,
            haematoxylin=table[_HAEMATOXYLIN].to_numpy() if _HAEMATOXYLIN in measured else None,
        )
    area = float(run.manifest.slide.get("searched_mm2", math.nan))
    typed = len(names) > 1
    order = [*range(1, len(names)), 0] if typed else [0]
    types = tuple(
        _facts(
            names[code] if typed else "all cells",
            colors[code],
            np.flatnonzero(columns.codes == code),
            columns,
            area,
            typed=typed,
        )
        for code in order
    )
    return ReportContents(
        run=run,
        slide=str(note["slide"]),
        columns=columns,
        types=types,
        typed=typed,
        area_mm2=area,
        settings=_settings(run.manifest.config),
        commands=_commands(run),
    )


def _facts(
    name: str, color: tuple[int, ...], rows: NDArray[np.intp], columns: CellColumns, area_mm2: float, *, typed: bool
) -> TypeFacts:
    quality = columns.type_scores if typed and name != UNASSIGNED else columns.scores
    largest = _rounded_up(float(np.quantile(columns.areas_um2, 0.995))) if len(columns.areas_um2) else 1.0
    histograms = [_histogram("Area", "µm²", columns.areas_um2[rows], largest)]
    if columns.circularity is not None:
        histograms.append(_histogram("Circularity", "", columns.circularity[rows], 1.0))
    if columns.haematoxylin is not None and np.isfinite(columns.haematoxylin).any():
        darkest = _rounded_up(float(np.nanquantile(columns.haematoxylin, 0.995)))
        histograms.append(_histogram("Haematoxylin", "OD", columns.haematoxylin[rows], darkest))
    return TypeFacts(
        name=name,
        color=(color[0], color[1], color[2]),
        rows=rows,
        share=len(rows) / max(len(columns.codes), 1),
        per_mm2=len(rows) / area_mm2 if area_mm2 else math.nan,
        median_area_um2=_median(columns.areas_um2[rows]),
        median_score=_median(quality[rows]),
        histograms=tuple(histograms),
        examples=_examples(rows, columns, typed=typed and name != UNASSIGNED),
    )


def _examples(rows: NDArray[np.intp], columns: CellColumns, *, typed: bool) -> tuple[tuple[str, NDArray[np.intp]], ...]:
    """The surest, the least sure and random cells among ``rows``, none twice."""
    sure, doubt = (columns.type_scores, columns.type_margins) if typed else (columns.scores, columns.scores)
    best = rows[np.argsort(-sure[rows], kind="stable")[:EXAMPLES]]
    rest = np.setdiff1d(rows, best)
    worst = rest[np.argsort(doubt[rest], kind="stable")[:EXAMPLES]]
    rest = np.setdiff1d(rest, worst)
    chosen = np.random.default_rng(_SEED).permutation(rest)[:EXAMPLES]
    kinds = ("Highest score", "Lowest margin" if typed else "Lowest score", "Random")
    return tuple(zip(kinds, (best, worst, chosen), strict=True))


def _histogram(title: str, unit: str, values: NDArray[np.float32], top: float) -> Histogram:
    values = values[np.isfinite(values)]
    counts, _ = np.histogram(np.clip(values, 0, top), BINS, (0, top))
    quartiles = tuple(float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))) if len(values) else (math.nan,) * 3
    return Histogram(
        title=title,
        unit=unit,
        top=top,
        shares=counts / max(len(values), 1),
        quartiles=(quartiles[0], quartiles[1], quartiles[2]),
    )


def _median(values: NDArray[np.float32]) -> float:
    return float(np.median(values)) if len(values) else math.nan


def _rounded_up(value: float) -> float:
    """The next number with one significant digit."""
    step = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return math.ceil(value / step) * step


def _settings(config: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Name, value and default of each setting that has another value than by default."""
    default = flat_settings(dataclasses.asdict(RunConfig()))
    return tuple(
        (key, _text(value), _text(default[key]))
        for key, value in flat_settings(config).items()
        if key in default and value != default[key]
    )


def _text(value: object) -> str:
    return "none" if value is None else str(value)


def _commands(run: FinishedRun) -> tuple[str, ...]:
    """Commands that make the run again."""
    folder, manifest = run.folder.path, run.manifest
    lines = [["wsiseg", "run", manifest.slide["path"], "--config", str(folder / "manifest.json"), "--out", "again"]]
    return tuple(shlex.join(str(word) for word in line) for line in lines)
