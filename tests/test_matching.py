"""Which cell a click means: one rule for `run` and `type`, and the same types by both."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely

from wsiseg.config import RunConfig
from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.records import Bank, Cells, SlideInfo, TypePrototypes
from wsiseg.runs.finish import stitch_and_type
from wsiseg.seeds.bank import match_bank, missed_cells
from wsiseg.seeds.matching import describe_nearest, match_clicks, match_groups

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Command = Callable[..., tuple[int, str]]


def cells_of(*boxes: tuple[float, float, float, float]) -> Cells:
    """Boxes, each with its middle as prompt and a descriptor of its own."""
    shapes = np.array([shapely.box(*box) for box in boxes], object)
    middles = np.array([[(x0 + x1) / 2, (y0 + y1) / 2] for x0, y0, x1, y1 in boxes]).reshape(-1, 2)
    return Cells(
        polygons=shapes,
        points_xy=middles,
        scores=np.ones(len(boxes), np.float32),
        descriptors=np.eye(len(boxes), 8, dtype=np.float16),
    )


def bank_of(
    clicks: list[list[tuple[float, float]]], cells: Cells, negative: list[list[tuple[float, float]]] | None = None
) -> Bank:
    """Types a, b, ... with descriptors that no cell has."""
    points = tuple(np.array(c, float).reshape(-1, 2) for c in clicks)
    against = tuple(np.array(c, float).reshape(-1, 2) for c in negative or [[] for _ in clicks])
    types = tuple(
        TypePrototypes(
            name=name,
            color=(1, 2, 3),
            clicks=p,
            clicked=np.full((len(p), 8), 7, np.float32),
            negative=np.full((len(n), 8), 9, np.float32),
            negative_clicks=n,
        )
        for name, p, n in zip("abcdef", points, against, strict=False)
    )
    return Bank(types, cells)


def test_a_click_means_the_smallest_cell_that_holds_it() -> None:
    cells = cells_of((0, 0, 100, 100), (10, 10, 30, 30), (12, 12, 60, 60))
    points = np.array([[15.0, 15.0], [50.0, 50.0], [90.0, 90.0]])
    assert match_clicks(points, cells, 4).tolist() == [1, 2, 0]


def test_a_cell_that_holds_the_click_wins_over_a_smaller_one_beside_it() -> None:
    cells = cells_of((10.5, 0, 12, 2), (0, 0, 10, 10))
    assert match_clicks(np.array([[9.9, 1.0]]), cells, 4).tolist() == [1]


def test_a_click_beside_all_cells_means_the_nearest_outline_within_reach() -> None:
    """The second cell's box is nearer to the click than the first cell, its outline is not."""
    triangle = shapely.Polygon([(20, 0), (40, 0), (40, 20)])
    cells = cells_of((0, 0, 10, 20), (20, 0, 40, 20))
    cells = dataclasses.replace(cells, polygons=np.array([cells.polygons[0], triangle], object))
    points = np.array([[16.0, 19.0], [16.0, 19.0], [17.0, 0.0]])
    assert match_clicks(points[:1], cells, 7).tolist() == [0]
    assert match_clicks(points[1:], cells, 5.9).tolist() == [-1, 1]


def test_ties_do_not_depend_on_the_order_of_the_cells() -> None:
    """Equally near, equally large, and two of them with one outline."""
    cells = cells_of((0, 0, 4, 4), (6, 0, 10, 4), (6, 0, 10, 4), (3, 6, 7, 10))
    cells = dataclasses.replace(cells, points_xy=np.array([[2.0, 2.0], [8.0, 2.0], [7.0, 1.0], [5.0, 8.0]]))
    chosen = set()
    for order in itertools.permutations(range(4)):
        shuffled = cells.take(np.array(order))
        rows = match_clicks(np.array([[5.0, 2.0], [9.0, 2.0]]), shuffled, 4)
        chosen.add(tuple(order[row] for row in rows))
    assert chosen == {(0, 2)}


def test_groups_of_clicks_come_back_as_groups() -> None:
    cells = cells_of((0, 0, 10, 10), (20, 0, 30, 10))
    groups = [np.array([[5.0, 5.0], [25.0, 5.0]]), np.empty((0, 2)), np.array([[15.0, 90.0]])]
    assert [rows.tolist() for rows in match_groups(groups, cells, 4)] == [[0, 1], [], [-1]]
    assert [rows.tolist() for rows in match_groups(groups, cells_of(), 4)] == [[-1, -1], [], [-1]]


def test_the_nearest_cell_is_named_with_its_distance() -> None:
    """The nearest outline, though the box of the other is nearer."""
    triangle = shapely.Polygon([(20, 0), (40, 0), (40, 20)])
    cells = cells_of((0, 0, 10, 20), (20, 0, 40, 20))
    cells = dataclasses.replace(cells, polygons=np.array([cells.polygons[0], triangle], object))
    said = "the nearest is at [5, 10], 3 um away"
    assert describe_nearest((16, 19), cells, 0.5) == said


def test_a_click_stands_for_the_cell_of_the_result() -> None:
    """With its descriptor; without a cell, or on the cell of another type, a click keeps what was decoded from it."""
    cells = cells_of((0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10))
    bank = bank_of([[(5, 5), (90, 5)], [(32, 5), (6, 6)]], cells_of(), [[(45, 5)], [(45, 90)]])
    matched, rows, warnings = match_bank(bank, cells, cells.descriptors, 3.0)
    assert [r.tolist() for r in rows] == [[0, -1], [1, -1]]
    np.testing.assert_array_equal(matched.types[0].clicked, [cells.descriptors[0], np.full(8, 7)])
    np.testing.assert_array_equal(matched.types[1].clicked, [cells.descriptors[1], np.full(8, 7)])
    np.testing.assert_array_equal(matched.types[0].negative, [cells.descriptors[2]])
    np.testing.assert_array_equal(matched.types[1].negative, [np.full(8, 9)])
    assert warnings == [
        "the click on a at [90, 5] meets no cell of the result",
        "the click on b at [6, 6] meets the cell that was clicked as a",
    ]
    elsewhere = dataclasses.replace(bank, from_other_slide=True)
    assert match_bank(elsewhere, cells, cells.descriptors, 3.0) == (elsewhere, [], [])


def test_only_clicks_without_a_cell_add_the_one_decoded_from_them() -> None:
    decoded = cells_of((1, 1, 9, 9), (200, 200, 212, 212))
    bank = bank_of([[(5, 5)], [(205, 205), (300, 300)]], decoded)
    missed = missed_cells(bank, cells_of((0, 0, 10, 10)), 4.0)
    assert missed.points_xy.tolist() == [[206, 206]]


@pytest.mark.parametrize(("method", "kept"), [("apg", 0), ("cop", 1)])
def test_a_clicked_cell_replaces_none_that_was_found(method: str, kept: int) -> None:
    """Its own mask has the better score; the cell of the automatic prompt stays all the same, unless the chain began at the click."""
    found, decoded = cells_of((100, 100, 140, 140)), cells_of((102, 102, 142, 142), (300, 300, 340, 340))
    found = dataclasses.replace(found, scores=np.array([0.5], np.float32))
    bank = bank_of([[(121, 121)], [(320, 320)]], decoded)
    info = SlideInfo(
        path="s.tiff",
        reader="array",
        format="array",
        level_sizes=((1000, 1000),),
        downsamples=(1.0,),
        mpp=0.25,
        mpp_source="file",
        bounds=None,
    )
    config = dataclasses.replace(RunConfig(), method=method)
    result = stitch_and_type([found], info=info, config=config, bank=bank, types=None, descriptor_size=8)
    assert sorted(result.cells.points_xy[:, 0].tolist()) == [(120, 122)[kept], 320]
    assert sorted(result.typing.codes.tolist()) == [1, 2]
    assert (result.counts.outlines, result.counts.from_clicks) == ((2, 1) if method == "apg" else (3, 2))
    assert result.bank is not None
    if method == "apg":
        np.testing.assert_array_equal(result.bank.types[0].clicked, found.descriptors)
        np.testing.assert_array_equal(result.bank.types[1].clicked, decoded.descriptors[1:])
    else:
        assert result.bank is bank


def same_types_by_run_and_type(wsiseg: Command, slide: Path, tmp_path: Path, clicks_per_type: int) -> None:
    """An untyped run, typed with `type` and done again with `run --overwrite`, which must give the same; so must a fresh run."""
    assert wsiseg("run", slide, "--out", tmp_path / "plain", "--device", "cpu")[0] == 0
    run = tmp_path / "plain" / slide.stem
    cells = read_geoparquet(run / "cells.parquet")[0]
    z = cells.descriptors.astype(np.float32)
    first = [0]
    for _ in range(2):  # three cells that look unlike each other, and what looks like them
        first.append(int((z @ z[first].T).max(1).argmin()))
    kind = (z @ z[first].T).argmax(1)
    offsets = np.random.default_rng(1).uniform(-2, 2, (3, clicks_per_type + 1, 2))
    types = []
    for t, name in enumerate("abc"):
        rows = np.flatnonzero(kind == t)[: clicks_per_type + 1]
        points = shapely.get_coordinates(shapely.point_on_surface(cells.polygons[rows])) + offsets[t, : len(rows)]
        points = np.clip(points, 0, None).round(1).tolist()
        types.append({"name": name, "points": points[:clicks_per_type], "negative": []})
        if t == 2:
            types[0]["negative"] = points[clicks_per_type:]
    seeds = tmp_path / "seeds.json"
    seeds.write_text(json.dumps({"version": 1, "types": types}))
    again = shutil.copytree(run, tmp_path / "again" / slide.stem)
    status, output = wsiseg("type", run, "--seeds", seeds)
    assert status == 0, output
    status, output = wsiseg("run", slide, "--seeds", seeds, "--out", again.parent, "--overwrite", "--device", "cpu")
    assert status == 0, output
    retyped, whole = (pq.read_table(r / "cells.parquet") for r in (run, again))
    for name in retyped.schema.names:
        assert retyped[name].equals(whole[name]), name
    assert (run / "bank.safetensors").read_bytes() == (again / "bank.safetensors").read_bytes()
    assert set(read_geoparquet(run / "cells.parquet")[1].codes.tolist()) >= {1, 2, 3}


def test_run_and_type_give_the_same_types(wsiseg: Command, demo: tuple[Path, Path], tmp_path: Path) -> None:
    same_types_by_run_and_type(wsiseg, demo[0], tmp_path, 3)


@pytest.mark.realdata
def test_run_and_type_give_the_same_types_on_a_slide(wsiseg: Command, cmu: Path, tmp_path: Path) -> None:
    same_types_by_run_and_type(wsiseg, cmu, tmp_path, 4)
