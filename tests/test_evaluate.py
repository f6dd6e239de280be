"""``wsiseg evaluate``: every kind of file, folders, types, points, and what is refused."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING

import geopandas
import numpy as np
import pytest
import shapely
import tifffile
from click.testing import CliRunner
from PIL import Image

from wsiseg.cli import main
from wsiseg.evaluation import evaluate
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.records import Cells, Provenance, SlideInfo, Typing

if TYPE_CHECKING:
    from pathlib import Path

# Truth: a at (10, 10), a at (40, 10), b at (10, 40), squares of 10 px. Predicted: the first moved by 2 px (IoU 80/120 = 2/3), the second exact but
# typed b, the third missed, and a b invented at (70, 70).
TRUTH = [(10, 10, "a"), (40, 10, "a"), (10, 40, "b")]
PREDICTED = [(12, 10, "a"), (40, 10, "b"), (70, 70, "b")]
SIZE = (100, 90)
PQ, AJI = (2 / 3 + 1) / 3, 180 / (120 + 100 + 100 + 100)
TYPE_IDS = {"a": 1, "b": 2}


def label(cells: list[tuple[int, int, str]]) -> np.ndarray:
    out = np.zeros(SIZE, np.uint16)
    for k, (x, y, _) in enumerate(cells):
        out[y : y + 10, x : x + 10] = 7 * (k + 1)
    return out


def kinds(cells: list[tuple[int, int, str]]) -> np.ndarray:
    out = np.zeros(SIZE, np.uint8)
    for x, y, kind in cells:
        out[y : y + 10, x : x + 10] = TYPE_IDS[kind]
    return out


def polygons(cells: list[tuple[int, int, str]]) -> np.ndarray:
    return np.array([shapely.box(x, y, x + 10, y + 10) for x, y, _ in cells], object)


def png(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    Image.fromarray(image).save(path)
    return path


def palette_png(path: Path, image: np.ndarray) -> Path:
    """Ids drawn in colours: the indices are the ids."""
    picture = Image.fromarray(image.astype(np.uint8))
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 768).tolist())
    picture.save(path)
    return path


def geojson(
    path: Path, cells: list[tuple[int, int, str]], shift: tuple[int, int] = (0, 0), extra: list[dict] | None = None
) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": shapely.geometry.mapping(shapely.transform(p, lambda xy: xy - shift)),
            "properties": {"objectType": "detection", **({"classification": {"name": kind}} if kind else {})},
        }
        for p, (_, _, kind) in zip(polygons(cells), cells, strict=True)
    ]
    path.parent.mkdir(exist_ok=True, parents=True)
    text = json.dumps({"type": "FeatureCollection", "features": features + (extra or [])}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def parquet(
    path: Path, cells: list[tuple[int, int, str]], bounds: tuple[int, int, int, int] | None = None, mpp: float = 0.5
) -> Path:
    path.parent.mkdir(exist_ok=True, parents=True)
    n = len(cells)
    names = ("unassigned", *sorted({kind for *_, kind in cells} - {""}))
    codes = np.array([names.index(kind or "unassigned") for *_, kind in cells], np.int32)
    typing = Typing(
        names=names,
        colors=((0, 0, 0),) * len(names),
        codes=codes,
        scores=np.ones(n, np.float32),
        margins=np.ones(n, np.float32),
        prototypes=codes - 1,
    )
    table = Cells(
        polygons=polygons(cells),
        points_xy=np.zeros((n, 2)),
        scores=np.ones(n, np.float32),
        descriptors=np.empty((n, 0), np.float16),
    )
    info = SlideInfo(
        path="slide.svs",
        reader="openslide",
        format="aperio",
        level_sizes=((500, 500),),
        downsamples=(1.0,),
        mpp=mpp,
        mpp_source="--mpp",
        bounds=bounds,
    )
    write_geoparquet(
        path, table, typing, info, Provenance(tool="wsiseg", version="0", slide="slide.svs", config_hash="x")
    )
    return path


def points(path: Path, cells: list[tuple[int, int, str]], *, typed: bool = True) -> Path:
    rows = ["x,y,type", *(f"{x + 5},{y + 5},{kind}" for x, y, kind in cells)]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("\n".join(row if typed else row.rsplit(",", 1)[0] for row in rows) + "\n")
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.output


def fails(*arguments: object) -> str:
    result = CliRunner().invoke(main, ["evaluate", *map(str, arguments)])
    assert result.exit_code == 1, result.output
    assert result.stderr.startswith("Error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def scores(tmp_path: Path, *arguments: object) -> dict:
    call(*arguments, "--json", tmp_path / "scores.json", "--overwrite")
    return json.loads((tmp_path / "scores.json").read_text())


WRITERS = {
    "png": lambda folder, cells: png(folder / "image.png", label(cells)),
    "tif": lambda folder, cells: (
        tifffile.imwrite(folder / "image.tif", label(cells).astype(np.uint32)) or folder / "image.tif"
    ),
    "npy": lambda folder, cells: np.save(folder / "image.npy", label(cells)) or folder / "image.npy",
    "palette": lambda folder, cells: palette_png(folder / "image.png", label(cells)),
    "geojson": lambda folder, cells: geojson(folder / "image.geojson", cells),
    "gz": lambda folder, cells: geojson(folder / "image.geojson.gz", cells),
    "parquet": lambda folder, cells: parquet(folder / "image.parquet", cells),
    "run": lambda folder, cells: parquet(folder / "slide/cells.parquet", cells).parent,
    "foreign": lambda folder, cells: (
        geopandas.GeoDataFrame({"outline": polygons(cells)}, geometry="outline").to_parquet(folder / "image.parquet")
        or folder / "image.parquet"
    ),
}


@pytest.mark.parametrize("truth", WRITERS)
@pytest.mark.parametrize("predicted", ["png", "geojson", "run"])
def test_every_kind_gives_the_same_scores(predicted: str, truth: str, tmp_path: Path) -> None:
    folders = [tmp_path / "p", tmp_path / "t"]
    for folder in folders:
        folder.mkdir()
    files = WRITERS[predicted](folders[0], PREDICTED), WRITERS[truth](folders[1], TRUTH)
    found = scores(tmp_path, *files, "--mpp", 0.5, "--thresholds", "0.5,0.7")
    assert found["pooled"]["pq"] == found["mean"]["pq"]["mean"] == pytest.approx(PQ)
    assert found["pooled"]["aji"] == found["pooled"]["aji_plus"] == pytest.approx(AJI)
    assert found["pooled"]["dice"] == pytest.approx(2 * 180 / 600)
    assert (found["pooled"]["f1@0.5"], found["pooled"]["f1@0.7"]) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert found["pooled"]["detection_f1"] == pytest.approx(2 / 3)
    assert ("mpq_plus" in found["pooled"]) == ({predicted, truth} <= {"geojson", "gz", "parquet", "run"})


def check_typed(found: dict) -> None:
    """a: 2 in the truth, 1 predicted, 1 right, IoU 2/3. b: 1 in the truth, 2 predicted, none right."""
    assert found["classes"]["a"] == pytest.approx(
        {"truth": 2, "prediction": 1, "f1": 2 / 3, "pq": 4 / 9, "pq_plus": 4 / 9}
    )
    assert found["classes"]["b"] == pytest.approx({"truth": 1, "prediction": 2, "f1": 0, "pq": 0, "pq_plus": 0})
    assert found["mean"]["mpq"]["mean"] == found["pooled"]["mpq_plus"] == pytest.approx(2 / 9)
    assert found["pooled"]["macro_f1"] == pytest.approx(1 / 3)
    assert (found["pooled"]["type_accuracy"], found["pooled"]["unassigned"]) == (0.5, 0)
    assert found["confusion"] == [
        {"truth": "a", "prediction": "a", "pairs": 1},
        {"truth": "a", "prediction": "b", "pairs": 1},
    ]


def test_types_of_outlines_and_of_label_images(tmp_path: Path) -> None:
    p, g = parquet(tmp_path / "p.parquet", PREDICTED), geojson(tmp_path / "t.geojson", TRUTH)
    check_typed(scores(tmp_path, p, g))
    images = [png(tmp_path / name, image) for name, image in {"p.png": label(PREDICTED), "t.png": label(TRUTH)}.items()]
    types = [
        png(tmp_path / "types" / name, image)
        for name, image in {"p.png": kinds(PREDICTED), "t.png": kinds(TRUTH)}.items()
    ]
    (tmp_path / "classes.json").write_text(json.dumps({"1": "a", "2": "b"}))
    typed = ("--pred-types", types[0], "--truth-types", types[1], "--classes", tmp_path / "classes.json", "--mpp", 0.5)
    check_typed(scores(tmp_path, *images, *typed))
    check_typed(scores(tmp_path, p, images[1], *typed[2:]))
    assert "types and points are matched within 3 um, and no file says microns per px" in fails(*images, *typed[:4])
    arrays = evaluate(
        label(PREDICTED), label(TRUTH), prediction_types=kinds(PREDICTED), truth_types=kinds(TRUTH), mpp=0.5
    )
    assert arrays.means["mpq"].mean == pytest.approx(2 / 9)


def test_points(tmp_path: Path) -> None:
    """Outlines against dots, dots against outlines and label images, dots against dots."""
    outlines, dots = geojson(tmp_path / "t.geojson", TRUTH), points(tmp_path / "p.csv", PREDICTED)
    found = scores(tmp_path, outlines, points(tmp_path / "t.csv", TRUTH), "--mpp", 0.5)
    assert set(found["pooled"]) == {
        "detection_f1",
        "detection_precision",
        "detection_recall",
        "macro_f1",
        "type_accuracy",
        "unassigned",
    }
    assert set(found["pooled"].values()) == {0.0, 1.0}
    found = scores(tmp_path, dots, outlines, "--mpp", 0.5)
    assert found["pooled"]["point_precision"] == pytest.approx(2 / 3)
    assert found["pooled"]["typed_point_precision"] == pytest.approx(1 / 3)
    found = scores(tmp_path, dots, png(tmp_path / "t.png", label(TRUTH)), "--mpp", 0.5)
    assert found["pooled"]["point_precision"] == pytest.approx(2 / 3)
    assert "typed_point_precision" not in found["pooled"]
    assert "point precision" in call(dots, outlines, "--mpp", 0.5)
    untyped = points(tmp_path / "u.csv", TRUTH, typed=False)
    assert scores(tmp_path, dots, untyped, "--mpp", 0.5)["pooled"]["detection_f1"] == pytest.approx(2 / 3)
    # a radius of 0.9 um, 1.8 px, does not reach over 2 px
    assert scores(tmp_path, dots, untyped, "--mpp", 0.5, "--radius", 0.9)["pooled"]["detection_f1"] == pytest.approx(
        1 / 3
    )
    assert "and no file says microns per px; pass --mpp" in fails(dots, untyped)


def test_folders(tmp_path: Path) -> None:
    """Paired by name whatever the kind; mean and interval; retention against another run."""
    p, g = tmp_path / "p", tmp_path / "t"
    geojson(p / "one.geojson.gz", PREDICTED)
    parquet(p / "two/cells.parquet", TRUTH)
    png(p / "three.png", label(TRUTH))
    for name in ("one", "two"):
        png(g / f"{name}.png", label(TRUTH))
    (g / "classes.json").write_text("{}")
    (g / "README.txt").write_text("ours")
    result = CliRunner().invoke(
        main, ["evaluate", str(p), str(g), "--json", str(tmp_path / "s.json"), "--baseline", str(g)]
    )
    assert result.exit_code == 0, result.output
    assert f"Warning: {p}: three not in {g}, left out" in result.stderr
    assert result.stdout.startswith("2 images, 6 cells in the truth, 6 in the prediction\n\nmetric ")
    assert "\none  " in result.stdout
    found = json.loads((tmp_path / "s.json").read_text())
    assert [image["name"] for image in found["images"]] == ["one", "two"]
    assert (
        found["mean"]["pq"]["mean"]
        == found["mean"]["bpq"]["mean"]
        == found["retention"]["pq"]
        == pytest.approx((PQ + 1) / 2)
    )
    assert found["mean"]["pq"]["low"] == pytest.approx(PQ)
    assert found["options"]["versions"]["wsiseg"]
    assert "\none  " not in call(p, g, "--summary")
    png(g / "four.png", label(TRUTH))
    assert "nothing for four of" in fails(p, g)
    assert "one is a folder, the other a file" in fails(p, g / "one.png")
    png(g / "one.tif", label(TRUTH))
    assert "one.png and one.tif are both named 'one'" in fails(p, g)


def test_qupath_frame_is_moved_to_that_of_the_slide(tmp_path: Path) -> None:
    """The GeoJSON of a slide with bounds is relative to them; of one without, the frames are the same."""
    p = parquet(tmp_path / "p.parquet", PREDICTED, (7, 5, 400, 400))
    g = geojson(tmp_path / "t.geojson", TRUTH, (7, 5))
    check_typed(scores(tmp_path, p, g))
    assert "was moved by (7, 5) px" in CliRunner().invoke(main, ["evaluate", str(p), str(g)]).stderr


def test_what_qupath_files_hold_besides(tmp_path: Path) -> None:
    """Regions around detections are passed over, crossing outlines are repaired, nuclei are taken of cells, empty files are fine."""
    region = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.box(0, 0, 90, 90)),
        "properties": {"objectType": "annotation"},
    }
    bow_tie = {"type": "Polygon", "coordinates": [[[50, 50], [60, 60], [60, 50], [50, 60], [50, 50]]]}
    cell = {
        "type": "Feature",
        "geometry": shapely.geometry.mapping(shapely.box(60, 0, 90, 30)),
        "properties": {"objectType": "cell"},
        "nucleusGeometry": shapely.geometry.mapping(shapely.box(70, 10, 80, 20)),
    }
    p = geojson(
        tmp_path / "p.geojson", TRUTH, extra=[region, {"type": "Feature", "geometry": bow_tie, "properties": {}}, cell]
    )
    result = CliRunner().invoke(
        main,
        [
            "evaluate",
            str(p),
            str(png(tmp_path / "t.png", label([*TRUTH, (70, 10, "a")]))),
            "--json",
            str(tmp_path / "s"),
        ],
    )
    assert "1 annotations beside detections were taken for regions and left out" in result.stderr
    assert "1 of 5 outlines touch, cross or overlap themselves and were repaired" in result.stderr
    assert json.loads((tmp_path / "s").read_text())["pooled"]["pq"] == pytest.approx(4 / (4 + 1 / 2))
    nothing = geojson(tmp_path / "none.geojson", [])
    assert scores(tmp_path, nothing, p)["pooled"]["pq"] == 0
    assert scores(tmp_path, nothing, nothing)["pooled"]["pq"] == 1


def test_doubts_are_said(tmp_path: Path) -> None:
    def said(p: Path, g: Path, *options: str) -> str:
        result = CliRunner().invoke(main, ["evaluate", str(p), str(g), *options])
        assert result.exit_code == 0, result.output
        return result.stderr

    truth = geojson(tmp_path / "t.geojson", TRUTH)
    far = geojson(tmp_path / "far.geojson", [(x + 1000, y, "") for x, y, _ in TRUTH])
    assert "the prediction does not overlap the truth anywhere" in said(far, truth)
    image = png(tmp_path / "t.png", label(TRUTH))
    assert "1 of 4 outlines lie outside the label image of 90 x 100 px" in said(
        geojson(tmp_path / "4.geojson", [*TRUTH, (500, 0, "")]), image
    )
    mask = png(tmp_path / "mask.png", (label(TRUTH) > 0).astype(np.uint8) * 255)
    assert "one id for 3 separate pieces in the prediction; is it a mask of the foreground?" in said(mask, image)
    twice = geojson(tmp_path / "twice.geojson", [*TRUTH, TRUTH[0]])
    assert "1 of 4 outlines of the prediction partly overlap others" in said(twice, truth, "--mpp", "1")
    others = geojson(tmp_path / "o.geojson", [(x, y, "c") for x, y, _ in TRUTH])
    assert "no type in common: c predicted, a, b in the truth" in said(others, truth, "--mpp", "1")


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    image = png(tmp_path / "t.png", label(TRUTH))
    outlines = geojson(tmp_path / "t.geojson", TRUTH)
    assert "90 x 50 and 90 x 100 px; two label images must have the same size" in fails(
        png(tmp_path / "half.png", label(TRUTH)[:50]), image
    )
    assert "a colour image or a stack" in fails(png(tmp_path / "rgb.png", np.zeros((9, 9, 3), np.uint8)), image)
    np.save(tmp_path / "float.npy", np.zeros((4, 4)))
    assert "float64 of shape (4, 4); integers" in fails(tmp_path / "float.npy", image)
    np.save(tmp_path / "negative.npy", np.full((4, 4), -3))
    assert "the id -3; ids are 0" in fails(tmp_path / "negative.npy", image)
    for arguments in (
        (tmp_path / "nowhere", image),
        (tmp_path / "nowhere", tmp_path),
        (image, image, "--pred-types", tmp_path / "nowhere"),
    ):
        assert "nowhere: no such file or folder" in fails(*arguments)
    (tmp_path / "slide.svs").write_bytes(b"II")
    assert ".svs is not a kind of file that is read here; allowed are .png" in fails(tmp_path / "slide.svs", image)
    for name in ("cut.png", "cut.tif", "cut.npy", "cut.parquet"):
        (tmp_path / name).write_bytes(image.read_bytes()[:40])
        assert "not a readable" in fails(tmp_path / name, image)
    (tmp_path / "cut.geojson").write_text('{"type": "FeatureCollection", "features": [')
    assert "not JSON at line 1" in fails(tmp_path / "cut.geojson", image)
    dot = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}}
    assert "1 object, no polygon" in fails(geojson(tmp_path / "dots.geojson", [], extra=[dot]), image)
    for bad in (
        [[[0, 0], [None, 1], [1, 1], [0, 0]]],
        [[[0, 0], [float("nan"), 1], [1, 1], [0, 0]]],
        [[[0, 0], ["x", 1], [1, 1]]],
        [[1]],
        3,
    ):
        wrong = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": bad}, "properties": {}}
        assert "features[0].geometry" in fails(geojson(tmp_path / "bad.geojson", [], extra=[wrong]), image)
    geopandas.GeoDataFrame({"geometry": [shapely.box(0, 0, float("inf"), 1)]}).to_parquet(tmp_path / "inf.parquet")
    assert "non-finite number among its coordinates" in fails(tmp_path / "inf.parquet", image)
    geopandas.GeoDataFrame({"geometry": [shapely.Point(0, 0)]}).to_parquet(tmp_path / "point.parquet")
    assert "1 geometries, no polygon" in fails(tmp_path / "point.parquet", image)
    geopandas.pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "plain.parquet")
    assert "no column 'geometry'" in fails(tmp_path / "plain.parquet", image)
    (tmp_path / "bad.csv").write_text("x,y\n1,2\n3,nan\n")
    assert 'line 3: x and y are "3" and "nan"' in fails(tmp_path / "bad.csv", image, "--mpp", 1)
    (tmp_path / "col.csv").write_text("row,col\n1,2\n")
    assert "the columns are row, col; x and y are needed" in fails(tmp_path / "col.csv", image, "--mpp", 1)
    (tmp_path / "empty").mkdir()
    assert "nothing to compare in the folder" in fails(tmp_path / "empty", tmp_path / "empty")
    png(tmp_path / "one/a.png", label(TRUTH))
    png(tmp_path / "two/b.png", label(TRUTH))
    assert "no name in common (a; b)" in fails(tmp_path / "one", tmp_path / "two")
    assert "all 3 outlines lie outside the label image" in fails(
        geojson(tmp_path / "f.geojson", [(x + 900, y, "") for x, y, _ in TRUTH]), image
    )
    assert "0.25 and 0.5 microns per px" in fails(
        parquet(tmp_path / "a.parquet", TRUTH, mpp=0.25), parquet(tmp_path / "b.parquet", TRUTH)
    )
    assert "only label images need one" in fails(outlines, image, "--pred-types", image)
    assert "the image of types has the shape (50, 90)" in fails(image, image, "--pred-types", tmp_path / "half.png")
    assert "nothing for a; a folder with an image of each name" in fails(
        tmp_path / "one", tmp_path / "one", "--pred-types", tmp_path / "two"
    )
    assert "--radius: 0 is not allowed" in fails(image, image, "--radius", 0)
    assert "1.5 is not an IoU" in fails(image, image, "--thresholds", "0.5,1.5")
    assert "is not a list of numbers" in fails(image, image, "--thresholds", "half")
    assert "this is a picture (PNG), not text" in fails(image, image, "--classes", image)
    (tmp_path / "there.json").write_text("mine")
    assert "already exists; give another --json file, or pass --overwrite" in fails(
        image, image, "--json", tmp_path / "there.json"
    )
    assert (tmp_path / "there.json").read_text() == "mine"
    assert "cannot be written" in fails(image, image, "--json", tmp_path / "there.json" / "x.json")


def test_real_typed_images(shared_data: Path, tmp_path: Path) -> None:
    """A set against itself: every score 1, and every nucleus has its type."""
    folder = shared_data / "instances/nucls_mini/dev"
    typed = (
        "--pred-types",
        folder / "type",
        "--truth-types",
        folder / "type",
        "--classes",
        folder.parent / "classes.json",
        "--mpp",
        0.25,
    )
    found = scores(tmp_path, folder / "label", folder / "label", *typed)
    assert len(found["images"]) == 5
    assert set(found["classes"]) <= {"tumor", "nonTIL_stromal", "sTIL", "other_nucleus"}
    assert {
        round(found["pooled"][m], 9)
        for m in ("aji", "aji_plus", "pq", "msa", "dice", "mpq_plus", "macro_f1", "type_accuracy")
    } == {1.0}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("zip.npy", b"PK\x03\x04" + bytes(50)),  # numpy would open it as an archive
        ("header.npy", b"\x93NUMPY\x01\x00\x10\x00{'shape': (60,\n " + bytes(9)),  # and parses the header as Python
        (
            "huge.npy",
            b"\x93NUMPY\x01\x00\x46\x00"
            + b"{'descr': '<u2', 'fortran_order': False, 'shape': (60000000, 70000000), }"[:70].ljust(70),
        ),
        (
            "object.npy",
            b"\x93NUMPY\x01\x00\x40\x00" + b"{'descr': '|O', 'fortran_order': False, 'shape': (6, 7), }".ljust(64),
        ),
        ("text.png", b"x,y\n1,2\n"),
        ("text.tif", b"x,y\n1,2\n"),
        ("empty.png", b""),
    ],
)
def test_damaged_label_images_are_one_line(name: str, content: bytes, tmp_path: Path) -> None:
    """Found by changing bytes at random: other kinds of exceptions than the decoders document."""
    (tmp_path / name).write_bytes(content)
    assert "not a readable label image" in fails(tmp_path / name, png(tmp_path / "t.png", label(TRUTH)))


def test_what_a_decoder_doubts_is_a_warning(tmp_path: Path) -> None:
    """A TIFF with a damaged tag that is read all the same: said in a line of ours, not in the decoder's."""
    image = png(tmp_path / "t.png", label(TRUTH))
    tifffile.imwrite(tmp_path / "p.tif", label(TRUTH), tile=(16, 16), compression="zlib")
    content = (tmp_path / "p.tif").read_bytes()
    with tifffile.TiffFile(tmp_path / "p.tif") as file:
        tag = file.pages[0].tags["ResolutionUnit"]  # any tag that is not needed
        place = tag.offset
    (tmp_path / "p.tif").write_bytes(content[: place + 2] + b"\xff\xff" + content[place + 4 :])
    result = CliRunner().invoke(main, ["evaluate", str(tmp_path / "p.tif"), str(image)])
    assert result.exit_code == 0, result.output
    assert f"Warning: {tmp_path / 'p.tif'}: may be damaged, the decoder says: " in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_photograph_named_png_is_not_a_label_image(tmp_path: Path) -> None:
    """Its 26th byte may be that of a palette PNG."""
    image = Image.fromarray(np.zeros((32, 32, 3), np.uint8))
    image.save(tmp_path / "photo.jpg")
    content = bytearray((tmp_path / "photo.jpg").read_bytes())
    content[25] = 3
    (tmp_path / "photo.png").write_bytes(content)
    assert "not a readable label image" in fails(
        tmp_path / "photo.png", png(tmp_path / "truth.png", np.zeros((32, 32), np.uint8))
    )
