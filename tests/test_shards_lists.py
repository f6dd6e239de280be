"""Shares of the work, lists of slides, and what a run leaves for its end."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
import shapely

from wsiseg.config import RunConfig
from wsiseg.errors import ConfigError, FormatError
from wsiseg.records import Bank, Cells, SlideInfo, TypePrototypes
from wsiseg.runs.plan_file import RunPlan, read_plan, write_plan
from wsiseg.runs.slide_list import Entry, read_list
from wsiseg.runtime.shards import Shard, read_shard

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("count", [1, 2, 7, 40])
def test_shards_share_out_everything_once(count: int) -> None:
    items = list(range(29))
    shares = [Shard(k, count).of(items) for k in range(1, count + 1)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    for k, share in enumerate(shares, 1):
        assert all(Shard(1, count).owner(place) == k for place in share)


@pytest.mark.parametrize("text", ["0/7", "8/7", "1/0", "-1/7", "1", "1/2/3", "a/b", "1.5/3", ""])
def test_what_is_no_shard(text: str) -> None:
    with pytest.raises(ConfigError, match="pass K/N with K from 1 to N"):
        read_shard(text, {})


def array(task: int, first: int, last: int, count: int | None = None) -> dict[str, str]:
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
    return {name: str(value) for name, value in zip(names, (task, first, last, count or last - first + 1), strict=True)}


def test_shards_of_a_slurm_array() -> None:
    assert read_shard("slurm", array(3, 1, 7)) == Shard(3, 7)
    assert read_shard("slurm", array(0, 0, 6)) == Shard(1, 7)
    assert read_shard("2/7", array(3, 1, 9)) == Shard(2, 7), "K/N is what it says, also inside an array"
    with pytest.raises(ConfigError, match="this is not a task of a SLURM job array"):
        read_shard("slurm", {})


@pytest.mark.parametrize("environment", [array(3, 3, 5), array(5, 1, 7, 3), array(2, 2, 2)])
def test_part_of_an_array_submitted_again_is_not_guessed(environment: dict[str, str]) -> None:
    """`--array=3-5` of what was 1-7 would cut the slide otherwise than the first submission did."""
    with pytest.raises(ConfigError, match="it does not say how many shards there are"):
        read_shard("slurm", environment)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_list_as_spreadsheets_write_it(tmp_path: Path, delimiter: str) -> None:
    rows = [
        ["Path", "MPP ", "seeds", "name"],
        ["a b.svs", "", "", ""],
        ["", "", "", ""],
        ["/x/c.tif", "0.25", "c.json", "patient-7"],
    ]
    path = write(tmp_path / "list.csv", "\ufeff" + "\r\n".join(delimiter.join(row) for row in rows) + "\r\n")
    assert read_list(path) == [
        Entry(str(tmp_path / "a b.svs")),
        Entry("/x/c.tif", 0.25, str(tmp_path / "c.json"), "patient-7"),
    ]


def test_addresses_stay_as_they_are(tmp_path: Path) -> None:
    assert read_list(write(tmp_path / "list.csv", "path\ns3://bucket/a.svs\n")) == [Entry("s3://bucket/a.svs")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("a.svs\nb.svs\n", "line 1: column 'a.svs'"),
        ("mpp,name\n0.5,x\n", "with path among them"),
        ("path,mpp,scanner\na.svs,,x\n", "line 1: column 'scanner'"),
        ("path,path\na,b\n", "name each column once"),
        ("path\n", "lists no slides"),
        ("path,mpp\n,0.5\n", "line 2: no path"),
        ("path,mpp\na.svs,half\n", "line 2: mpp 'half' is not a number"),
        ("path,name\na.svs,../up\n", "line 2: name '../up' cannot be a folder's name"),
        ("path,name\na.svs,summary.csv\n", "cannot be a folder's name"),
        ("path,mpp\na.svs,0\n", "line 2: mpp: 0 is not allowed"),
        ("path,mpp\na.svs,nan\n", "line 2: mpp: nan is not allowed"),
        ("path,mpp\na.svs,40\n", "line 2: mpp: 40 looks like a magnification; 40x is about 0.25 microns per pixel"),
        ("path;mpp\na.svs;" + "9" * 50 + ",25\n", "line 2: mpp: 1e+50 is not allowed"),
        ("pathh,mpp\na.svs,0.5\n", "line 1: column 'pathh'; did you mean 'path'? it must name columns"),
        ("path,\na.svs,x\n", "line 2: 'x' is in a column without a header"),
        ("path\na.svs,0.25\n", "line 2: 2 cells for 1 columns"),
        ("path\n" + "x" * 200_000 + "\n", "not a CSV file"),
        ("path,name\na.svs,x\nb.svs,x\n", "name x appears twice"),
        ("path\na.svs\na.svs\n", "a.svs appears twice"),
    ],
)
def test_wrong_lists(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=r"^--slides") as caught:
        read_list(write(tmp_path / "list.csv", text))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_list_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.csv").write_bytes(b"path\n\xff\xfe\x00")
    for path, said in (
        (tmp_path / "none.csv", "No such file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "binary.csv", "not UTF-8 text"),
    ):
        with pytest.raises(ConfigError, match=said):
            read_list(path)


def sheet(bank: Bank | None) -> RunPlan:
    info = SlideInfo(
        path="/x/s.svs",
        reader="openslide",
        format="aperio",
        level_sizes=((100, 90), (25, 22)),
        downsamples=(1.0, 4.0),
        mpp=0.25,
        mpp_source="--mpp",
        bounds=(1, 2, 30, 40),
        warnings=("doubtful",),
    )
    return RunPlan(
        info,
        RunConfig(method="apg", seeds="s.json"),
        bank,
        {"0001-0000": 16, "0000-0001": 3},
        "run",
        "parts",
        "weights",
        2,
        1.5,
        ("w",),
    )


def bank(from_other_slide: bool = False) -> Bank:
    polygons = np.array([shapely.box(0.1, 0, 3, 4)], object)
    cells = Cells(
        polygons=polygons,
        points_xy=np.array([[1.3, 2.7]]),
        scores=np.ones(1, np.float32),
        descriptors=np.array([[0.6, 0.8]], np.float16),
    )
    one = TypePrototypes(
        name="a",
        color=(1, 2, 3),
        clicks=np.array([[1.25, 2.0]]),
        clicked=np.array([[0.6, 0.8]], np.float32),
        negative=np.empty((0, 2), np.float32),
    )
    return Bank((one,), cells, from_other_slide=from_other_slide)


def test_a_sheet_comes_back_as_it_was(tmp_path: Path) -> None:
    """With the bank, its clicks and its cells, exactly; so a merge types as the shards would have."""
    assert read_plan(tmp_path) is None
    write_plan(tmp_path, sheet(bank()))
    back = read_plan(tmp_path, "run")
    assert read_plan(tmp_path, "another") is None
    assert dataclasses.replace(back, bank=None) == dataclasses.replace(sheet(None))
    assert list(back.tiles) == ["0001-0000", "0000-0001"]
    assert back.bank.names == ("a",)
    assert not back.bank.from_other_slide
    np.testing.assert_array_equal(back.bank.types[0].clicks, [[1.25, 2.0]])
    np.testing.assert_array_equal(back.bank.types[0].clicked, bank().types[0].clicked)
    assert back.bank.cells.polygons[0].wkb == bank().cells.polygons[0].wkb
    np.testing.assert_array_equal(back.bank.cells.points_xy, bank().cells.points_xy)


def test_a_sheet_with_another_slides_bank_and_one_without(tmp_path: Path) -> None:
    write_plan(tmp_path / "foreign", sheet(dataclasses.replace(bank(from_other_slide=True), cells=Cells.empty(2))))
    assert read_plan(tmp_path / "foreign").bank.from_other_slide
    write_plan(tmp_path / "none", sheet(None))
    assert read_plan(tmp_path / "none").bank is None


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.pop("tiles"),
        lambda n: n.update(tiles=[["a"]]),
        lambda n: n["info"].pop("mpp"),
        lambda n: n.update(config={"x": 1}),
    ],
)
def test_a_damaged_sheet_is_named(tmp_path: Path, change: Callable[[dict], object]) -> None:
    write_plan(tmp_path, sheet(None))
    note = json.loads((tmp_path / "plan.json").read_text())
    change(note)
    write(tmp_path / "plan.json", json.dumps(note))
    with pytest.raises(FormatError, match=r"plan\.json: damaged"):
        read_plan(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (("run",), 2, "Give either SLIDE... or --slides CSV"),
        (("run", "a.svs", "--slides", "list.csv"), 2, "Give either SLIDE... or --slides CSV"),
        (("run", "a.svs", "--shard", "3"), 1, "--shard 3: not a shard"),
        (("run", "a.svs", "--shard", ""), 2, "--shard: empty; a variable that is not set?"),
        (("run", "a.svs", "--max-ram", "0.01"), 1, "max_ram_gb is 0.01; it must lie between"),
        (("run", "a.svs", "--batch-size", "0"), 2, "--batch-size"),
        (("run", "--slides", "none.csv"), 1, "--slides none.csv: cannot be read"),
        (("run", "a.svs", "--log-json", "/proc/none/x.log"), 1, "--log-json /proc/none/x.log: cannot be written"),
        (("merge", "nowhere"), 1, "nowhere: no parts/plan.json of wsiseg in it"),
        (("merge",), 2, "RUN"),
    ],
)
def test_wrong_calls(
    wsiseg: Callable[..., tuple[int, str]], arguments: tuple[str, ...], status: int, said: str
) -> None:
    found, output = wsiseg(*arguments)
    assert found == status
    assert said in output


def test_the_log_has_a_line_per_event(
    wsiseg: Callable[..., tuple[int, str]], demo: tuple[Path, Path], tmp_path: Path
) -> None:
    status, output = wsiseg(
        "run", demo[0], "--tile-size", 128, "--out", tmp_path / "out", "--log-json", tmp_path / "log.jsonl"
    )
    assert status == 0, output
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["begin", "block", "slide"]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    assert lines[1]["block"] == "0000-0000"
    assert lines[1]["seconds"]["encode"] > 0
    assert lines[2]["cells"] > 0
    assert "INFO" not in output, "the log does not change what is printed"


def test_clicks_of_another_run_are_not_taken(tmp_path: Path) -> None:
    """A run with other clicks was begun over this one and stopped before its plan was written."""
    write_plan(tmp_path, sheet(bank()))
    (one,) = bank().types
    other = dataclasses.replace(bank(), types=(dataclasses.replace(one, clicked=np.array([[0.8, 0.6]], np.float32)),))
    write_plan(tmp_path / "other", sheet(other))
    (tmp_path / "clicks.safetensors").write_bytes((tmp_path / "other" / "clicks.safetensors").read_bytes())
    assert read_plan(tmp_path, "run") is None


def test_other_formats_make_a_complete_run_incomplete(
    wsiseg: Callable[..., tuple[int, str]], demo: tuple[Path, Path], tmp_path: Path
) -> None:
    files = {
        "geojson": {"cells.geojson.gz"},
        "parquet": {"cells.parquet"},
        "geojson,parquet": {"cells.geojson.gz", "cells.parquet"},
    }
    for formats in ("geojson", "geojson,parquet", "parquet"):
        for again in (False, True):
            status, output = wsiseg("run", demo[0], "--out", tmp_path, "--format", formats)
            assert status == 0
            assert ("already complete" in output) == again
            assert {p.name for p in (tmp_path / "ihc").glob("cells.*")} == files[formats]


def test_a_merge_does_not_undo_other_clicks(
    wsiseg: Callable[..., tuple[int, str]], demo: tuple[Path, Path], tmp_path: Path
) -> None:
    assert wsiseg("run", demo[0], "--seeds", demo[1], "--out", tmp_path, "--shard", "1/1")[0] == 0
    assert wsiseg("merge", tmp_path / "ihc")[0] == 0
    kinds = json.loads(demo[1].read_text())
    kinds["types"] = kinds["types"][:2]
    fewer = write(tmp_path / "fewer.json", json.dumps(kinds))
    assert wsiseg("type", tmp_path / "ihc", "--seeds", fewer)[0] == 0
    before = (tmp_path / "ihc" / "cells.parquet").read_bytes()
    status, output = wsiseg("merge", tmp_path / "ihc")
    assert status == 1
    assert "was re-typed with `wsiseg type`" in output
    assert (tmp_path / "ihc" / "cells.parquet").read_bytes() == before
