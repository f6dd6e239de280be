"""Files are written from a stream of cells: the same bytes however it is cut, never all of it in memory; and read in parts."""

from __future__ import annotations

import gzip
import hashlib
import itertools
import shutil
import subprocess
import tracemalloc
import uuid
import weakref
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats import deflate, geojson, geoparquet
from wsiseg.formats.geojson import validate_geojson, write_geojson
from wsiseg.formats.geoparquet import CORNERS, read_geoparquet, read_table, write_geoparquet, write_retyped
from wsiseg.formats.ids import CellIds, cell_ids
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

INFO = SlideInfo(
    path="/data/a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((200_000, 200_000),),
    downsamples=(1.0,),
    mpp=0.25,
    mpp_source="--mpp",
    bounds=(1000, 500, 90_000, 90_000),
)
PROVENANCE = Provenance(tool="wsiseg", version="0.1.0", slide="a.svs", config_hash="hash", details={})
NAMES = ("cells.geojson", "cells.geojson.gz", "cells.geojson.zip", "cells.parquet")


@dataclass
class Stream:
    """A source that makes its polygons when asked, from coordinates, and knows how many chunks of them anybody holds."""

    count: int
    descriptor_size: int = 5
    vertices: int = 25
    alive: int = 0
    most_alive: int = 0
    passes: int = 0  #: that were begun
    portions: tuple[int, ...] = field(default=())  #: sizes of the chunks, whatever was asked for

    def __len__(self) -> int:
        return self.count

    @property
    def measurement_names(self) -> tuple[str, ...]:
        return ()

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        return (0.0, 0.0, 40_000.0, 40_000.0) if self.count else None

    def chunks(self, rows: int) -> Iterator[Cells]:
        self.passes += 1
        edges = list(np.cumsum([0, *self.portions])) if self.portions else [*range(0, self.count, rows), self.count]
        for start, end in itertools.pairwise(edges):
            yield self.make(np.arange(start, end))

    def make(self, rows: np.ndarray) -> Cells:
        phase = rows[:, None] * np.arange(1, self.vertices + 1)
        angle = np.arange(self.vertices) * 2 * np.pi / self.vertices
        centres = np.stack([rows % 1000, rows // 1000], 1) * 40.0 + 1520
        outlines = centres[:, None] + (12 + np.sin(phase))[..., None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        polygons = np.array(shapely.polygons(outlines), object)
        self.alive += 1
        self.most_alive = max(self.most_alive, self.alive)
        cells = Cells(
            polygons=polygons,
            points_xy=centres,
            scores=(rows % 7 / 7).astype(np.float32),
            descriptors=np.tile((rows % 5)[:, None], self.descriptor_size).astype(np.float16),
        )
        weakref.finalize(polygons, self._gone)
        return cells

    def _gone(self) -> None:
        self.alive -= 1

    def whole(self) -> Cells:
        """In memory, as the bounds that the source states require."""
        return Cells.concatenate(list(self.chunks(self.count + 1)), self.descriptor_size)


@dataclass(frozen=True)
class Bounded(Cells):
    """Cells in memory that state the bounds of :class:`Stream`."""

    @property
    def total_bounds(self) -> tuple[float, float, float, float] | None:
        return (0.0, 0.0, 40_000.0, 40_000.0) if len(self) else None


def typing_of(count: int) -> Typing:
    codes = (np.arange(count) % 3).astype(np.int32)
    scores = (np.arange(count) % 11 / 11).astype(np.float32)
    colors = ((128, 128, 128), (200, 0, 0), (0, 80, 200))
    return Typing(
        names=("unassigned", "tumour", "other"),
        colors=colors,
        codes=codes,
        scores=scores,
        margins=scores[::-1].copy(),
        prototypes=codes - 1,
    )


def written(folder: Path, name: str, cells: Stream | Cells) -> bytes:
    write: Callable[..., object] = write_geoparquet if name.endswith(".parquet") else write_geojson
    write(folder / name, cells, typing_of(len(cells)), INFO, PROVENANCE)
    return (folder / name).read_bytes()


def small(patch: pytest.MonkeyPatch, chunk: int, batch: int = 12) -> None:
    """Numbers at which every border is crossed within a hundred cells."""
    for module in (geojson, geoparquet):
        patch.setattr(module, "CHUNK", chunk)
    patch.setattr(geojson, "BATCH", batch)
    patch.setattr(geojson, "SHARD_CELLS", 36)
    patch.setattr(geoparquet, "ROW_GROUP", 30)
    patch.setattr(deflate, "PIECE", 1000)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [0, 1, 100])
def test_the_bytes_do_not_depend_on_the_source_or_its_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, count: int
) -> None:
    small(monkeypatch, 17)
    cells = Stream(count).whole()
    one = written(tmp_path, name, Bounded(**vars(cells)))
    for chunk in (1, 7, 36, 1000):
        small(monkeypatch, chunk)
        source = Stream(count)
        assert written(tmp_path, name, source) == one
        assert source.passes <= 1
    if count == 100:
        assert written(tmp_path, name, Stream(count, portions=(1, 0, 50, 13, 36))) == one
    if not name.endswith("parquet"):
        small(monkeypatch, 17, batch=4)
        assert written(tmp_path, name, Stream(count)) == one
        assert validate_geojson(tmp_path / name) == []


@pytest.mark.parametrize("name", ["cells.geojson.gz", "cells.geojson.zip"])
def test_the_bytes_do_not_depend_on_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    small(monkeypatch, 17)
    files = []
    for threads in (1, 2, 5):
        monkeypatch.setattr(deflate, "THREADS", threads)
        files.append(written(tmp_path, name, Stream(100)))
    assert files[0] == files[1] == files[2]


def test_the_gzip_file_is_one_member_that_everybody_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = written(tmp_path, "cells.geojson", Stream(3000))
    for piece in (deflate.PIECE, 1000, len(text), len(text) - 1):
        monkeypatch.setattr(deflate, "PIECE", piece)
        packed = written(tmp_path, "cells.geojson.gz", Stream(3000))
        assert gzip.decompress(packed) == text
        member = zlib.decompressobj(31)
        assert member.decompress(packed) == text
        assert member.eof
        assert member.unused_data == b""
        if shutil.which("gzip"):
            subprocess.run(["gzip", "-t", tmp_path / "cells.geojson.gz"], check=True)


def test_the_zip_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch, 17)
    written(tmp_path, "cells.geojson.zip", Stream(100))
    with zipfile.ZipFile(tmp_path / "cells.geojson.zip") as archive:
        assert archive.testzip() is None
        assert [entry.compress_type for entry in archive.infolist()] == [zipfile.ZIP_DEFLATED] * 3
        assert all(entry.compress_size < entry.file_size for entry in archive.infolist())
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", tmp_path / "cells.geojson.zip"], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize("name", NAMES)
def test_few_chunks_are_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(geojson, "CHUNK", 100)
    monkeypatch.setattr(geoparquet, "CHUNK", 100)
    source = Stream(3000)
    written(tmp_path, name, source)
    assert source.alive == 0
    assert source.most_alive <= 4


def test_the_text_is_not_held(tmp_path: Path) -> None:
    """80,000 cells are 57 MB of text."""
    typing = typing_of(80_000)
    write_geojson(tmp_path / "warm.geojson.gz", Stream(10), typing_of(10), INFO, PROVENANCE)
    tracemalloc.start()
    try:
        write_geojson(tmp_path / "cells.geojson.gz", Stream(80_000), typing, INFO, PROVENANCE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 30e6


# --- ids --------------------------------------------------------------------------------------------------------------------------


def test_ids_do_not_depend_on_the_chunks() -> None:
    """Runs of twins, and of cells that only share their prompt, over every border; against RFC 9562, one by one."""
    rng = np.random.default_rng(0)
    prompts = np.sort(rng.integers(0, 12, 60)).repeat(rng.integers(1, 4, 60))
    shapes = rng.integers(1, 3, len(prompts))
    polygons = shapely.box(prompts, prompts, prompts + shapes, prompts + 2.0)
    points = np.stack([prompts, prompts], 1).astype(float)
    cells = Cells(
        polygons=polygons,
        points_xy=points,
        scores=np.zeros(len(prompts), np.float32),
        descriptors=np.zeros((len(prompts), 0), np.float16),
    )
    namespace, seen, expected = uuid.uuid5(uuid.NAMESPACE_URL, "wsiseg:a.svs").bytes, {}, []
    for point, polygon in zip(points, polygons, strict=True):
        name = np.rint(np.concatenate([point, polygon.bounds]) * 100).astype("<i8").tobytes()
        twin = seen[name] = seen.get(name, -1) + 1
        digest = hashlib.sha1(namespace + name + (twin.to_bytes(8, "little") if twin else b"")).digest()[:16]
        expected.append(str(uuid.UUID(bytes=digest, version=5)))
    assert len(set(expected)) == len(expected)
    assert cell_ids("a.svs", cells) == expected
    for chunk in (1, 2, 3, 7, 50):
        ids = CellIds("a.svs")
        found = np.concatenate([ids(part) for part in cells.chunks(chunk)])
        assert found.astype(str).tolist() == expected


# --- cells.parquet in parts -------------------------------------------------------------------------------------------------------


def test_a_window_touches_only_its_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the statistics of bbox; and geopandas returns exactly the cells of the window."""
    monkeypatch.setattr(geoparquet, "ROW_GROUP", 500)
    cells = Stream(10_000).whole()
    path = tmp_path / "cells.parquet"
    write_geoparquet(path, cells, typing_of(len(cells)), INFO, PROVENANCE)
    footer = pq.read_metadata(path)
    places = {footer.schema.column(k).path: k for k in range(footer.num_columns)}
    bounds = shapely.bounds(cells.polygons)
    boxes = []
    for group in range(footer.num_row_groups):
        left, top, right, bottom = (
            footer.row_group(group).column(places[f"bbox.{corner}"]).statistics for corner in CORNERS
        )
        mine = bounds[500 * group : 500 * group + 500]
        assert (left.min, top.min, right.max, bottom.max) == (*mine[:, :2].min(0), *mine[:, 2:].max(0))
        boxes.append((left.min, top.min, right.max, bottom.max))
    window = (3000, 1600, 4000, 1700)
    touched = shapely.intersects(shapely.box(*window), shapely.box(*np.transpose(boxes)))
    assert len(boxes) == 20
    assert 0 < touched.sum() <= 4
    inside = shapely.intersects(shapely.box(*window), shapely.envelope(cells.polygons))
    found = geopandas.read_parquet(path, bbox=window)
    assert found["id"].tolist() == np.array(cell_ids("a.svs", cells))[inside].tolist()
    assert shapely.equals_exact(found.geometry.to_numpy(), cells.polygons[inside]).all()


def test_a_table_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, "ROW_GROUP", 30)
    cells, path = Stream(100).whole(), tmp_path / "cells.parquet"
    write_geoparquet(path, cells, typing_of(100), INFO, PROVENANCE)
    table = read_table(path)
    assert len(table) == 100
    assert table.descriptor_size == 5
    assert table.total_bounds == cells.total_bounds
    assert "geometry" not in table.table.schema.names
    for rows in (7, 30, 45, 1000):
        chunks = list(table.chunks(rows))
        assert [len(chunk) for chunk in chunks] == [min(rows, 100 - start) for start in range(0, 100, rows)]
        again = Cells.concatenate(chunks, 5)
        assert shapely.equals_exact(again.polygons, cells.polygons).all()
        for name in ("points_xy", "scores", "descriptors"):
            np.testing.assert_array_equal(getattr(again, name), getattr(cells, name))
    rows = np.array([99, 0, 31, 30, 29, 0])
    assert shapely.equals_exact(table.take(rows).polygons, cells.polygons[rows]).all()
    np.testing.assert_array_equal(table.take(rows).points_xy, cells.points_xy[rows])
    assert len(table.take(np.empty(0, np.intp))) == 0
    write_geoparquet(path, Cells.empty(0), typing_of(0), INFO, PROVENANCE)
    assert (len(read_table(path)), read_table(path).total_bounds, list(read_table(path).chunks(9))) == (0, None, [])


def test_a_table_is_typed_again_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever row groups it has; the other columns stay, and the polygons are still found."""
    monkeypatch.setattr(geoparquet, "ROW_GROUP", 30)
    cells, path, old = Stream(100).whole(), tmp_path / "cells.parquet", typing_of(100)
    write_geoparquet(path, cells, old, INFO, PROVENANCE)
    before = pq.read_table(path)
    pq.write_table(before, path, row_group_size=13)
    fresh = Typing(
        names=("unassigned", "new"),
        colors=((128, 128, 128), (1, 2, 3)),
        codes=1 - np.minimum(old.codes, 1),
        scores=old.margins,
        margins=old.scores,
        prototypes=old.prototypes + 1,
    )
    table = read_table(path)
    table.check()
    write_retyped(path, table, fresh, PROVENANCE)
    after, typing, _ = read_geoparquet(path)
    footer = pq.read_metadata(path)
    assert [footer.row_group(k).num_rows for k in range(footer.num_row_groups)] == [30, 30, 30, 10]
    assert typing.names == fresh.names
    for name in ("codes", "scores", "margins", "prototypes"):
        np.testing.assert_array_equal(getattr(typing, name), getattr(fresh, name))
    assert shapely.equals_exact(after.polygons, cells.polygons).all()
    for name in before.schema.names:
        assert name in geoparquet.TYPE_COLUMNS or pq.read_table(path)[name].equals(before[name])
    assert written(tmp_path, "a.geojson", table) == written(tmp_path, "b.geojson", cells)


def damage(path: Path, column: str) -> None:
    """Zeros in the middle of a column of the last row group."""
    footer = pq.read_metadata(path)
    group = footer.row_group(footer.num_row_groups - 1)
    chunk = next(group.column(k) for k in range(group.num_columns) if group.column(k).path_in_schema == column)
    content = bytearray(path.read_bytes())
    middle = chunk.data_page_offset + chunk.total_compressed_size // 2
    content[middle : middle + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize("column", ["geometry", "id"])
def test_damage_is_found_without_reading_for_a_file(tmp_path: Path, column: str) -> None:
    path = tmp_path / "cells.parquet"
    write_geoparquet(path, Stream(3000), typing_of(3000), INFO, PROVENANCE)
    read_table(path).check()
    damage(path, column)
    table = read_table(path)
    with pytest.raises(FormatError, match=r"cells\.parquet: not a readable cells\.parquet"):
        table.check()
