"""The Python face: public names, their examples, seeds of every kind, cells by place and type, short reprs, plain refusals."""

from __future__ import annotations

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from skimage import data

import wsiseg
from wsiseg.errors import ConfigError, FormatError, RunError, SeedsError, SlideError
from wsiseg.formats.bank import read_bank
from wsiseg.formats.geoparquet import read_geoparquet
from wsiseg.formats.seeds import write_seeds
from wsiseg.records import Bank, Cells

ROOT = Path(__file__).parent.parent
PUBLIC = [name for name in wsiseg.__all__ if name != "__version__"]
CLICKS = {"version": 1, "types": [{"name": "gland", "points": [[168, 112]]}, {"name": "rest", "points": [[93, 61]]}]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder that all examples share, so that the demo is run once."""
    return tmp_path_factory.mktemp("library")


@pytest.fixture(scope="module")
def run(place: Path) -> wsiseg.Run:
    """The demo, run with its seeds where the examples look for it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        from wsiseg.demo import write_demo

        slide, seeds = write_demo("demo")
        found = wsiseg.segment_slide(slide, seeds=seeds, out="demo/out")
    return wsiseg.read_run(place / found.path)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return data.immunohistochemistry()[:256, 256:]


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example_that_runs(name: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    tests = [t for t in doctest.DocTestFinder(recurse=False).find(getattr(wsiseg, name), name) if t.examples]
    assert tests, f"{name} has no example"
    report: list[str] = []
    for test in tests:
        doctest.DocTestRunner().run(test, out=report.append)
    assert not report, "".join(report)


@pytest.mark.usefixtures("run")
def test_the_snippets_of_the_page_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    page = (ROOT / "docs/library.md").read_text()
    names: dict[str, object] = {}
    snippets = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(snippets) > 3
    for snippet in snippets:
        exec(compile(snippet, "docs/library.md", "exec"), names)
    for name in PUBLIC:
        assert name in page, name


def test_dir_shows_the_public_names_and_loads_nothing_heavy() -> None:
    script = (
        "import sys, wsiseg\nassert dir(wsiseg) == sorted(wsiseg.__all__)\n"
        "print(sorted({'torch', 'numpy', 'pandas', 'dask'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"segment_slide", "segment_image", "read_cells", "read_seeds", "Seeds", "Run", "evaluate"} <= set(PUBLIC)


def test_a_dict_a_path_and_an_object_are_the_same_seeds(image: np.ndarray, tmp_path: Path) -> None:
    """Lists, tuples and NumPy's numbers alike; and for an image in memory they give the same types."""
    (tmp_path / "seeds.json").write_text(json.dumps(CLICKS))
    tuples = {"version": 1, "types": tuple({**kind, "points": np.array(kind["points"])} for kind in CLICKS["types"])}
    read = [
        wsiseg.read_seeds(source) for source in (CLICKS, tuples, tmp_path / "seeds.json", str(tmp_path / "seeds.json"))
    ]
    made = wsiseg.Seeds(tuple(wsiseg.SeedType(kind.name, kind.color, kind.points) for kind in read[0].types))
    read.append(wsiseg.read_seeds(made))
    assert len({seeds.types for seeds in read}) == 1
    typed = [wsiseg.segment_image(image, mpp=0.5, seeds=s) for s in (CLICKS, str(tmp_path / "seeds.json"), made)]
    assert typed[0].count()["gland"] > 5
    for other in typed[1:]:
        np.testing.assert_array_equal(other.types, typed[0].types)


def test_a_slide_takes_every_kind_of_seeds_and_gives_the_same_cells(
    run: wsiseg.Run, place: Path, tmp_path: Path
) -> None:
    slide, file = place / "demo/ihc.tiff", place / "demo/seeds.json"
    document = json.loads(file.read_text())
    again = wsiseg.segment_slide(slide, seeds=wsiseg.read_seeds(file), out=place / "demo/out")
    assert again.already  # what was read and not changed is the file
    assert again.path == run.path
    others = wsiseg.segment_slide(slide, seeds=document, out=tmp_path)
    assert others.manifest["seeds"] == "seeds"
    expected, found = (read_geoparquet(r.path / "cells.parquet") for r in (run, others))
    np.testing.assert_array_equal(found[1].codes, expected[1].codes)
    assert (found[0].polygons == expected[0].polygons).all()
    assert found[1].names == expected[1].names
    assert wsiseg.segment_slide(slide, seeds=document, out=tmp_path).already
    written = tmp_path / "written.json"
    write_seeds(written, wsiseg.read_seeds(document))
    assert wsiseg.segment_slide(slide, seeds=written, out=tmp_path).already  # a file of them is the same run
    document["types"][0]["points"] = [[424, 113]]
    with pytest.raises(RunError, match="holds a run with another configuration"):
        wsiseg.segment_slide(slide, seeds=document, out=tmp_path)


def test_a_finished_run_is_found_where_it_is_now(run: wsiseg.Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where its manifest says it was made, which may be relative to another folder."""
    monkeypatch.chdir(place / "demo")
    again = wsiseg.segment_slide("ihc.tiff", seeds="seeds.json", out="out")
    assert again.already
    assert len(again.cells()) == run.counts["cells"]


def test_cells_are_found_by_place_and_type(run: wsiseg.Run) -> None:
    """As geopandas finds them by their boxes, and in the order of the file."""
    everything, frame = run.cells(), geopandas.read_parquet(run.path / "cells.parquet")
    assert everything.ids.tolist() == frame["id"].tolist()
    assert everything.types.tolist() == frame["cell_type"].tolist()
    window = (100, 50, 300, 280)
    inside = geopandas.read_parquet(run.path / "cells.parquet", bbox=window)
    found = run.cells(bbox=window)
    assert found.ids.tolist() == inside["id"].tolist()
    assert 0 < len(found) < len(everything)
    typed = run.cells(bbox=window, types=["stroma", "immune"])
    assert typed.ids.tolist() == inside[inside["cell_type"].isin(["stroma", "immune"])]["id"].tolist()
    assert set(typed.types) == {"stroma", "immune"}
    assert len(run.cells(bbox=(-9, -9, -5, -5))) == 0
    assert len(run.cells(types=[])) == 0


def test_the_table_has_the_columns_of_the_file(run: wsiseg.Run) -> None:
    table, frame = run.cells().to_geodataframe(), geopandas.read_parquet(run.path / "cells.parquet")
    assert list(table.columns) == [name for name in frame.columns if name not in ("bbox", "geometry", "descriptor")] + [
        "geometry"
    ]
    for name in table.columns.drop("geometry"):
        assert table[name].tolist() == frame[name].tolist(), name
    assert table.geometry.geom_equals(frame.geometry).all()
    assert table["cell_type"].dtype == "category"
    assert table.crs is None
    assert not len(run.cells(types=[]).to_geodataframe())


def test_a_table_with_the_old_column_is_read(run: wsiseg.Run, tmp_path: Path) -> None:
    """Earlier versions called ``cell_type`` ``type``."""
    table = pq.read_table(run.path / "cells.parquet")
    names = ["type" if name == "cell_type" else name for name in table.column_names]
    fields = [field.with_name(name) for field, name in zip(table.schema, names, strict=True)]
    old = table.rename_columns(names).cast(pa.schema(fields, metadata=table.schema.metadata))
    pq.write_table(old, tmp_path / "cells.parquet")
    found = wsiseg.read_cells(tmp_path, types="stroma")
    assert found.ids.tolist() == run.cells(types="stroma").ids.tolist()
    assert set(found.types) == {"stroma"}


def test_reprs_take_one_short_line(run: wsiseg.Run, image: np.ndarray) -> None:
    cells = run.cells()
    bank = read_bank(run.path / "bank.safetensors")[0]
    assert isinstance(bank, Bank)
    truth = np.zeros((32, 32), int)
    truth[4:16, 4:16] = 1
    shown = [cells, cells.cells, cells.typing, run, bank, wsiseg.read_seeds(CLICKS), wsiseg.RunConfig(mpp=0.25)]
    for value in (*shown, wsiseg.evaluate(truth, truth), Cells.empty(4)):
        text = repr(value)
        assert text.startswith(type(value).__name__ + "(")
        assert len(text) < 400
        assert "\n" not in text
    assert repr(wsiseg.RunConfig(mpp=0.25)) == "RunConfig(mpp=0.25)"
    assert f"{len(cells)} cells of ihc.tiff" in repr(cells)


REFUSED = [
    (lambda: wsiseg.segment_image("slide.svs"), SlideError, "is a path; use wsiseg.segment_slide"),
    (lambda: wsiseg.segment_image(Path("slide.svs"), mpp=0.25), SlideError, "is a path; use wsiseg.segment_slide"),
    (lambda: wsiseg.segment_image([[1, 2]], mpp=0.25), SlideError, "a uint8 RGB array of shape"),
    (lambda: wsiseg.segment_image(np.zeros((9, 9, 3), np.uint8)), ConfigError, "pass mpp, for example mpp=0.25"),
    (lambda: wsiseg.segment_image(np.zeros((9, 9, 3), np.uint8), mpp=20), ConfigError, "looks like a magnification"),
    (
        lambda: wsiseg.segment_image(np.zeros((9, 9, 3), np.uint8), mpp=0.5, seeds=3),
        SeedsError,
        "a dict as in seeds.json",
    ),
    (lambda: wsiseg.segment_slide(np.zeros((9, 9, 3))), SlideError, "use wsiseg.segment_image for an array"),
    (lambda: wsiseg.segment_slide("a.svs", config={"mpp": 1}), ConfigError, "or the settings as keywords"),
    (
        lambda: wsiseg.segment_slide("a.svs", config=wsiseg.RunConfig(method="foo")),
        ConfigError,
        "choose from auto, apg, cop, amg",
    ),
    (lambda: wsiseg.segment_slide("a.svs", method="foo"), ConfigError, "choose from auto, apg, cop, amg"),
    (lambda: wsiseg.segment_slide("a.svs", methods="apg"), ConfigError, "did you mean 'method'"),
    (lambda: wsiseg.read_seeds({"types": []}), SeedsError, "no 'version'"),
    (
        lambda: wsiseg.read_seeds({"version": 1, "types": [{"name": "a", "points": [[1, object()]]}]}),
        SeedsError,
        "the dict holds what",
    ),
    (lambda: wsiseg.read_seeds(wsiseg.Seeds(())), SeedsError, "at least one type"),
    (lambda: wsiseg.read_seeds(wsiseg.Seeds((wsiseg.SeedType("a", "#fff", ((1, 2),)),))), SeedsError, "SeedType(name,"),
    (
        lambda: wsiseg.read_seeds(wsiseg.Seeds((wsiseg.SeedType("a", (1, 2, 300), ((1, 2),)),))),
        SeedsError,
        "colours from 0 to 255",
    ),
    (lambda: wsiseg.read_run("nowhere"), RunError, "no manifest.json of wsiseg"),
    (lambda: wsiseg.read_cells("nowhere.parquet"), FormatError, "not a readable cells.parquet"),
    (lambda: wsiseg.read_cells("."), FormatError, "no cells.parquet in this folder"),
    (lambda: wsiseg.read_cells(3), ConfigError, "pass the path of a cells.parquet"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[words for _, _, words in REFUSED])
def test_what_cannot_be_is_refused_in_one_line(call, error, words: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_box_or_a_type_that_is_none_is_refused(run: wsiseg.Run) -> None:
    for bbox in ((1, 2, 3), (5, 5, 1, 1), (0, 0, float("nan"), 1), "abcd"):
        with pytest.raises(ConfigError, match="bbox: "):
            run.cells(bbox=bbox)
    with pytest.raises(ConfigError, match="did you mean 'stroma'"):
        run.cells(types="stromal")
