"""Seeds of every kind are read; every mistake in them is one line that says where, what, and what to do."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import pytest

from wsiseg.errors import SeedsError
from wsiseg.formats.seed_rules import require_phrases, require_points
from wsiseg.formats.seeds import (
    PALETTE,
    QuPathSeeds,
    check_seeds,
    convert_seeds,
    default_colors,
    read_seeds,
    write_seeds,
)
from wsiseg.records import Seeds, SeedType, SlideInfo

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
GOOD: dict[str, Any] = {
    "version": 1,
    "slide": "slide.svs",
    "types": [
        {"name": "tumour", "color": "#c80000", "points": [[10234.5, 8801.0]], "negative": [[10020, 8700]]},
        {"name": "lymphocyte", "color": "#0050c8", "points": [[9120, 4410], [9177, 4502]]},
    ],
}


def changed(**members: object) -> dict[str, Any]:
    return {**GOOD, **members}


def one_type(**members: object) -> dict[str, Any]:
    kind = {"name": "tumour", "points": [[1, 2]], **members}
    return {"version": 1, "types": [{key: value for key, value in kind.items() if value is not ...}]}


def two_types(first: dict[str, object], second: dict[str, object]) -> dict[str, Any]:
    return {
        "version": 1,
        "types": [{"name": "a", "points": [[1, 2]], **first}, {"name": "b", "points": [[3, 4]], **second}],
    }


def described(**members: object) -> dict[str, object]:
    """Seeds of one type that has phrases and no clicks."""
    return {"version": 1, "types": [{"name": "a", **members}]}


def write(path: Path, document: object) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document), encoding="utf-8")
    return path


def schema_accepts(document: object) -> bool:
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads(files("wsiseg.formats").joinpath("seeds.schema.json").read_text("utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return bool(jsonschema.Draft202012Validator(schema).is_valid(document))


def test_own_file(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path / "seeds.json", GOOD))
    assert seeds == Seeds(
        (
            SeedType("tumour", (200, 0, 0), ((10234.5, 8801.0),), ((10020.0, 8700.0),)),
            SeedType("lymphocyte", (0, 80, 200), ((9120.0, 4410.0), (9177.0, 4502.0))),
        ),
        str(tmp_path / "seeds.json"),
        "slide.svs",
    )
    assert check_seeds(seeds, INFO) == (seeds, [])


def test_own_file_round_trip_in_the_same_bytes(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path / "seeds.json", GOOD))
    write_seeds(tmp_path / "seeds.json", seeds)
    text = (tmp_path / "seeds.json").read_bytes()
    assert read_seeds(tmp_path / "seeds.json") == seeds
    write_seeds(tmp_path / "seeds.json", seeds)
    assert (tmp_path / "seeds.json").read_bytes() == text
    assert schema_accepts(json.loads(text))


def test_phrases_stand_beside_points_or_in_place_of_them(tmp_path: Path) -> None:
    document = two_types({"text": ["lymphocyte", "small round dark nucleus"]}, {})
    document["types"].append({"name": "c", "text": ["gland"]})
    seeds = read_seeds(write(tmp_path / "seeds.json", document))
    assert [kind.text for kind in seeds.types] == [("lymphocyte", "small round dark nucleus"), (), ("gland",)]
    assert repr(seeds) == "Seeds(a: 1 click, 2 phrases, b: 1 click, c: 1 phrase)"
    write_seeds(tmp_path / "again.json", seeds)
    again = read_seeds(tmp_path / "again.json")
    assert again.types == seeds.types
    assert check_seeds(again, INFO)[0].types == seeds.types
    assert "points" not in json.loads((tmp_path / "again.json").read_text())["types"][2]
    with pytest.raises(SeedsError, match=r"types\[2\]: type 'c' has only phrases, and --method apg needs clicks"):
        require_points(seeds, "--method apg")
    with pytest.raises(SeedsError, match=r"types\[1\]: type 'b' has no phrase, which --method text needs"):
        require_phrases(seeds, "--method text")


def test_phrases_do_not_go_to_qupath_in_silence(tmp_path: Path) -> None:
    source = write(tmp_path / "seeds.json", two_types({"text": ["lymphocyte"]}, {}))
    _, warnings = convert_seeds(source, tmp_path / "points.geojson")
    assert any("the phrases of a are not in it" in warning for warning in warnings)
    with pytest.raises(SeedsError, match="type 'a' has only phrases"):
        convert_seeds(write(tmp_path / "text.json", described(text=["a"])), tmp_path / "none.geojson")
    assert not (tmp_path / "none.geojson").exists()


@pytest.mark.parametrize("name", ["s.json.gz", "s.zip", "named-wrongly.tsv", "bom.json"])
def test_own_file_is_recognised_by_content(tmp_path: Path, name: str) -> None:
    path, text = tmp_path / name, json.dumps(GOOD).encode()
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("__MACOSX/seeds.json", b"\x00")
            archive.writestr("seeds.json", text)
    else:
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else b"\xef\xbb\xbf" + text)
    assert read_seeds(path).types[1].name == "lymphocyte"


def test_default_colours_avoid_stated_ones() -> None:
    assert default_colors([None, PALETTE[0], None]) == [PALETTE[1], PALETTE[0], PALETTE[2]]
    assert len(set(default_colors([None] * 8))) == 8
    assert len(default_colors([None] * 20)) == 20


HUGE = "1" + "0" * 400
# document, message; the JSON Schema must refuse those of the first list, and cannot see those of the second
SCHEMA_ERRORS: list[tuple[object, str]] = [
    (changed(version=2), "version is 2; this wsiseg reads version 1"),
    (changed(version=True), "version is true"),
    (changed(version="1"), r'version is "1"'),
    ({"types": GOOD["types"]}, "no 'version'"),
    (changed(type=[]), r"unknown key 'type'; did you mean 'types'\? allowed are version, slide, frame, types"),
    (changed(author="me"), "unknown key 'author'; allowed are"),
    (one_type(colour="#000000"), r"types\[0\]: unknown key 'colour'; did you mean 'color'\?"),
    (one_type(Points=[[1, 2]]), r"types\[0\]: unknown key 'Points'; did you mean 'points'\?"),
    (changed(slide=7), "slide is 7; it must be the slide's file name"),
    (changed(slide=" "), "slide is"),
    (changed(frame="mm"), r'frame is "mm"; allowed are'),
    ({"version": 1}, "types is missing; at least one type"),
    (changed(types=[]), "types is empty; at least one type"),
    (changed(types={}), r"types is \{\}; at least one"),
    (changed(types=["tumour"]), r'types\[0\]: found "tumour"; a type is an object'),
    (one_type(name=...), r"types\[0\]: no 'name'"),
    (one_type(points=...), r"types\[0\]: no 'points'"),
    (one_type(points=[]), r"types\[0\]\.points: type 'tumour' has no points; click at least one cell"),
    (one_type(points=[], negative=[[1, 2]]), r"types\[0\]\.points: type 'tumour' has no points"),
    (one_type(points="1,2"), r'types\[0\]\.points: "1,2" is not a list of points'),
    (one_type(points=[1, 2]), r"types\[0\]\.points\[0\]: 1 is not a point; .*two brackets"),
    (one_type(points=[[1, 2, 3]]), r"types\[0\]\.points\[0\]: \[1, 2, 3\] is not a point"),
    (one_type(points=[[1, 2], [3]]), r"types\[0\]\.points\[1\]: \[3\] is not a point"),
    (one_type(points=[["1", 2]]), r'types\[0\]\.points\[0\]: "1" is not a number; .*without quotes'),
    (one_type(points=[[True, 2]]), r"types\[0\]\.points\[0\]: true is not a number"),
    (one_type(points=[[None, 2]]), r"types\[0\]\.points\[0\]: null is not a number"),
    (one_type(points=[[-1, 2]]), r"types\[0\]\.points\[0\]: \(-1, 2\) is negative"),
    (one_type(negative=[[5, -0.5]]), r"types\[0\]\.negative\[0\]: \(5, -0.5\) is negative"),
    (one_type(negative=None), r"types\[0\]\.negative: null is not a list"),
    (one_type(color="red"), r'types\[0\]\.color: "red" is not a colour; write "#rrggbb"'),
    (one_type(color=[1, 2, 3]), r"types\[0\]\.color: \[1, 2, 3\] is not a colour"),
    (one_type(color=None), r"types\[0\]\.color: null is not a colour"),
    (one_type(name=5), r"types\[0\]\.name: 5 is not text"),
    (one_type(name=""), r"types\[0\]\.name: the name is blank"),
    (one_type(name=" tumour"), r"types\[0\]\.name: .* leading or trailing blanks"),
    (one_type(name="Tumor: Positive"), r"types\[0\]\.name: .* has a ':', where QuPath splits"),
    (one_type(name="tu\nmour"), r"types\[0\]\.name: .* line break or a control character"),
    (one_type(name="x" * 101), r"types\[0\]\.name: the name has 101 characters; 100 are allowed"),
    (one_type(name="Unassigned"), r'types\[0\]\.name: "Unassigned" is reserved'),
    (one_type(name="Unclassified"), r'types\[0\]\.name: "Unclassified" is reserved'),
    (7, "found 7; a seeds file is an object"),
    (described(text=[]), r"types\[0\]\.text: is empty"),
    (described(text="lymphocyte"), r"types\[0\]\.text: .* is not a list of phrases"),
    (described(text=["a", 7]), r"types\[0\]\.text: .* is not a list of phrases"),
    (described(text=["  "]), r"types\[0\]\.text\[0\]: the phrase is blank"),
    (described(text=["a", ""]), r"types\[0\]\.text\[1\]: the phrase is blank"),
    (described(text=["a\nb"]), "has a line break or a control character"),
    (described(text=["a", "a"]), r"types\[0\]\.text\[1\]: \"a\" is also types\[0\]\.text\[0\]"),
    (described(text=[f"phrase {k}" for k in range(100)]), "100 phrases; 32 are allowed"),
    (described(text=["a"], negative=[[1, 2]]), r"types\[0\]\.negative: type 'a' has no points"),
    (changed(types=[{"name": "a"}]), r"types\[0\]: no 'points'; every type needs 'name' and 'points', or 'text'"),
    (described(text=["a"], name=None), r"types\[0\]\.name: null is not text"),
]
OTHER_ERRORS: list[tuple[object, str]] = [
    (described(text=["word " * 300]), r"types\[0\]\.text\[0\]: the phrase has 300 words; 30 are allowed"),
    (
        changed(types=[{"name": "a", "text": ["Dark  nucleus"]}, {"name": "b", "text": ["dark nucleus"]}]),
        r"types\[1\]\.text\[0\]: \"dark nucleus\" is also types\[0\]\.text\[0\]; a phrase describes one type",
    ),
    (two_types({}, {"name": "a"}), r'types\[1\]\.name: "a" appears twice'),
    (two_types({}, {"name": "A"}), r'types\[1\]\.name: "A" appears twice \(as "a", case does not count\)'),
    (
        two_types({}, {"points": [[3, 4], [1, 2]]}),
        r"types\[1\]\.points\[1\]: the click \(1, 2\) of 'b' is also a click of 'a' \(types\[0\]\.points\[0\]\)",
    ),
    (
        two_types({"negative": [[1, 2]]}, {}),
        r"types\[0\]\.negative\[0\]: the click \(1, 2\) is both for and against 'a'",
    ),
    ('{"version":1,"types":[{"name":"a","points":[[NaN,1]]}]}', r"types\[0\]\.points\[0\]: nan is not finite"),
    ('{"version":1,"types":[{"name":"a","points":[[1,-Infinity]]}]}', r"types\[0\]\.points\[0\]: -inf is not finite"),
    (
        f'{{"version":1,"types":[{{"name":"a","points":[[1,{HUGE}]]}}]}}',
        r"types\[0\]\.points\[0\]: 1000.* is larger than any slide",
    ),
    (
        '{"version":1,"types":[{"name":"a","points":[[1,2]],"points":[[3,4]]}]}',
        "the key 'points' appears twice in one object",
    ),
    ('{"version":1,\n"types":[}', "not JSON at line 2, column 10"),
    ("clicks", "not JSON at line 1, column 1"),
    ("[" * 100_000, "not JSON that can be read"),
    ("", "the file is empty"),
    (" \n", "the file is empty"),
]


@pytest.mark.parametrize(("document", "message"), SCHEMA_ERRORS + OTHER_ERRORS)
def test_every_mistake_is_one_line_with_its_place(tmp_path: Path, document: object, message: str) -> None:
    path = write(tmp_path / "seeds.json", document)
    with pytest.raises(SeedsError, match=message) as caught:
        read_seeds(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_the_schema_agrees_with_the_checks() -> None:
    assert [document for document, _ in SCHEMA_ERRORS if schema_accepts(document)] == []
    for document in (
        GOOD,
        one_type(),
        one_type(negative=[]),
        one_type(name="p-53 (+), µ"),
        two_types({}, {"negative": [[1, 2]]}),
        two_types({"text": ["small round dark nucleus"]}, {}),
        described(text=["lymphocyte", "small round dark nucleus"]),
        described(text=["lymphocyte"], points=[]),
    ):
        assert schema_accepts(document)
    assert schema_accepts({**one_type(points=[[-1, 2]]), "frame": "qupath"})


def test_files_that_cannot_be_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "seeds.json"
    with pytest.raises(SeedsError, match=r"cannot be read \(No such file"):
        read_seeds(path)
    with pytest.raises(SeedsError, match=r"cannot be read \(Is a directory"):
        read_seeds(tmp_path)
    path.write_bytes("ä".encode("cp1252"))
    with pytest.raises(SeedsError, match="not UTF-8 text"):
        read_seeds(path)
    path.write_bytes(gzip.compress(b"x" * 1000)[:-10])
    with pytest.raises(SeedsError, match="damaged compressed data"):
        read_seeds(path)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.md", "x" * 1000)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(SeedsError, match=r"the zip holds no \.geojson or \.json"):
        read_seeds(path)
    path.write_bytes(buffer.getvalue()[:-30])
    with pytest.raises(SeedsError, match="damaged or encrypted zip"):
        read_seeds(path)


def test_writing_what_could_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SeedsError, match="has a ':'"):
        write_seeds(tmp_path / "s.json", Seeds((SeedType("a:b", (1, 2, 3), ((1.0, 2.0),)),), "x"))
    assert list(tmp_path.iterdir()) == []


# --- against the slide ------------------------------------------------------------------------------------------------------------


def seeds_at(*points: tuple[float, float], slide: str | None = None, name: str = "tumour") -> Seeds:
    return Seeds((SeedType(name, (1, 2, 3), points),), "seeds.json", slide)


def test_repeated_clicks_count_once_with_a_warning() -> None:
    seeds, warnings = check_seeds(seeds_at((1, 2), (3, 4), (1, 2)), INFO)
    assert seeds.types[0].points == ((1, 2), (3, 4))
    assert warnings == ["seeds.json: types[0].points[2]: the same click as [0]; it counts once"]


@pytest.mark.parametrize("point", [(20000.0, 5.0), (5.0, 10000.0), (25000.0, 5.0)])
def test_a_click_outside_names_the_size_of_the_slide(point: tuple[float, float]) -> None:
    with pytest.raises(
        SeedsError, match=r"types\[0\]\.points\[1\]: the click .* is outside slide\.svs, which has 20000 x 10000 px"
    ):
        check_seeds(seeds_at((1, 2), point), INFO)


def test_another_slide_is_refused_by_file_name() -> None:
    with pytest.raises(SeedsError, match=r"these seeds are for 'other\.svs', but the slide is 'slide\.svs'"):
        check_seeds(seeds_at((1, 2), slide="/x/other.svs"), INFO)
    for same in ("slide.svs", "/elsewhere/slide.svs", "C:\\scans\\slide.svs"):
        assert check_seeds(seeds_at((1, 2), slide=same), INFO)[1] == []


def test_a_class_that_qupath_ignores_is_a_warning() -> None:
    assert "QuPath ignores classes that end in '*'" in check_seeds(seeds_at((1, 2), name="Ignore*"), INFO)[1][0]


def test_own_points_are_absolute_on_slides_with_bounds() -> None:
    assert check_seeds(seeds_at((1, 2)), MIRAX)[0].types[0].points == ((1, 2),)


# --- QuPath -----------------------------------------------------------------------------------------------------------------------


def point(x: float, y: float, classification: object = ..., **properties: object) -> dict[str, Any]:
    return multi([[x, y]], classification, kind="Point", **properties)


def multi(
    xy: list[list[float]], classification: object = ..., kind: str = "MultiPoint", **properties: object
) -> dict[str, Any]:
    members = {"objectType": "annotation", **properties} | (
        {} if classification is ... else {"classification": classification}
    )
    return {
        "type": "Feature",
        "geometry": {"type": kind, "coordinates": xy[0] if kind == "Point" else xy},
        "properties": members,
    }


TUMOR = {"name": "Tumor", "color": [200, 0, 0]}
IMMUNE = {"name": "Immune cells", "color": [160, 90, 160]}
FEATURES = [
    point(10.12, 20.5, TUMOR),
    multi([[1, 2], [7.25, 40], [30, 5]], IMMUNE, name="Points 5", isLocked=True),
    multi([], {"name": "Stroma", "color": [1, 2, 3]}),
]
EXPECTED = (
    SeedType("Tumor", (200, 0, 0), ((10.12, 20.5),)),
    SeedType("Immune cells", (160, 90, 160), ((1.0, 2.0), (7.25, 40.0), (30.0, 5.0))),
)


def collection(*features: object) -> dict[str, object]:
    return {"type": "FeatureCollection", "features": list(features)}


@pytest.mark.parametrize("packing", ["collection", "array", "gz", "zip", "bom", "pretty"])
def test_qupath_geojson_in_every_packing(tmp_path: Path, packing: str) -> None:
    path, text = (
        tmp_path / "seeds.anything",
        json.dumps(FEATURES if packing == "array" else collection(*FEATURES)).encode(),
    )
    if packing == "gz":
        text = gzip.compress(text[:50]) + gzip.compress(text[50:])
    if packing == "bom":
        text = b"\xef\xbb\xbf" + text
    if packing == "pretty":
        text = json.dumps(collection(*FEATURES), indent=2).encode()
    path.write_bytes(text)
    if packing == "zip":
        with zipfile.ZipFile(path, "w") as archive:  # QuPath reads the entries one after the other
            archive.writestr("a.geojson", json.dumps(collection(FEATURES[0])))
            archive.writestr("b.geojson", json.dumps(FEATURES[1:]))
    seeds = read_seeds(path)
    assert isinstance(seeds, QuPathSeeds)
    assert seeds.types == EXPECTED
    assert check_seeds(seeds, INFO)[1] == []


def test_a_single_feature_and_nested_children(tmp_path: Path) -> None:
    assert read_seeds(write(tmp_path / "s", FEATURES[1])).types == EXPECTED[1:]
    parent = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[0, 0], [9, 0], [9, 9], [0, 0]]]},
        "properties": {"objectType": "annotation", "childObjects": FEATURES},
    }
    seeds = read_seeds(write(tmp_path / "s", collection(parent)))
    assert seeds.types == EXPECTED
    assert "1 object other than points skipped, the first is features[0] (Polygon)" in check_seeds(seeds, INFO)[1][0]


@pytest.mark.parametrize(
    ("classification", "name", "color"),
    [
        ("Tumor", "Tumor", PALETTE[0]),
        ({"name": "Tumor", "colorRGB": -3670016}, "Tumor", (200, 0, 0)),
        ({"names": ["Tumor"], "color": [1, 2, 3, 255]}, "Tumor", (1, 2, 3)),
        ({"name": "Tumor", "color": None}, "Tumor", PALETTE[0]),
        ({"name": "Tumor", "color": [1.5, 2.0, 3.0]}, "Tumor", (1, 2, 3)),
    ],
)
def test_every_form_of_a_class(tmp_path: Path, classification: object, name: str, color: tuple[int, int, int]) -> None:
    kind = read_seeds(write(tmp_path / "s", collection(point(1, 2, classification)))).types[0]
    assert (kind.name, kind.color) == (name, color)


def outlined(x: float, y: float, classification: object, kind: str = "detection") -> dict[str, Any]:
    ring = [[x, y], [x + 8, y], [x + 8, y + 8], [x, y + 8], [x, y]]
    properties = {"objectType": kind, "classification": classification}
    return {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": properties}


def test_corrected_detections_are_clicks_inside_them(tmp_path: Path) -> None:
    """In a file without points; an annotation around them, and detections without a class, are not clicks."""
    features = [outlined(0, 0, TUMOR), outlined(20, 0, IMMUNE, "cell"), outlined(40, 0, TUMOR), outlined(60, 0, None)]
    path = write(tmp_path / "s.geojson", collection(*features, outlined(0, 0, TUMOR, "annotation")))
    seeds = read_seeds(path)
    assert [(kind.name, kind.color, kind.points) for kind in seeds.types] == [
        ("Tumor", (200, 0, 0), ((4.0, 4.0), (44.0, 4.0))),
        ("Immune cells", (160, 90, 160), ((24.0, 4.0),)),
    ]
    assert seeds.notes == (f"{path}: no points in it; 3 detections taken as clicks",)
    beside = read_seeds(write(tmp_path / "both.geojson", collection(point(1, 2, IMMUNE), *features)))
    assert [kind.name for kind in beside.types] == ["Immune cells"]
    many = write(tmp_path / "all.geojson", collection(*[outlined(10 * k, 0, TUMOR) for k in range(2001)]))
    with pytest.raises(SeedsError, match=r"2001 detections with a class; at most 2000 .* 'Selected objects'"):
        read_seeds(many)


@pytest.mark.parametrize(
    "classification",
    [
        {"names": ["Tumor", "Positive"], "color": [1, 2, 3]},
        "Tumor: Positive",
        {"parentClass": {"name": "Tumor"}, "name": "Positive", "colorRGB": 1},
    ],
)
def test_derived_classes_are_refused_by_name(tmp_path: Path, classification: object) -> None:
    with pytest.raises(SeedsError, match=r'"Tumor: Positive" has a \':\''):
        read_seeds(write(tmp_path / "s", collection(point(1, 2, classification))))


@pytest.mark.parametrize("digits", ["[٢٠٠, ٠, ١٢]", "[۲۰۰, ۰, ۱۲]", "[२००, ०, १२]", "[\u200f٢٠٠, ٠, ١٢]"])
def test_colours_in_the_digits_of_other_scripts(tmp_path: Path, digits: str) -> None:
    """QuPath writes colours in the digits of the system's language; digits inside of texts stay as they are."""
    text = json.dumps(collection(point(1, 2, {"name": 'نوع ٢ "٣"', "color": "COLOR"})), ensure_ascii=False)
    kind = read_seeds(write(tmp_path / "s", text.replace('"COLOR"', digits))).types[0]
    assert (kind.name, kind.color) == ('نوع ٢ "٣"', (200, 0, 12))


def test_nan_literals_and_duplicate_keys_are_tolerated(tmp_path: Path) -> None:
    text = (
        '{"type":"FeatureCollection","features":[{"type":"Feature","geometry":{"type":"Point","coordinates":[1,2],"plane":{"c":-1,"z":2,"t":1}},'
        '"properties":{"objectType":"annotation","metadata":{"a":"1"},"metadata":{"a":"1"},"classification":{"name":"Tumor","color":[200,0,0]},'
        '"measurements":{"x":NaN}}}]}'
    )
    assert read_seeds(write(tmp_path / "s", text)).types == (SeedType("Tumor", (200, 0, 0), ((1.0, 2.0),)),)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "no objects in it; seeds are points with a class"),
        ([multi([], TUMOR)], "1 object, but no points in it; .* Points tool"),
        ([point(1, 2), point(3, 4)], r"features\[0\]: the points have no class, .* 'Set selected', and export again"),
        ([point(1, 2, None)], r"features\[0\]: the points have no class"),
        (
            [point(1, 2, TUMOR), point(1, 2, IMMUNE)],
            r"class 'Immune cells'\.points\[0\]: the click \(1, 2\) of 'Immune cells' is also a click of 'Tumor'",
        ),
        ([point(1, 2, TUMOR), point(3, 4, "tumor")], r'class: "tumor" appears twice'),
        ([point(1, 2, "Unassigned")], '"Unassigned" is reserved'),
        ([point(1, 2, 7)], r"features\[0\]\.properties\.classification: 7 is not a class"),
        ([point("a", 2, TUMOR)], r'features\[0\]\.geometry\.coordinates: "a" is not a number'),  # type: ignore[arg-type]
        ([multi([[1]], TUMOR)], r"features\[0\]\.geometry\.coordinates: \[1\] is not a position"),
        ([point(float("nan"), 2, TUMOR)], r"features\[0\]\.geometry\.coordinates: nan is not finite"),
        (
            [{"type": "Feature", "geometry": {"type": "Point"}}],
            r"features\[0\]\.geometry\.coordinates: .*no list of coordinates",
        ),
        ([7], r"features\[0\]: 7 is not a GeoJSON Feature"),
    ],
)
def test_qupath_mistakes(tmp_path: Path, features: list[object], message: str) -> None:
    with pytest.raises(SeedsError, match=message) as caught:
        read_seeds(write(tmp_path / "s.geojson", collection(*features)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection"},
        {"features": []},
        {"type": "FeatureCollection", "features": {}},
        {"type": [], "features": 1},
    ],
)
def test_broken_collections(tmp_path: Path, document: object) -> None:
    with pytest.raises(SeedsError, match="not GeoJSON; a FeatureCollection with 'features'"):
        read_seeds(write(tmp_path / "s.geojson", document))


def test_some_points_without_class_are_a_warning(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path / "s.geojson", collection(point(1, 2, TUMOR), point(3, 4))))
    assert len(seeds.types) == 1
    assert "1 point annotations without a class were skipped" in check_seeds(seeds, INFO)[1][0]


@pytest.mark.parametrize(
    "text",
    [
        "x\ty\tclass\tname\tcolor\t\n10.123456\t20.5\tTumor\t\t-3670016\t\n1\t2\tTumor\tPoints 2\t-3670016\t\n\n",
        "x\ty\tc\tz\tt\tclass\tname\tcolor\t\r\n10.123456\t20.5\t-1\t3\t0\tTumor\t\t-3670016\t\r\n1\t2\t-1\t0\t0\tTumor\t\t-3670016\t\r\n",
    ],
)
def test_points_table(tmp_path: Path, text: str) -> None:
    seeds = read_seeds(write(tmp_path / "points.json", text))
    assert seeds.types == (SeedType("Tumor", (200, 0, 0), ((10.123456, 20.5), (1.0, 2.0))),)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1\t2\t\t\t\t", "line 2: the points have no class"),
        ("1,5\t2.5\tTumor\t\t\t", "line 2: x and y are .* two numbers are needed"),
        ("nan\t2\tTumor\t\t\t", "line 2: nan is not finite"),
        ("1\t2\tTumor: Positive\t\t\t", "has a ':'"),
        ("", "no objects"),
    ],
)
def test_points_table_mistakes(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(SeedsError, match=message):
        read_seeds(write(tmp_path / "points.tsv", f"x\ty\tclass\tname\tcolor\t\n{row}\n"))


def test_qupath_points_are_moved_by_the_bounds_once(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path / "s.geojson", collection(*FEATURES)))
    moved, warnings = check_seeds(seeds, MIRAX)
    assert moved.types[1].points == ((1001.0, 502.0), (1007.25, 540.0), (1030.0, 505.0))
    assert any("moved by the slide's bounds, (1000, 500) px" in warning for warning in warnings)
    assert type(moved) is Seeds
    assert check_seeds(moved, MIRAX) == (moved, [])
    assert check_seeds(seeds, INFO)[0].types == EXPECTED
    with pytest.raises(
        SeedsError,
        match=r"class 'Tumor'\.points\[0\]: the click \(20500, 501\), with the bounds \(1000, 500\) added, is outside s\.mrxs",
    ):
        check_seeds(read_seeds(write(tmp_path / "s.geojson", collection(point(19500, 1, TUMOR)))), MIRAX)


def test_converting_qupath_points_keeps_their_frame(tmp_path: Path) -> None:
    seeds = read_seeds(write(tmp_path / "s.geojson", collection(*FEATURES)))
    write_seeds(tmp_path / "seeds.json", seeds)
    again = read_seeds(tmp_path / "seeds.json")
    assert check_seeds(again, MIRAX)[0].types == check_seeds(seeds, MIRAX)[0].types
    assert schema_accepts(json.loads((tmp_path / "seeds.json").read_text()))
