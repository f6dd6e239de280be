"""Text and GeoJSON from the wild: read alike by every command, or refused by each in one line."""

from __future__ import annotations

import dataclasses
import json
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image

from wsiseg.config import CopConfig, RunConfig, TilingConfig, check, from_mapping, read_config
from wsiseg.errors import ConfigError, FormatError, SeedsError, WsisegError
from wsiseg.formats.outlines import Points, read_side
from wsiseg.formats.seeds import read_seeds
from wsiseg.runs.slide import segment_slide
from wsiseg.runs.slide_list import Entry, read_list

if TYPE_CHECKING:
    from collections.abc import Callable

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
LINE_ENDS = ["\n", "\r\n", "\r"]
PICTURES = {"PNG": "PNG", "JPEG": "JPEG", "TIFF": "TIFF", "GIF": "GIF", "BMP": "BMP", "WEBP": "WebP"}


def write(path: Path, text: str, encoding: str = "utf-8", line_end: str = "\n") -> Path:
    mark = "\ufeff" if encoding.endswith(("-le", "-be")) else ""
    path.write_bytes((mark + text.replace("\n", line_end)).encode(encoding))
    return path


def one_line(call: Callable[[], object], *words: str, error: type[WsisegError] = WsisegError) -> str:
    with pytest.raises(error) as caught:
        call()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for word in words:
        assert word in said
    return said


# The same leniency everywhere

TABLE_FORMS = [
    "{a},{b},{c}\n1.5,2.5,ä\n3,4.25,b\n",
    "{a}; {b} ;{c}\n1,5;2,5;ä\n3;4,25;b\n",
    "{A}\t{B}\t{C}\n1,5\t2,5\tä\n3\t4,25\tb\n",
    'sep=;\n"{A}";"{b}";"{C}"\n"1,5";"2,5";"ä"\n\n3;4,25;b;;\n',
    '\n{A}, {B}, {C},\n1.5, 2.5, "ä",\n3, 4.25, b,\n',
]


def filled(form: str, a: str, b: str, c: str) -> str:
    return form.format(a=a, b=b, c=c, A=a.title(), B=b.upper(), C=c.upper())


@pytest.mark.parametrize("line_end", LINE_ENDS, ids=repr)
@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("form", TABLE_FORMS)
def test_tables_of_every_program_mean_the_same(form: str, encoding: str, line_end: str, tmp_path: Path) -> None:
    points = read_side(write(tmp_path / "points.csv", filled(form, "x", "y", "type"), encoding, line_end), {})
    assert isinstance(points, Points)
    assert points.xy.tolist() == [[1.5, 2.5], [3, 4.25]]
    assert points.types is not None
    assert points.types.tolist() == ["ä", "b"]
    seeds = read_seeds(write(tmp_path / "seeds.tsv", filled(form, "x", "y", "class"), encoding, line_end))
    assert [(kind.name, kind.points) for kind in seeds.types] == [("ä", ((1.5, 2.5),)), ("b", ((3, 4.25),))]
    text = (
        filled(form, "mpp", "path", "name")
        .replace("2.5", "a.svs")
        .replace("2,5", "a.svs")
        .replace("4.25", "b.svs")
        .replace("4,25", "b.svs")
    )
    slides = read_list(write(tmp_path / "list.csv", text, encoding, line_end), force_mpp=True)
    assert slides == [Entry(str(tmp_path / "a.svs"), 1.5, None, "ä"), Entry(str(tmp_path / "b.svs"), 3, None, "b")]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("line_end", LINE_ENDS, ids=repr)
def test_documents_of_every_editor_mean_the_same(encoding: str, line_end: str, tmp_path: Path) -> None:
    seeds = '{"version": 1,\n "types": [{"name": "ä",\n "points": [[1, 2]]}]}\n'
    assert read_seeds(write(tmp_path / "seeds.json", seeds, encoding, line_end)).types[0].name == "ä"
    toml = 'mpp = 0.5 # µm\nseeds = "ä.json"\n[tiling]\ntile_um = 64\n'
    wanted = RunConfig(mpp=0.5, seeds="ä.json", tiling=TilingConfig(tile_um=64))
    assert read_config(write(tmp_path / "c.toml", toml, encoding, line_end)) == wanted
    text = json.dumps({"mpp": 0.5, "seeds": "ä.json", "tiling": {"tile_um": 64}}, indent=1, ensure_ascii=False)
    assert read_config(write(tmp_path / "c.json", text, encoding, line_end)) == wanted


def test_a_comma_is_not_guessed_to_be_decimal(tmp_path: Path) -> None:
    """1,234 beside 5.5 may be a thousand: refused. Commas between columns cannot be decimal ones, too."""
    one_line(
        lambda: read_side(write(tmp_path / "p.csv", "x\ty\n1,234\t5.5\n"), {}), 'line 2: x and y are "1,234" and "5.5"'
    )
    one_line(
        lambda: read_side(write(tmp_path / "p.csv", "x,y\n1,5,2,5\n"), {}),
        "line 2: 4 cells for 2 columns",
        "decimal comma needs ';'",
    )


def test_columns_beside_those_needed_do_not_matter(tmp_path: Path) -> None:
    """The index of pandas has no name; two columns of no interest may share one."""
    points = read_side(write(tmp_path / "p.csv", ",x,y,note,note\n0,1,2,a,b\n1,3,4,a,b\n"), {})
    assert isinstance(points, Points)
    assert points.xy.tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x,X,y\n1,2,3\n", ["the column 'x' appears 2 times"]),
        ("xx,y\n1,2\n", ["the columns are xx, y; x and y are needed"]),
        ("x,y\n1e400,2\n", ['line 2: x and y are "1e400"']),
        ("x,y\n1e300,2\n", ['line 2: x and y are "1e300"']),
        ("x,y\nNaN,2\n", ['line 2: x and y are "NaN"']),
        ("x,y\n1_0,2\n", ['line 2: x and y are "1_0"']),
        ("x,y\n1,2\n\n3\n", ['line 4: x and y are "3" and ""']),
        ("x,y\n1,2\0\n", ["NUL characters in it"]),
        (" \n\t\n", ["the file is empty"]),
        ('x,y\n1,"2\n3,4\n', ["line 3: x and y are"]),
    ],
)
def test_tables_that_are_refused(text: str, words: list[str], tmp_path: Path) -> None:
    one_line(lambda: read_side(write(tmp_path / "p.csv", text), {}), *words, error=FormatError)


def readers(path: Path) -> dict[str, Callable[[], object]]:
    return {
        "seeds": lambda: read_seeds(path),
        "list": lambda: read_list(path),
        "config": lambda: read_config(path),
        "points": lambda: read_side(path, {}),
    }


@pytest.mark.parametrize("kind", ["seeds", "list", "config", "points"])
def test_what_is_not_text_is_named_for_what_it_is(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.csv"
    read = readers(path)[kind]
    for saved, name in PICTURES.items():
        Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(path, saved)
        one_line(read, f"this is a picture ({name}), not text; check the path")
    for content, words in (
        (b"%PDF-1.7 ", "this is a PDF"),
        ("Größe".encode("cp1252"), "not UTF-8 text (byte 2); save it as UTF-8"),
        ("x,y".encode("utf-16-le"), "NUL characters in it"),
        (b"\xff\xfex", "not UTF-16 text"),
        (b"", "the file is empty"),
        (b"\xef\xbb\xbf \r\n", "the file is empty"),
    ):
        path.write_bytes(content)
        one_line(read, words)
    if kind != "points":  # their kind is told by the name before they are read
        path.unlink()
        one_line(read, "cannot be read (No such file or directory)")
        path.mkdir()
        one_line(read, "cannot be read (Is a directory)")


@pytest.mark.parametrize("kind", ["seeds", "list", "config"])
def test_a_name_with_a_nul_is_refused(kind: str) -> None:
    one_line(readers(Path("a\0b.csv"))[kind], "'a\\x00b.csv'", "a NUL character, which no name of a file has")


def test_json_that_is_refused(tmp_path: Path) -> None:
    for text, words in (
        ('{"version": 1, "types": [{"name": "\\ud800", "points": [[1, 2]]}]}', "half a character"),
        ("[" * 100_000 + "]" * 100_000, "nested too deep"),
        ('{"version": 1' + "0" * 5000 + "}", "a number too long"),
        ('{"version": 1, "types": [{"name": "a", "points": [[1e400, 2]]}]}', "types[0].points[0]: inf is not finite"),
        (
            '{"version": 1, "types": [{"name": "a", "points": [[1e300, 2]]}]}',
            "types[0].points[0]: 1e+300 is larger than any slide",
        ),
        ('{"version": 1, "types": [{"name": "a", "points": [[NaN, 2]]}]}', "types[0].points[0]: nan is not finite"),
        ('{"version": 1, "types": [{"name": "\\u0000", "points": [[1, 2]]}]}', "a control character"),
    ):
        one_line(lambda text=text: read_seeds(write(tmp_path / "s.json", text)), words, error=SeedsError)
    pair = '{"version": 1, "types": [{"name": "\\ud83d\\ude00", "points": [[1, 2]]}]}'
    assert read_seeds(write(tmp_path / "s.json", pair)).types[0].name == "\U0001f600"


def test_children_nested_deep_are_read(tmp_path: Path) -> None:
    """As deep as the JSON reader goes: no recursion of ours ends earlier."""
    depth = 300
    point = '{"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {"classification": {"name": "a"}'
    text = (point + ', "childObjects": [') * depth + point + "}}" + "]}}" * depth
    assert len(read_seeds(write(tmp_path / "s.geojson", text)).types[0].points) == depth + 1


# The wrong type anywhere in a GeoJSON file, in every command that reads one


def feature(geometry: object, properties: object = None) -> dict[str, Any]:
    named = {"objectType": "annotation", "classification": {"name": "a"}}
    return {"type": "Feature", "geometry": geometry, "properties": named if properties is None else properties}


def collection(*features: object) -> dict[str, Any]:
    return {"type": "FeatureCollection", "features": list(features)}


SQUARE = [[10, 10], [110, 10], [110, 110], [10, 110], [10, 10]]
POLYGON, POINT = {"type": "Polygon", "coordinates": [SQUARE]}, {"type": "Point", "coordinates": [20, 20]}
DEEP: Any = POLYGON
for _ in range(40):
    DEEP = {"type": "GeometryCollection", "geometries": [DEEP]}
MALFORMED: dict[str, object] = {
    "features is a number": {"type": "FeatureCollection", "features": 3},
    "features are absent": {"type": "FeatureCollection"},
    "a feature is a list": collection([feature(POLYGON)]),
    "a feature is a geometry": collection(POLYGON),
    "a feature is a collection": collection(collection(feature(POLYGON))),
    "properties are a list": collection(feature(POLYGON, [])),
    "properties are text": collection(feature(POINT, "x")),
    "geometry is a list": collection(feature([POLYGON])),
    "geometry is text": collection(feature("Polygon")),
    "geometries is a number": collection(feature({"type": "GeometryCollection", "geometries": 5})),
    "geometries hold a number": collection(feature({"type": "GeometryCollection", "geometries": [5]})),
    "geometries are nested": collection(feature(DEEP)),
    "the type is a list": collection(feature({"type": ["Polygon"], "coordinates": [SQUARE]})),
    "the type is misspelt": collection(feature({"type": "polygon", "coordinates": [SQUARE]})),
    "coordinates are text": collection(feature({"type": "Polygon", "coordinates": "x"})),
    "coordinates of a point are text": collection(feature({"type": "Point", "coordinates": "x"})),
    "coordinates are absent": collection(feature({"type": "Polygon"})),
    "a level is missing": collection(feature({"type": "Polygon", "coordinates": SQUARE})),
    "a level is too much": collection(feature({"type": "Polygon", "coordinates": [[SQUARE]]})),
    "a number is text": collection(feature({"type": "Polygon", "coordinates": [[["1", "2"], *SQUARE]]})),
    "a number is huge": collection(feature({"type": "Polygon", "coordinates": [[[1e300, 2], *SQUARE]]})),
    "a whole number is huge": collection(feature({"type": "Polygon", "coordinates": [[[10**400, 2], *SQUARE]]})),
    "children are a number": collection(
        feature(POINT, {"classification": {"name": "a"}, "childObjects": 5}), feature(POLYGON)
    ),
}


@pytest.fixture(scope="module")
def finished(
    demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory, wsiseg: Callable[..., tuple[int, str]]
) -> Path:
    """A run on the demo slide, inside a small region."""
    folder = tmp_path_factory.mktemp("finished")
    status, output = wsiseg(
        "run", demo[0], "--out", folder, "--roi", write(folder / "roi.geojson", json.dumps(POLYGON))
    )
    assert status == 0, output
    return folder / Path(demo[0]).stem


@pytest.mark.parametrize("what", MALFORMED)
def test_a_wrong_type_is_one_line_in_every_command(
    what: str, demo: tuple[Path, Path], finished: Path, tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    path = write(tmp_path / "wrong.geojson", json.dumps(MALFORMED[what]))
    truth = tmp_path / "truth.png"
    Image.fromarray(np.ones((99, 99), np.uint8)).save(truth)
    for command in (
        ["run", demo[0], "--out", tmp_path / "out", "--roi", path],
        ["run", demo[0], "--out", tmp_path / "out", "--seeds", path],
        ["seeds", "check", path],
        ["seeds", "convert", path, tmp_path / "new.json"],
        ["seeds", "preview", path, demo[0], "--out", tmp_path / "new.png"],
        ["type", finished, "--seeds", path],
        ["evaluate", path, truth],
        ["evaluate", truth, path],
    ):
        status, output = wsiseg(*command)
        assert status == 1, (command, output)
        assert output.count("\n") == 1, output
        assert str(path) in output, output
    assert not (tmp_path / "out").exists()


def test_files_of_another_kind_are_named(
    demo: tuple[Path, Path], finished: Path, tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    regions = write(tmp_path / "regions.geojson", json.dumps(collection(feature(POLYGON))))
    points = write(tmp_path / "points.geojson", json.dumps(collection(feature(POINT))))
    run = ["run", demo[0], "--out", tmp_path / "o", "--seeds", regions]
    for command in (["seeds", "check", regions], ["type", finished, "--seeds", regions], run):
        status, output = wsiseg(*command)
        assert status == 1
        assert "1 region, and no points; seeds are points with a class; did you mean --roi?" in output
    for wrong in (points, demo[1]):
        status, output = wsiseg("run", demo[0], "--out", tmp_path / "o", "--roi", wrong)
        assert status == 1
        assert "did you mean --seeds?" in output


def test_a_repaired_region_is_said_to_the_user(
    demo: tuple[Path, Path], tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    spike = [[10, 10], [110, 10], [110, 110], [150, 150], [110, 110], [10, 110], [10, 10]]
    path = write(tmp_path / "roi.geojson", json.dumps(collection(feature({"type": "Polygon", "coordinates": [spike]}))))
    status, output = wsiseg("run", demo[0], "--out", tmp_path / "out", "--roi", path)
    assert status == 0, output
    said = f"{path}: 1 of 1 objects touch, cross or overlap themselves and were repaired; the first is features[0] ("
    assert f"Warning: {said}" in output
    (manifest,) = (tmp_path / "out").glob("*/manifest.json")
    assert any(warning.startswith(said) for warning in json.loads(manifest.read_text())["warnings"])


# Settings in the library


def literals(section: object, prefix: str = "") -> list[tuple[str, Any]]:
    found = []
    for name, hint in typing.get_type_hints(type(section)).items():
        value = getattr(section, name)
        if dataclasses.is_dataclass(value):
            found += literals(value, f"{prefix}{name}.")
        elif typing.get_origin(hint) is typing.Literal:
            found.append((prefix + name, value))
    return found


def replaced(config: Any, name: str, value: object) -> Any:
    first, _, rest = name.partition(".")
    return dataclasses.replace(config, **{first: replaced(getattr(config, first), rest, value) if rest else value})


@pytest.mark.parametrize("name", [name for name, _ in literals(RunConfig())])
def test_every_choice_is_checked_in_the_library(name: str) -> None:
    for wrong in ("foo", 3, None, ["auto"]):
        one_line(
            lambda wrong=wrong: check(replaced(RunConfig(), name, wrong)),
            f"{name} is",
            "choose from",
            error=ConfigError,
        )


def test_a_wrong_setting_of_the_library_stops_the_run_at_its_start(demo: tuple[Path, Path], tmp_path: Path) -> None:
    for config, words in (
        (RunConfig(method="foo"), "method is 'foo'; choose from auto, apg, cop, amg"),  # type: ignore[arg-type]
        (RunConfig(method="APG"), "did you mean 'apg'?"),  # type: ignore[arg-type]
        (RunConfig(cop=CopConfig(gate="products")), "cop.gate is 'products'; did you mean 'product'?"),  # type: ignore[arg-type]
        (RunConfig(workers="3"), "workers is '3'; it must be of type int"),  # type: ignore[arg-type]
        (RunConfig(tiling={"tile_um": 64}), "tiling is"),  # type: ignore[arg-type]
        (RunConfig(formats="parquet"), "formats is 'parquet'; it must be of type"),  # type: ignore[arg-type]
        (RunConfig(formats=("parket",)), "unknown format 'parket'; did you mean 'parquet'?"),
        (RunConfig(roi="a\0b"), "a NUL character is not allowed"),
    ):
        one_line(lambda config=config: segment_slide(str(demo[0]), config, tmp_path / "out"), words, error=ConfigError)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"tileing": {}}, "did you mean 'tiling'?"),
        ({"Method": "apg"}, "did you mean 'method'?"),
        ({"workers": 10**400}, "workers is too large; it must lie between 1 and 1024"),
        ({"mpp": 10**400}, "mpp: inf is not allowed"),
        ({"mpp": float("-inf")}, "mpp: -inf is not allowed"),
        ({"x" * 5000: 1}, "unknown key 'xxx"),
        ({"a\nb": 1}, "unknown key 'a\\nb'"),
        ({"workers": [[[[[[[[1]]]]]]]]}, "workers is [[[[[[[...]]]]]]]; it must be of type int"),
    ],
)
def test_odd_settings_are_one_short_line(mapping: dict[str, object], words: str) -> None:
    assert len(one_line(lambda: from_mapping(mapping, "here"), words, error=ConfigError)) < 600
