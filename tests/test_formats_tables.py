"""Part files and cells.parquet give back what was written, in the same bytes every time."""

from __future__ import annotations

import hashlib
import json
import uuid
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from wsiseg.errors import FormatError
from wsiseg.formats import geoparquet
from wsiseg.formats.geoparquet import cell_ids, read_geoparquet, write_geoparquet
from wsiseg.formats.parts import part_is_current, read_part, write_part
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from pathlib import Path

INFO = SlideInfo(
    path="/data/a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((5000, 4000),),
    downsamples=(1.0,),
    mpp=0.5,
    mpp_source="--mpp",
)
PROVENANCE = Provenance(tool="wsiseg", version="0.1.0", slide="a.svs", config_hash="hash", details={"method": "apg"})


def make_cells(count: int, descriptor_size: int = 4) -> Cells:
    rng = np.random.default_rng(count)
    centres = rng.uniform(100, 3900, (count, 1, 2))
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    outlines = centres + np.stack([np.cos(angles), np.sin(angles)], axis=-1) * rng.uniform(8, 12, (count, 12, 1))
    polygons = shapely.polygons(outlines) if count else np.empty(0, object)
    descriptors = rng.normal(size=(count, descriptor_size)).astype(np.float16)
    return Cells(
        polygons=polygons,
        points_xy=centres[:, 0].copy(),
        scores=rng.random(count).astype(np.float32),
        descriptors=descriptors,
    )


def make_typing(count: int) -> Typing:
    rng = np.random.default_rng(count)
    names, colors = (
        ("unassigned", "tumour", "lymphocyte", "never seen"),
        ((128, 128, 128), (200, 0, 0), (0, 80, 200), (1, 2, 3)),
    )
    scores, margins = rng.random(count).astype(np.float32), rng.random(count).astype(np.float32)
    return Typing(
        names=names,
        colors=colors,
        codes=rng.integers(0, 3, count).astype(np.int32),
        scores=scores,
        margins=margins,
        prototypes=rng.integers(-1, 9, count).astype(np.int32),
    )


def assert_same(a: Cells, b: Cells) -> None:
    assert shapely.equals_exact(a.polygons, b.polygons).all()
    assert len(a) == len(b)
    for name in ("points_xy", "scores", "descriptors"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert left.shape == right.shape
        np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (0, 0), (3, 0), (50, 4)])
def test_part_round_trip(tmp_path: Path, count: int, size: int) -> None:
    cells, path = make_cells(count, size), tmp_path / "b.parquet"
    write_part(path, cells, "hash", {"kept": count, "seam": 2})
    again, counts = read_part(path)
    assert_same(cells, again)
    assert counts == {"kept": count, "seam": 2}
    assert part_is_current(path, "hash")
    assert not part_is_current(path, "other")


def test_a_truncated_or_foreign_part_is_not_current_and_not_read(tmp_path: Path) -> None:
    good, path = tmp_path / "good.parquet", tmp_path / "bad.parquet"
    write_part(good, make_cells(50), "hash", {})
    content = good.read_bytes()
    from_other_slide = tmp_path / "foreign.parquet"
    geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(0, 0)]).to_parquet(from_other_slide)
    for broken in (
        b"",
        b"PAR1",
        content[:-1],
        content[: len(content) // 2],
        b"x" * 1000,
        from_other_slide.read_bytes(),
    ):
        path.write_bytes(broken)
        assert not part_is_current(path, "hash")
        with pytest.raises(
            FormatError, match=r"bad\.parquet: not a readable part file .*; delete it and run the command again"
        ):
            read_part(path)
    for missing in (tmp_path / "none.parquet", tmp_path):
        assert not part_is_current(missing, "hash")
        with pytest.raises(FormatError, match="not a readable part file"):
            read_part(missing)


def test_a_flipped_bit_in_a_part_is_found(tmp_path: Path) -> None:
    path = tmp_path / "b.parquet"
    write_part(path, make_cells(50), "hash", {})
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(content)
    with pytest.raises(FormatError, match="not a readable part file"):
        read_part(path)


@pytest.mark.parametrize(("count", "size"), [(0, 4), (3, 0), (50, 4)])
def test_geoparquet_round_trip(tmp_path: Path, count: int, size: int) -> None:
    cells, typing, path = make_cells(count, size), make_typing(count), tmp_path / "cells.parquet"
    write_geoparquet(path, cells, typing, INFO, PROVENANCE)
    again, typing_again, note = read_geoparquet(path)
    assert_same(cells, again)
    assert (typing_again.names, typing_again.colors) == (typing.names, typing.colors)
    for name in ("codes", "scores", "margins"):
        assert getattr(typing_again, name).dtype == getattr(typing, name).dtype
        np.testing.assert_array_equal(getattr(typing_again, name), getattr(typing, name))
    assert note["slide"] == "a.svs"
    assert note["config_hash"] == "hash"
    assert note["details"] == {"method": "apg"}
    assert note["mpp"] == 0.5
    assert "absolute level-0 px" in str(note["frame"])


def test_geopandas_opens_it_with_every_column_and_uses_the_covering(tmp_path: Path) -> None:
    cells, path = make_cells(50), tmp_path / "cells.parquet"
    write_geoparquet(path, cells, make_typing(50), INFO, PROVENANCE)
    frame = geopandas.read_parquet(path)
    expected = "id cell_type type_score type_margin prototype score area_um2 x y prompt_x prompt_y geometry descriptor"
    assert sorted(frame.columns) == sorted(expected.split())  # geopandas takes bbox for itself
    assert frame.crs is None
    assert frame["id"].tolist() == cell_ids("a.svs", cells)  # as in the GeoJSON
    np.testing.assert_allclose(frame["area_um2"], frame.area * 0.25, rtol=1e-6)
    np.testing.assert_allclose(frame["x"], frame.centroid.x)
    np.testing.assert_array_equal(frame["prompt_x"], cells.points_xy[:, 0])
    np.testing.assert_array_equal(np.stack(frame["descriptor"].to_list()), cells.descriptors)
    assert set(frame["cell_type"]) <= {"unassigned", "tumour", "lymphocyte"}
    window = (1000, 1000, 2500, 2500)
    inside = shapely.intersects(shapely.box(*window), shapely.envelope(cells.polygons))
    assert len(geopandas.read_parquet(path, bbox=window)) == inside.sum() > 0


def test_metadata_follows_geoparquet_1_1(tmp_path: Path) -> None:
    cells, path = make_cells(50), tmp_path / "cells.parquet"
    write_geoparquet(path, cells, make_typing(50), INFO, PROVENANCE)
    geo = json.loads(pq.read_metadata(path).metadata[b"geo"])
    column = geo["columns"][geo["primary_column"]]
    assert geo["version"] == "1.1.0"
    assert column["encoding"] == "WKB"
    assert column["geometry_types"] == ["Polygon"]
    assert column["crs"] is None
    assert column["covering"]["bbox"]["ymax"] == ["bbox", "ymax"]
    assert column["bbox"] == shapely.total_bounds(cells.polygons).tolist()
    schema = pq.read_schema(path)
    assert str(schema.field("descriptor").type).startswith("fixed_size_list<element: halffloat")
    assert [f.name for f in schema.field("bbox").type] == ["xmin", "ymin", "xmax", "ymax"]
    assert not any(field.nullable for field in schema)


def test_row_groups_keep_the_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geoparquet, "ROW_GROUP", 20)
    cells, path = make_cells(50), tmp_path / "cells.parquet"
    write_geoparquet(path, cells, make_typing(50), INFO, PROVENANCE)
    footer = pq.read_metadata(path)
    assert [footer.row_group(k).num_rows for k in range(footer.num_row_groups)] == [20, 20, 10]
    assert_same(read_geoparquet(path)[0], cells)
    np.testing.assert_array_equal(read_geoparquet(path)[1].codes, make_typing(50).codes)


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_geoparquet(tmp_path / f"{name}.parquet", make_cells(50), make_typing(50), INFO, PROVENANCE)
        write_part(tmp_path / f"{name}.part", make_cells(50), "hash", {"kept": 1})
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert (tmp_path / "a.part").read_bytes() == (tmp_path / "b.part").read_bytes()


def test_a_foreign_or_damaged_file_is_refused_in_one_line(tmp_path: Path) -> None:
    from_other_slide, text = tmp_path / "foreign.parquet", tmp_path / "text.parquet"
    geopandas.GeoDataFrame({"a": [1]}, geometry=[shapely.Point(0, 0)]).to_parquet(from_other_slide)
    text.write_text("hello")
    with pytest.raises(FormatError, match=r"so not a cells\.parquet of wsiseg"):
        read_geoparquet(from_other_slide)
    for path in (text, tmp_path / "none.parquet"):
        with pytest.raises(FormatError, match=r"not a readable cells\.parquet") as caught:
            read_geoparquet(path)
        assert "\n" not in str(caught.value)


def test_ids_are_unique_uuid5_of_slide_and_coordinates() -> None:
    cells = make_cells(50)
    ids = cell_ids("a.svs", cells)
    assert len(set(ids)) == 50
    assert {uuid.UUID(value).version for value in ids} == {5}
    assert all(str(uuid.UUID(value)) == value for value in ids)
    assert cell_ids("a.svs", cells.take(np.arange(50)[::-1])) == ids[::-1]
    assert not set(ids) & set(cell_ids("b.svs", cells))
    numbers = np.rint(np.concatenate([cells.points_xy[0], cells.polygons[0].bounds]) * 100).astype("<i8")
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, "wsiseg:a.svs")
    digest = hashlib.sha1(namespace.bytes + numbers.tobytes()).digest()[:16]
    assert ids[0] == str(uuid.UUID(bytes=digest, version=5))


def test_twins_get_different_ids() -> None:
    cells = make_cells(5).take(np.array([0, 1, 1, 1, 2, 0]))
    ids = cell_ids("a.svs", cells)
    assert len(set(ids)) == 6
    assert ids == cell_ids("a.svs", cells)
    assert cell_ids("a.svs", make_cells(0)) == []
