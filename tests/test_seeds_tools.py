"""``wsiseg seeds convert`` loses nothing there and back; ``wsiseg seeds preview`` shows every click, the bad ones too."""

from __future__ import annotations

import gzip
import json
import zipfile
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from wsiseg.cli import main
from wsiseg.errors import SeedsError
from wsiseg.formats.qupath.points import write_qupath_points
from wsiseg.formats.qupath.validation import validate_geojson
from wsiseg.formats.seeds import QuPathSeeds, check_seeds, convert_seeds, read_seeds, write_seeds
from wsiseg.records import Seeds, SeedType, SlideInfo
from wsiseg.seeds.contact_sheet import COLUMNS, MANY, Panel, draw_sheet, panel_side
from wsiseg.seeds.preview import MAX_PANELS, WINDOW_UM, preview_seeds

if TYPE_CHECKING:
    from pathlib import Path

INFO = SlideInfo(
    path="/data/slide.svs",
    reader="openslide",
    format="aperio",
    level_sizes=((20000, 10000),),
    downsamples=(1.0,),
    mpp=0.25,
    mpp_source="x",
)
MIRAX = SlideInfo(
    path="/data/s.mrxs",
    reader="openslide",
    format="mirax",
    level_sizes=((20000, 10000),),
    downsamples=(1.0,),
    mpp=0.25,
    mpp_source="x",
    bounds=(1000, 500, 9000, 8000),
)
OWN: dict[str, Any] = {
    "version": 1,
    "types": [
        {
            "name": "tumour",
            "color": "#c80000",
            "points": [[10234.5, 8801]],
            "negative": [[9120, 4410], [10020.25, 8700]],
        },
        {"name": "µ-Lymphozyt", "color": "#0050c8", "points": [[9120, 4410], [9177, 4502.1]]},
    ],
}
TYPES = (
    SeedType("tumour", (200, 0, 0), ((10234.5, 8801.0),), ((9120.0, 4410.0), (10020.25, 8700.0))),
    SeedType("µ-Lymphozyt", (0, 80, 200), ((9120.0, 4410.0), (9177.0, 4502.1))),
)


def wsiseg(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def error(output: str) -> str:
    """The one line of the error; there must be one, and no traceback."""
    lines = [line for line in output.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, output
    assert "Traceback" not in output
    return lines[0].removeprefix("Error: ")


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def feature(kind: str, coordinates: object, classification: object = ..., **properties: object) -> dict[str, Any]:
    members = {"objectType": "annotation", **properties} | (
        {} if classification is ... else {"classification": classification}
    )
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": members}


# --- convert ----------------------------------------------------------------------------------------------------------------------

TUMOR = {"name": "Tumor", "color": [200, 0, 0]}
ONE = feature("MultiPoint", [[10.12, 20.5], [3, 4]], TUMOR, name="Points 5", isLocked=True)
MORE = [
    ONE,
    feature("Point", [5, 6], TUMOR, name="not this type"),
    feature("MultiPoint", [], {"name": "Stroma", "color": [1, 2, 3]}),
    feature("Point", [7, 8], {"name": "Immune cells", "color": [160, 90, 160]}, metadata={"a": "1"}),
]
ONE_TYPE = (SeedType("Tumor", (200, 0, 0), ((10.12, 20.5), (3.0, 4.0))),)
MORE_TYPES = (
    SeedType("Tumor", (200, 0, 0), ((10.12, 20.5), (3.0, 4.0)), ((5.0, 6.0),)),
    SeedType("Immune cells", (160, 90, 160), ((7.0, 8.0),)),
)
TABLE = "x\ty\tclass\tname\tcolor\t\n10.12\t20.5\tTumor\t\t-3670016\t\n3\t4\tTumor\tPoints 2\t-3670016\t\n"
TABLE_MORE = TABLE + "5\t6\tTumor\tNot this  type\t-3670016\t\n7\t8\tImmune cells\t\t-6268256\t\n"


def collection(*features: object) -> dict[str, object]:
    return {"type": "FeatureCollection", "features": list(features)}


def legacy(classification: object) -> object:
    return collection(feature("MultiPoint", [[10.12, 20.5], [3, 4]], classification))


# what QuPath (or a hand) wrote, and the types in it
SHAPES: dict[str, tuple[object, tuple[SeedType, ...]]] = {
    "collection": (collection(*MORE), MORE_TYPES),
    "array": (MORE, MORE_TYPES),
    "single Feature": (ONE, ONE_TYPE),
    "gz": (collection(*MORE), MORE_TYPES),
    "zip": (collection(*MORE), MORE_TYPES),
    "tsv": (TABLE, ONE_TYPE),
    "tsv with a negative": (TABLE_MORE, MORE_TYPES),
    "empty MultiPoints": (
        collection(*(feature("MultiPoint", [], {"name": n, "color": [1, 2, 3]}) for n in "abc"), ONE),
        ONE_TYPE,
    ),
    "packed colour": (legacy({"name": "Tumor", "colorRGB": -3670016}), ONE_TYPE),
    "list of names": (legacy({"names": ["Tumor"], "color": [200, 0, 0, 255]}), ONE_TYPE),
    "class as text": (legacy("Tumor"), (SeedType("Tumor", (213, 94, 0), ONE_TYPE[0].points),)),
    "0.3 spelling": (
        [
            {
                "type": "Feature",
                "id": "PathAnnotationObject",
                "geometry": ONE["geometry"],
                "properties": {"classification": TUMOR},
            }
        ],
        ONE_TYPE,
    ),
}


@pytest.mark.parametrize("name", ["points.geojson", "points.geojson.gz"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_export_of_qupath_there_and_back(tmp_path: Path, shape: str, name: str) -> None:
    """QuPath -> seeds.json -> QuPath -> seeds.json: the same types, and QuPath imports what is written."""
    document, types = SHAPES[shape]
    source = write(tmp_path / "export", document)
    if shape == "gz":
        source.write_bytes(gzip.compress(source.read_bytes()))
    if shape == "zip":
        with zipfile.ZipFile(source, "w") as archive:
            archive.writestr("a.geojson", json.dumps(collection(MORE[0])))
            archive.writestr("b.geojson", json.dumps(MORE[1:]))
    seeds, points, again = tmp_path / "seeds.json", tmp_path / name, tmp_path / "again.json"
    status, output = wsiseg("seeds", "convert", source, seeds)
    assert status == 0, output
    assert "Warning" not in output
    assert json.loads(seeds.read_text())["frame"] == "qupath"
    assert read_seeds(seeds).types == types
    status, output = wsiseg("seeds", "convert", seeds, points)
    assert status == 0, output
    assert "Warning" not in output
    assert validate_geojson(points) == []
    assert read_seeds(points).types == types
    assert wsiseg("seeds", "convert", points, again)[0] == 0
    assert again.read_bytes() == seeds.read_bytes()


def test_what_qupath_is_given(tmp_path: Path) -> None:
    """One annotation per click with class and colour; a negative click is named; unique ids; no null anywhere."""
    out = tmp_path / "points.geojson"
    convert_seeds(write(tmp_path / "seeds.json", OWN), out)
    document = json.loads(out.read_text(encoding="utf-8"))
    shown = [
        (f["geometry"]["coordinates"], f["properties"]["classification"]["name"], f["properties"].get("name"))
        for f in document["features"]
    ]
    assert shown == [
        ([10234.5, 8801], "tumour", None),
        ([9120, 4410], "tumour", "not this type"),
        ([10020.25, 8700], "tumour", "not this type"),
        ([9120, 4410], "µ-Lymphozyt", None),
        ([9177, 4502.1], "µ-Lymphozyt", None),
    ]
    assert document["features"][0]["properties"] == {
        "objectType": "annotation",
        "classification": {"name": "tumour", "color": [200, 0, 0]},
    }
    assert all(f["type"] == "Feature" and f["geometry"]["type"] == "Point" for f in document["features"])
    assert len({f["id"] for f in document["features"]}) == 5
    assert "null" not in out.read_text(encoding="utf-8")
    assert validate_geojson(out) == []


@pytest.mark.parametrize("name", ["points.geojson", "points.geojson.gz"])
def test_same_clicks_same_bytes(tmp_path: Path, name: str) -> None:
    source = write(tmp_path / "seeds.json", OWN)
    for folder in ("a", "b"):
        convert_seeds(source, tmp_path / folder / name)
    assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert ((tmp_path / "a" / name).read_bytes()[:2] == b"\x1f\x8b") is name.endswith(".gz")


def test_own_clicks_there_and_back_on_a_slide_with_bounds(tmp_path: Path) -> None:
    """Relative to the bounds for QuPath, absolute again afterwards; the slide's name is written down."""
    source = write(tmp_path / "seeds.json", OWN)
    _, warnings = convert_seeds(source, tmp_path / "points.geojson", MIRAX)
    assert len(warnings) == 1
    assert "written relative to the slide's bounds, (1000, 500) px" in warnings[0]
    assert read_seeds(tmp_path / "points.geojson").types[1].points == ((8120.0, 3910.0), (8177.0, 4002.1))
    _, warnings = convert_seeds(tmp_path / "points.geojson", tmp_path / "again.json", MIRAX)
    assert "moved by the slide's bounds, (1000, 500) px" in warnings[0]
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {"slide": "s.mrxs", **OWN}
    assert type(read_seeds(tmp_path / "again.json")) is Seeds


def test_without_bounds_a_slide_changes_no_coordinate(tmp_path: Path) -> None:
    source = write(tmp_path / "seeds.json", OWN)
    written, warnings = convert_seeds(source, tmp_path / "points.geojson", INFO)
    assert warnings == []
    assert written.types == read_seeds(tmp_path / "points.geojson").types == TYPES


def test_corrections_are_added_to_the_clicks_before(tmp_path: Path) -> None:
    """Both in the slide's frame: the earlier ones count from its corner, QuPath from that of its bounds."""
    earlier = write(tmp_path / "seeds.json", OWN)
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [[[x, 50], [x + 10, 50], [x + 10, 60], [x, 60], [x, 50]]]},
            "properties": {"objectType": "detection", "classification": {"name": name, "color": [1, 2, 3]}},
        }
        for name, x in (("tumour", 100), ("stroma", 200))
    ]
    corrected = write(tmp_path / "corrected.geojson", {"type": "FeatureCollection", "features": features})
    seeds, warnings = convert_seeds(corrected, tmp_path / "more.json", MIRAX, earlier=earlier)
    assert [(kind.name, kind.color, kind.points) for kind in seeds.types] == [
        ("tumour", (200, 0, 0), (*TYPES[0].points, (1105.0, 555.0))),
        ("µ-Lymphozyt", (0, 80, 200), TYPES[1].points),
        ("stroma", (1, 2, 3), ((1205.0, 555.0),)),
    ]
    assert seeds.types[0].negative == TYPES[0].negative
    assert any("2 detections taken as clicks" in warning for warning in warnings)
    assert read_seeds(tmp_path / "more.json").types == seeds.types
    status, output = wsiseg("seeds", "convert", corrected, tmp_path / "other.json", "--add", earlier)
    assert status == 1
    assert error(output).endswith("since they may count from different corners; pass --slide")
    assert not (tmp_path / "other.json").exists()


def test_a_converted_file_is_right_before_and_after_the_slide_is_known(tmp_path: Path) -> None:
    """Converting with the slide, or without it and checking later, gives the same absolute clicks."""
    source = write(tmp_path / "export.geojson", collection(*MORE))
    convert_seeds(source, tmp_path / "with.json", MIRAX)
    convert_seeds(source, tmp_path / "without.json")
    assert isinstance(read_seeds(tmp_path / "without.json"), QuPathSeeds)
    placed = [check_seeds(read_seeds(tmp_path / name), MIRAX)[0].types for name in ("with.json", "without.json")]
    assert placed[0] == placed[1]
    assert placed[0][1].points == ((1007.0, 508.0),)
    convert_seeds(tmp_path / "without.json", tmp_path / "back.geojson", MIRAX)
    assert read_seeds(tmp_path / "back.geojson").types == MORE_TYPES


def test_absolute_clicks_for_qupath_warn_without_the_slide(tmp_path: Path) -> None:
    status, output = wsiseg("seeds", "convert", write(tmp_path / "seeds.json", OWN), tmp_path / "points.geojson")
    assert status == 0
    assert (
        "written without checking the slide; if it has bounds (MRXS and some others), QuPath needs --slide here"
        in output
    )
    assert "tumour: 1 click, 2 negative" in output
    assert read_seeds(tmp_path / "points.geojson").types == TYPES


numbers = st.integers(0, 999_999).map(lambda n: n / 100)


@settings(max_examples=50, deadline=None)
@given(points=st.lists(st.tuples(numbers, numbers), min_size=1, max_size=6, unique=True), split=st.integers(1, 6))
def test_any_clicks_survive(
    tmp_path_factory: pytest.TempPathFactory, points: list[tuple[float, float]], split: int
) -> None:
    """Hundredths of a pixel come back exactly, moved by bounds or not."""
    folder = tmp_path_factory.mktemp("any")
    types = (SeedType("a", (1, 2, 3), tuple(points[:split]), tuple(points[split:])),)
    write_seeds(folder / "seeds.json", Seeds(types, "x"))
    for info in (None, INFO, MIRAX):
        convert_seeds(folder / "seeds.json", folder / "points.geojson", info, overwrite=True)
        convert_seeds(folder / "points.geojson", folder / "again.json", info, overwrite=True)
        assert read_seeds(folder / "again.json").types == types


@pytest.mark.parametrize("name", ["negative", "Not tumour", "Points 5", "", None, 7])
def test_only_the_agreed_name_makes_a_click_negative(tmp_path: Path, name: object) -> None:
    seeds = read_seeds(write(tmp_path / "s.geojson", collection(feature("Point", [1, 2], TUMOR, name=name))))
    assert seeds.types == (SeedType("Tumor", (200, 0, 0), ((1.0, 2.0),)),)


def test_a_class_of_negative_clicks_alone_is_refused(tmp_path: Path) -> None:
    source = write(
        tmp_path / "s.geojson",
        collection(feature("MultiPoint", [[1, 2], [3, 4]], TUMOR, name="not this type"), MORE[3]),
    )
    with pytest.raises(
        SeedsError,
        match="class 'Tumor': all its points are named 'not this type', so it has no points; click at least one",
    ):
        read_seeds(source)


def test_nothing_is_written_over_or_under_a_wrong_name(tmp_path: Path) -> None:
    """One line each, and every file as it was."""
    own, export = write(tmp_path / "seeds.json", OWN), write(tmp_path / "export.geojson", collection(*MORE))
    folder = tmp_path / "folder.json"
    folder.mkdir()
    before = {path.name: path.read_bytes() for path in (own, export)}
    cases = [
        (own, export, "the file exists; give another name, or pass --overwrite"),
        (export, own, "the file exists; give another name"),
        (export, folder, "is a folder; a file is written here"),
        (
            own,
            tmp_path / "new.json",
            "holds a seeds.json, so points for QuPath would be written here; a name in .geojson or .geojson.gz is needed",
        ),
        (
            export,
            tmp_path / "new.geojson",
            "holds QuPath's points, so a seeds.json would be written here; a name in .json is needed",
        ),
        (own, tmp_path / "new.zip", "a name in .geojson or .geojson.gz is needed"),
        (tmp_path / "absent.json", tmp_path / "new.json", "cannot be read (No such file"),
    ]
    for source, target, sentence in cases:
        status, output = wsiseg("seeds", "convert", source, target)
        assert status == 1
        assert sentence in error(output)
    status, output = wsiseg("seeds", "convert", own, own, "--overwrite")
    assert status == 1
    assert "this is also the file that is read" in error(output)
    assert {path.name for path in tmp_path.iterdir()} == {*before, "folder.json"}
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_overwrite_replaces_only_when_all_is_well(tmp_path: Path) -> None:
    own, target = write(tmp_path / "seeds.json", OWN), write(tmp_path / "points.geojson", "old")
    broken = write(tmp_path / "broken.json", {"version": 1, "types": []})
    assert wsiseg("seeds", "convert", broken, target, "--overwrite")[0] == 1
    assert target.read_text() == "old"
    assert wsiseg("seeds", "convert", own, target, "--overwrite")[0] == 0
    assert read_seeds(target).types == TYPES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.json", "points.geojson", "seeds.json"]


def test_the_slide_is_asked(tmp_path: Path, demo: tuple[Path, Path]) -> None:
    slide, seeds = demo
    outside = write(tmp_path / "outside.json", OWN)
    status, output = wsiseg("seeds", "convert", outside, tmp_path / "points.geojson", "--slide", slide)
    assert status == 1
    assert "is outside ihc.tiff, which has 512 x 512 px" in error(output)
    assert not (tmp_path / "points.geojson").exists()
    status, output = wsiseg("seeds", "convert", seeds, tmp_path / "points.geojson", "--slide", slide)
    assert status == 0
    assert "Warning" not in output
    assert wsiseg("seeds", "convert", tmp_path / "points.geojson", tmp_path / "again.json", "--slide", slide)[0] == 0
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(seeds.read_text())


def test_writing_points_that_could_not_be_read_is_refused(tmp_path: Path) -> None:
    bad = Seeds((SeedType("a:b", (1, 2, 3), ((1.0, 2.0),)),), "x")
    with pytest.raises(SeedsError, match=r"types\[0\]\.name: .* has a ':'"):
        write_qupath_points(tmp_path / "p.geojson", bad)
    with pytest.raises(SeedsError, match=r"points for QuPath are written as \.geojson or \.geojson\.gz"):
        write_qupath_points(tmp_path / "p.json", Seeds(TYPES, "x"))
    assert list(tmp_path.iterdir()) == []


# --- preview ----------------------------------------------------------------------------------------------------------------------

ORANGE = (190, 110, 0)
RED = (220, 0, 0)  # of the frame of a bad click
TYPE_COLORS = ((0, 200, 0), (0, 80, 200))  # unlike anything on an H&E slide


def clicks(path: Path, *types: tuple[list[list[float]], list[list[float]]]) -> Path:
    members = [
        {"name": f"type {k}", "color": "#" + bytes(TYPE_COLORS[k]).hex(), "points": points, "negative": negative}
        for k, (points, negative) in enumerate(types)
    ]
    return write(path, {"version": 1, "types": members})


def near(image: np.ndarray, color: tuple[int, int, int]) -> np.ndarray:
    return np.abs(image.astype(int) - color).max(axis=-1) <= 40


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def frames(image: np.ndarray, color: tuple[int, int, int] = RED) -> int:
    """Number of frames of a colour; letters are far smaller."""
    labels, _ = ndimage.label((image == color).all(-1))
    return int((np.bincount(labels.ravel())[1:] > 4 * panel_side(1)).sum())


def test_the_demo_is_drawn(tmp_path: Path, demo: tuple[Path, Path]) -> None:
    out = tmp_path / "new folder" / "clicks.png"
    status, output = wsiseg("seeds", "preview", demo[1], demo[0], "--out", out, "--device", "cpu")
    assert status == 0, output
    assert "epithelium: 4 clicks" in output
    assert f"{out}: 12 of 12 clicks drawn, 0 bad, 0 doubtful" in output
    image = pixels(out)
    assert frames(image) == 0
    for kind in read_seeds(demo[1]).types:
        assert (image == kind.color).all(-1).sum() > 100, kind.name


def test_good_clicks_on_a_real_slide(tmp_path: Path, cmu: Path) -> None:
    """Two clicks of two types: the slide's own pixels, an outline around each click in its colour, nothing red."""
    seeds = clicks(tmp_path / "seeds.json", ([[1190, 991]], []), ([[1075, 1164]], [[1190, 991]]))
    status, output = wsiseg("seeds", "preview", seeds, cmu, "--out", tmp_path / "clicks.png")
    assert status == 0, output
    image = pixels(tmp_path / "clicks.png")
    assert frames(image) == 0
    from wsiseg.geometry import Box, Lattice
    from wsiseg.slide import open_slide, read_region

    side = panel_side(3)
    with open_slide(cmu) as reader:
        lattice = Lattice(reader.info.mpp, WINDOW_UM / side)
        for number, (point, color) in enumerate(zip(((1190, 991), (1075, 1164)), TYPE_COLORS, strict=True)):
            x, y = lattice.to_model(np.array(point, float))
            x0, y0 = int(np.floor(x - side / 2)), int(np.floor(y - side / 2))
            expected = read_region(reader, Box(x0, y0, x0 + side, y0 + side), lattice)
            top, left = places(image, expected[:20])[0]
            panel = image[top : top + side, left : left + side]
            changed = (panel != expected).any(-1)
            assert 0 < changed.mean() < 0.1  # cross and outline, and nothing else
            lines, columns = np.nonzero(near(panel, color))
            assert len(lines) > 40
            assert lines.min() < y - y0 < lines.max(), number
            assert columns.min() < x - x0 < columns.max(), number


def places(image: np.ndarray, strip: np.ndarray) -> list[tuple[int, int]]:
    """Where ``strip`` lies in ``image``: (row, column)."""
    height, width = strip.shape[:2]
    first = np.argwhere((image[: -height or None, : -width or None] == strip[0, 0]).all(-1))
    return [(int(r), int(c)) for r, c in first if np.array_equal(image[r : r + height, c : c + width], strip)]


BAD = {
    "glass": ((([[1190, 991], [400, 2000]], []), ([[1075, 1164]], [])), 1),
    "two types on one cell": ((([[1190, 991]], []), ([[1075, 1164], [1192, 992]], [])), 2),
    "a negative click on glass": ((([[1190, 991]], [[400, 2000]]), ([[1075, 1164]], [])), 1),
    "several": ((([[1190, 991]], [[400, 2000]]), ([[1192, 992], [400, 2100]], [])), 4),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_clicks_are_framed_and_the_error_is_the_one_of_a_run(tmp_path: Path, cmu: Path, case: str) -> None:
    """The sheet is written with a red frame round each, then the command fails with the very sentence of ``wsiseg run``."""
    types, bad = BAD[case]
    seeds, out = clicks(tmp_path / "seeds.json", *types), tmp_path / "clicks.png"
    status, output = wsiseg("seeds", "preview", seeds, cmu, "--out", out)
    assert status == 1
    assert f"{bad} bad" in output
    assert frames(pixels(out)) == bad
    said = error(output)
    assert ("hits the same cell as" if "two types" in case else "on glass, no tissue within 4 um") in said
    status, output = wsiseg("run", cmu, "--seeds", seeds, "--out", tmp_path / "runs")
    assert status == 1
    assert error(output) == said
    assert not (tmp_path / "runs").exists()


def test_the_outline_is_the_cell_of_the_run(cmu: Path, model: Any) -> None:
    """``find_clicked`` and ``build_bank`` take a click for the same cell."""
    from wsiseg.config import RunConfig
    from wsiseg.geometry import Lattice
    from wsiseg.seeds.bank import build_bank, find_clicked
    from wsiseg.slide import open_slide

    seeds = Seeds((SeedType("a", (1, 2, 3), ((1190.0, 991.0),)), SeedType("b", (4, 5, 6), ((1075.0, 1164.0),))), "x")
    with open_slide(cmu) as reader:
        lattice = Lattice(reader.info.mpp, model.mpp)
        bank = build_bank(reader, model, seeds, lattice, RunConfig(), chains=False)
        for row, kind in enumerate(seeds.types):
            cell = find_clicked(reader, model, kind.points[0], lattice, RunConfig(), "here").cell
            assert len(cell) == 1
            assert cell.polygons[0].equals(bank.cells.polygons[row])
            assert cell.scores[0] == bank.cells.scores[row]
        with pytest.raises(SeedsError, match=r"^here = \[400, 2000\]: on glass, no tissue within 4 um"):
            find_clicked(reader, model, (400.0, 2000.0), lattice, RunConfig(), "here")


def test_preview_of_qupaths_points_and_what_stops_it(tmp_path: Path, demo: tuple[Path, Path]) -> None:
    slide, seeds = demo
    points, out = tmp_path / "points.geojson", tmp_path / "clicks.png"
    convert_seeds(seeds, points)
    refused = [
        (
            ("seeds", "preview", points, slide, "--out", tmp_path / "clicks.jpg"),
            "the sheet is written as PNG; give it a name that ends in .png",
        ),
        (("seeds", "preview", points, tmp_path / "no.svs", "--out", out), "no such file"),
        (("seeds", "preview", tmp_path / "no.json", slide, "--out", out), "cannot be read"),
        (("seeds", "preview", points, slide, "--out", out, "--model", "other"), "no such model"),
        (("seeds", "preview", points, slide, "--out", out, "--device", "abacus"), "not a device"),
        (("seeds", "preview", points, slide, "--out", out, "--mpp", "40"), "40 looks like a magnification"),
    ]
    for arguments, sentence in refused:
        status, output = wsiseg(*arguments)
        assert status == 1, output
        assert sentence in error(output) or "must lie between" in error(output)
        assert [path.name for path in tmp_path.iterdir()] == ["points.geojson"]
    assert wsiseg("seeds", "preview", points, slide, "--out", out)[0] == 0
    drawn = out.read_bytes()
    status, output = wsiseg("seeds", "preview", points, slide, "--out", out)
    assert status == 1
    assert "the file exists; give another name" in error(output)
    assert out.read_bytes() == drawn
    status, output = wsiseg("seeds", "preview", seeds, slide, "--out", out, "--overwrite")
    assert status == 0
    assert out.read_bytes() != drawn  # the title names the other file


def test_a_click_beside_every_nucleus_counts_and_is_framed_in_orange(tmp_path: Path, cmu: Path) -> None:
    """Nothing can be outlined among these fibres, so the panel has a cross and a sentence; somebody may have meant it all the same."""
    seeds, out = clicks(tmp_path / "seeds.json", ([[1190, 991]], []), ([[560, 2700]], [])), tmp_path / "clicks.png"
    status, output = wsiseg("seeds", "preview", seeds, cmu, "--out", out)
    assert status == 0, output
    doubt = "types[1].points[0] = [560, 2700]: the model finds no nucleus there; its surroundings are used"
    assert f"Warning: {seeds}: {doubt}" in output
    assert f"{out}: 2 of 2 clicks drawn, 0 bad, 1 doubtful" in output
    image = pixels(out)
    assert frames(image) == 0
    assert frames(image, ORANGE) == 1


def panel(kind: int, number: int, shade: tuple[int, int, int], side: int, fault: str = "") -> Panel:
    block = np.full((side, side, 3), shade, np.uint8)
    return Panel(
        kind=kind,
        number=number,
        negative=False,
        point=(123456.5, 7.0),
        pixels=block,
        click_xy=(side / 2, side / 2),
        outline=None,
        score=None if fault else 0.5,
        fault=fault,
    )


def test_500_clicks_are_all_on_a_sheet_of_bounded_size() -> None:
    """Every panel is there once and whole, types do not share a row, and the sheet fits a viewer."""
    side = panel_side(500)
    kinds = [k * 3 // 500 for k in range(500)]
    fault = "no cell there; the nearest is at [1201, 1003], 7 um away; move the click onto a nucleus"
    panels = [panel(t, k, (k % 250, k // 250, 77), side, fault if k % 20 == 0 else "") for k, t in enumerate(kinds)]
    types = [SeedType(f"type {t}", (1, 2, 3), tuple((float(k), 0.0) for k in range(kinds.count(t)))) for t in range(3)]
    sheet = np.asarray(draw_sheet(panels, types, "title", WINDOW_UM / side))
    height, width = sheet.shape[:2]
    assert width <= 2200
    assert height <= 9000
    codes = np.where(
        sheet[..., 2] == 77, sheet[..., 0] + 250 * sheet[..., 1].astype(int) + 1, 0
    )  # 1 + number of the panel
    codes[codes > 500] = 0  # ink that happens to have this blue
    assert (np.bincount(codes.ravel(), minlength=501)[1:] > 0.9 * side**2).all()
    rows_of: dict[int, set[int]] = {}
    for t, (lines, columns) in zip(kinds, ndimage.find_objects(codes), strict=True):
        assert (lines.stop - lines.start, columns.stop - columns.start) == (side, side)
        rows_of.setdefault(lines.start, set()).add(t)
    assert all(len(types_of_row) == 1 for types_of_row in rows_of.values())
    assert len(rows_of) == sum(-(-kinds.count(t) // COLUMNS[1]) for t in range(3))


def test_captions_stay_in_their_panel() -> None:
    """Long names and sentences are shortened or wrapped: right of the last panel, and between two panels, there is no ink."""
    side = panel_side(2)
    long = SeedType("a name of many words " * 4 + "淋巴", (200, 0, 0), ((1.0, 2.0), (3.0, 4.0)))
    sheet = np.asarray(
        draw_sheet([panel(0, 0, (9, 9, 9), side, "word " * 60), panel(0, 1, (9, 9, 9), side)], [long], "title", 0.25)
    )
    tops = np.nonzero((sheet == 9).all(-1).any(1))[0]
    below = sheet[tops.max() + 6 :]
    for left in (0, 8 + side, 8 + 2 * (side + 8)):
        assert (below[:, left : left + 8] == 255).all()
    assert (below[:, 8 : 8 + side] != 255).any()
    assert (below[:, 16 + side : 16 + 2 * side] != 255).any()


def test_more_clicks_than_a_sheet_holds(
    tmp_path: Path, demo: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All bad clicks are drawn, whatever their place in the file, and the report says how many are not."""
    from wsiseg.records import Cells
    from wsiseg.seeds import preview
    from wsiseg.seeds.bank import ClickedCell

    last = [500.0, 500.0]
    grid = [[float(10 + k % 30 * 16), float(10 + k // 30 * 16)] for k in range(MAX_PANELS + 10)]
    seeds = clicks(tmp_path / "seeds.json", ([*grid, last], []))

    def refuse_last(
        _reader: object, _model: object, point: tuple[float, float], _lattice: object, _config: object, place: str
    ) -> ClickedCell:
        if list(point) == last:
            raise SeedsError(f"{place} = [500, 500]: on glass; click on a nucleus")
        disc = np.array([shapely.Point(point).buffer(5)], object)
        cell = Cells(
            polygons=disc,
            points_xy=np.array([point]),
            scores=np.ones(1, np.float32),
            descriptors=np.zeros((1, 4), np.float16),
        )
        return ClickedCell(place=place, prompt=np.array(point), descriptor=np.zeros(4, np.float32), cell=cell)

    seen = []
    monkeypatch.setattr(preview, "find_clicked", refuse_last)
    drawn = []
    monkeypatch.setattr(
        preview, "draw_sheet", lambda panels, *rest: drawn.extend(panels) or draw_sheet(panels[:5], *rest)
    )
    sheet = preview_seeds(seeds, str(demo[0]), tmp_path / "clicks.png", on_progress=lambda *state: seen.append(state))
    assert (sheet.clicks, sheet.drawn, sheet.bad) == (MAX_PANELS + 11, MAX_PANELS, 1)
    assert sheet.faults == (f"{seeds}: types[0].points[{MAX_PANELS + 10}] = [500, 500]: on glass; click on a nucleus",)
    assert [p.number for p in drawn] == [*range(MAX_PANELS - 1), MAX_PANELS + 10]
    assert drawn[-1].fault == "on glass; click on a nucleus"
    assert seen[-1] == (MAX_PANELS + 11, MAX_PANELS + 11, MAX_PANELS + 10)
    assert MAX_PANELS > MANY
