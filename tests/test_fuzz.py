"""Files that people bring, changed at random: each is read, or refused in one short line; nothing else is raised, nothing hangs.

Valid documents are changed where they have meaning (a node becomes of another type, a number huge, a list deeply nested), encoded as programs encode
text, and damaged as copies are. ``WSISEG_FUZZ=20 pytest tests/test_fuzz.py`` runs twenty times as many examples, other ones at each call.
"""

from __future__ import annotations

import copy
import gzip
import io
import json
import math
import os
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from wsiseg.config import read_config
from wsiseg.errors import WsisegError
from wsiseg.evaluation import evaluate
from wsiseg.formats.regions import read_regions
from wsiseg.formats.seeds import check_seeds, read_seeds, write_seeds
from wsiseg.records import SlideInfo
from wsiseg.runs.slide_list import read_list

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SCALE = int(os.environ.get("WSISEG_FUZZ", "1"))
LONGEST = 1500  #: characters of a message, the path left out: what is wrong, not the whole document
INFO = SlideInfo(
    path="/data/a.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((1000, 800),),
    downsamples=(1.0,),
    mpp=0.5,
    mpp_source="--mpp",
)
DEEP = "@deep@"  #: stands for a list within lists in the text, deeper than json.dumps goes


def examples(count: int) -> Callable[[Any], Any]:
    """So many examples, always the same ones unless more are asked for."""
    checks = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    more = settings(
        max_examples=count * SCALE, deadline=None, derandomize=SCALE == 1, database=None, suppress_health_check=checks
    )
    return lambda test: pytest.mark.timeout(300 * SCALE)(more(test))


def read_or_refused(read: Callable[[], object], path: Path) -> None:
    """The whole of the guarantee."""
    try:
        read()
    except WsisegError as error:
        said = str(error).replace(str(path), "")
        assert len(said.splitlines()) == 1, said
        assert len(said) < LONGEST, said
        said.encode()


# Documents that are right


SQUARE = [[10, 10], [110, 10], [110.5, 110], [10, 110.25], [10, 10]]
HOLE = [[20, 20], [30, 20], [30, 30], [20, 30], [20, 20]]
TUMOUR = {"name": "tumour", "color": [200, 0, 0]}
SEEDS = {
    "version": 1,
    "slide": "a.svs",
    "frame": "slide",
    "types": [
        {"name": "tumour", "color": "#c80000", "points": [[10, 20.5], [3, 4]], "negative": [[7, 8]]},
        {"name": "other", "points": [[1, 2]]},
    ],
}


def feature(kind: str, coordinates: object, **properties: object) -> dict[str, Any]:
    return {
        "type": "Feature",
        "id": "a",
        "geometry": {"type": kind, "coordinates": coordinates},
        "properties": properties,
    }


POINTS = {
    "type": "FeatureCollection",
    "features": [
        feature("Point", [10, 20], objectType="annotation", classification=TUMOUR),
        feature(
            "MultiPoint",
            [[1, 2], [3, 4]],
            classification={"names": ["stroma"], "colorRGB": -3670016},
            name="a",
            childObjects=[feature("Point", [5, 6], classification={"name": "b", "parentClass": None})],
        ),
    ],
}
CELLS = {
    "type": "FeatureCollection",
    "features": [
        feature("Polygon", [SQUARE, HOLE], objectType="detection", classification=TUMOUR),
        feature(
            "MultiPolygon",
            [[SQUARE], [[[300, 300], [310, 300], [310, 310], [300, 300]]]],
            objectType="detection",
            classification="x",
        ),
        {
            "type": "Feature",
            "properties": {"objectType": "cell", "children": [feature("Polygon", [HOLE])]},
            "nucleusGeometry": {"type": "Polygon", "coordinates": [HOLE]},
            "geometry": {"type": "GeometryCollection", "geometries": [{"type": "Polygon", "coordinates": [SQUARE]}]},
        },
    ],
    "wsiseg": {"mpp": 0.5, "bounds": [1, 2, 3, 4]},
}
CONFIG = {
    "method": "apg",
    "mpp": 0.5,
    "reader": "auto",
    "seeds": "s.json",
    "workers": 2,
    "formats": ["parquet"],
    "tiling": {"tile_um": 128.0, "block_tiles": 2},
    "masks": {"min_score": 0.3},
    "cop": {"gate": "product"},
    "refinement": {"enabled": True},
    "cluster": {"directives": ["a"], "queue": "q"},
}
TABLES = (
    "path,mpp,seeds,name\na.svs,,a.json,\nscans/b.tif,0.25,,patient-7\n",
    "Path;MPP\na.svs;0,25\n\nb.svs;\n",
    'x\ty\tclass\tname\tcolor\t\n10.5\t20.5\tTumor\t\t-3670016\t\n1\t2\tTumor\t"Points 2"\t-3670016\t\n',
    "x,y,type\n15,15,a\n45, 15,b\n",
    'sep=;\r\n"X";"Y";"Class"\r\n1,5;2,5;a\r\n',
)
TOML = 'method = "cop"\nmpp = 0.5\n[tiling]\ntile_um = 64\nhalo_um = 24.0\n[cluster]\nprologue = ["module load"]\n'

# Changes


JUNK = st.one_of(
    st.sampled_from(
        [
            None,
            True,
            False,
            0,
            -1,
            2**31,
            10**400,
            1e300,
            -1e300,
            5e-324,
            math.nan,
            math.inf,
            -math.inf,
            "",
            "x",
            "0,25",
            "Polygon",
            "\ud800",
            "\0",
            "\u202e",
            "\u2028",
            "a\nb",
            "e\u0301" * 50,
            "9" * 5000,
            DEEP,
            [],
            {},
            [[]],
            [{}],
            [1],
            [1, 2],
            [1, 2, 3],
            ["a", "b"],
            [None, None],
            [[1, 2]],
            [[[1, 2]]],
            {"type": "Polygon"},
            {"type": "Feature"},
            {"type": "Polygon", "coordinates": [[[0, 0], [9, 9], [9, 0], [0, 9]]]},
            SQUARE,
            [SQUARE],
            CELLS,
            SEEDS,
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.lists(st.floats(-100, 2000), max_size=4),
)


def nodes(document: Any) -> list[tuple[Any, Any]]:
    """Every place in a document as its container and key."""
    found, stack = [], [document]
    while stack:
        holder = stack.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)) if isinstance(holder, list) else ():
            found.append((holder, key))
            stack.append(holder[key])
    return found


@st.composite
def changed(draw: st.DrawFn, document: Any) -> str:
    """JSON text of a document in which some nodes are others."""
    document = copy.deepcopy([document])
    for _ in range(draw(st.integers(0, 3))):
        places = nodes(document)
        if not places:
            break
        holder, key = places[draw(st.integers(0, len(places) - 1))]
        match draw(st.sampled_from(["junk", "junk", "junk", "less", "twice", "within", "other", "name"])):
            case "junk":
                holder[key] = copy.deepcopy(draw(JUNK))
            case "less":
                del holder[key]
            case "twice" if isinstance(holder, list):
                holder.insert(key, copy.deepcopy(holder[key]))
            case "within":
                for _ in range(draw(st.sampled_from([1, 2, 40, 300]))):
                    holder[key] = draw(
                        st.sampled_from([[holder[key]], {"type": "GeometryCollection", "geometries": [holder[key]]}])
                    )
            case "other":
                holder[key] = copy.deepcopy(places[draw(st.integers(0, len(places) - 1))][0])
            case _ if isinstance(holder, dict):
                holder[
                    draw(st.sampled_from(["Type", "point", "", "\ud800", "a\nb", "x" * 5000]) | st.text(max_size=8))
                ] = holder.pop(key)
    deep = draw(st.sampled_from([30, 200, 900, 100_000]))
    opening, closing = draw(
        st.sampled_from([("[", "]"), ('{"childObjects":', "}"), ('{"type":"GeometryCollection","geometries":[', "]}")])
    )
    text = json.dumps(document, ensure_ascii=draw(st.booleans()) or "\\ud" in json.dumps(document))[1:-1]
    return text.replace(f'"{DEEP}"', opening * deep + "1" + closing * deep)


@st.composite
def edited(draw: st.DrawFn, texts: tuple[str, ...]) -> str:
    """A text with some pieces replaced."""
    text = draw(st.sampled_from(texts))
    for _ in range(draw(st.integers(0, 4))):
        place = draw(st.integers(0, len(text)))
        piece = draw(
            st.sampled_from(
                [
                    "",
                    ",",
                    ";",
                    "\t",
                    '"',
                    "\n",
                    "\r",
                    "\r\n",
                    "\0",
                    "x",
                    "0,25",
                    "1e400",
                    "nan",
                    "-1e300",
                    "ä",
                    "\u2028",
                    "\ufeff",
                    "[" * 2000,
                    "9" * 5000,
                    "= ",
                    "sep=,\n",
                    "'",
                    "[a]\n",
                    "x" * 140_000,
                    "1_0",
                    "0x" + "f" * 2000,
                ]
            )
            | st.text(max_size=6)
        )
        text = text[:place] + piece + text[place + draw(st.sampled_from([0, 0, 1, 3, 12])) :]
    return text


@st.composite
def encoded(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """A text as bytes: in some encoding, with some line ends, packed or not, whole or damaged."""
    text = draw(texts)
    if draw(st.integers(0, 3)) == 0:
        text = text.replace("\n", draw(st.sampled_from(["\r\n", "\r"])))
    usual = ["utf-8"] * 5
    encoding = draw(
        st.sampled_from([*usual, "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252", "shift-jis"])
    )
    content = text.encode(encoding, "replace")
    return damaged(draw, packed(draw, content))


def packed(draw: st.DrawFn, content: bytes) -> bytes:
    match draw(st.integers(0, 9)):
        case 0:
            return gzip.compress(content, 1)
        case 1:
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                for name in draw(
                    st.sampled_from(
                        [["a.json"], ["a.geojson", "b.json"], ["__MACOSX/a.json", "a.txt"], ["xl/workbook.xml"], []]
                    )
                ):
                    archive.writestr(name, content)
            return buffer.getvalue()
    return content


def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    kind = draw(st.integers(0, 9))
    if not content or kind > 3:
        return content
    place = draw(st.integers(0, len(content) - 1) | st.integers(0, min(len(content) - 1, 120)))
    match kind:
        case 0:
            return content[:place]
        case 1:
            return content[:place] + draw(st.binary(max_size=8)) + content[place:]
        case 2:
            return (
                draw(
                    st.sampled_from(
                        [
                            b"\x89PNG\r\n",
                            b"\xff\xd8\xff",
                            b"II*\0",
                            b"\xff\xfe",
                            b"\x1f\x8b",
                            b"PK\x03\x04",
                            b"\0",
                            b"{",
                        ]
                    )
                )
                + content
            )
    return content[:place] + bytes([draw(st.integers(0, 255))]) + content[place + 1 :]


# What is read


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    label = np.zeros((60, 70), np.uint8)
    label[10:20, 10:20], label[10:20, 40:50] = 1, 2
    Image.fromarray(label).save(folder / "truth.png")
    return folder


def written(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@examples(650)
@given(
    content=encoded(
        st.one_of(
            changed(SEEDS),
            changed(POINTS),
            changed(CELLS),
            edited(TABLES),
            edited((json.dumps(POINTS), json.dumps(SEEDS))),
        )
    )
)
def test_clicks(folder: Path, content: bytes) -> None:
    """And what was read is written so that it is read again."""
    path = written(folder / "seeds", content)

    def read() -> None:
        seeds = read_seeds(path)
        write_seeds(folder / "again.json", seeds)
        assert read_seeds(folder / "again.json").types == seeds.types
        check_seeds(seeds, INFO)

    read_or_refused(read, path)


@examples(450)
@given(
    content=encoded(
        st.one_of(
            changed(CELLS), changed(CELLS["features"]), changed(CELLS["features"][0]["geometry"]), changed(POINTS)
        )
    )
)
def test_regions(folder: Path, content: bytes) -> None:
    """And what was read is a valid shape on the slide."""
    path = written(folder / "roi.geojson", content)

    def read() -> None:
        shape, notes = read_regions(path, INFO)
        assert shape.is_valid
        assert shape.area > 0
        assert all(len(note.splitlines()) == 1 for note in notes)

    read_or_refused(read, path)


@examples(250)
@given(content=encoded(edited(TABLES)))
def test_lists(folder: Path, content: bytes) -> None:
    path = written(folder / "list.csv", content)
    read_or_refused(lambda: read_list(path), path)


@examples(250)
@given(content=encoded(st.one_of(changed(CONFIG), changed({"config": CONFIG}), edited((TOML,)))))
def test_configurations(folder: Path, content: bytes) -> None:
    path = written(folder / "settings", content)
    read_or_refused(lambda: read_config(path).hash(), path)


@examples(200)
@given(
    content=encoded(st.one_of(changed(CELLS), changed(CELLS), edited((json.dumps(CELLS),)))),
    side=st.booleans(),
    mpp=st.sampled_from([None, 0.5]),
    both=st.booleans(),
)
def test_outlines_to_evaluate(folder: Path, content: bytes, side: bool, mpp: float | None, both: bool) -> None:
    path = written(folder / "cells.geojson", content)
    pair = [path, path if both else folder / "truth.png"]
    read_or_refused(lambda: json.dumps(evaluate(*pair[:: 1 if side else -1], mpp=mpp).as_dict()).encode(), path)


@examples(100)
@given(content=encoded(edited(TABLES[3:])), names=encoded(changed({"1": "tumour", "2": "x"})))
def test_points_to_evaluate(folder: Path, content: bytes, names: bytes) -> None:
    path, classes = written(folder / "points.csv", content), written(folder / "classes.json", names)
    read_or_refused(lambda: evaluate(path, folder / "truth.png", mpp=0.5), path)
    read_or_refused(lambda: evaluate(folder / "truth.png", folder / "truth.png", classes=classes), classes)


def images() -> list[tuple[str, bytes]]:
    label = np.zeros((60, 70), np.uint16)
    label[10:20, 10:20], label[10:20, 40:50] = 1, 900
    found = []
    for suffix, save in (
        (".png", lambda b, x: Image.fromarray(x).save(b, "PNG")),
        (".npy", np.save),
        (".tif", tifffile.imwrite),
        (".tif", lambda b, x: tifffile.imwrite(b, x, compression="zlib", tile=(32, 32))),
        (".npy", lambda b, x: np.save(b, x.astype(np.int64))),
        (".png", lambda b, x: Image.fromarray((x % 7).astype(np.uint8)).convert("P").save(b, "PNG")),
        (".png", lambda b, x: Image.fromarray(x > 0).save(b, "PNG")),
    ):
        buffer = io.BytesIO()
        save(buffer, label)
        found.append((suffix, buffer.getvalue()))
    return found


@examples(100)
@given(data=st.data())
def test_label_images_to_evaluate(folder: Path, data: st.DataObject) -> None:
    suffix, content = data.draw(st.sampled_from(images()))
    for _ in range(data.draw(st.integers(0, 3))):
        content = damaged(data.draw, content)
    path = written(folder / f"label{suffix}", content)
    read_or_refused(lambda: evaluate(path, folder / "truth.png"), path)
