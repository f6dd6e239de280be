"""The state of a run as it is shown: phases, tiles, rate and time left; a line a minute without a terminal; and the summary at the end."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from wsiseg.cli import progress
from wsiseg.cli.progress import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("a.svs", hidden=False) as shown:
        shown.phase("planning")
        shown.update(0, 1000, 0)
        for _ in range(60):
            clock[0] += 3
            shown.update(int(clock[0] - 1000), 1000, 7)
        clock[0] += 70
        shown.phase("stitching and typing")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a.svs: 60 of 1000 tiles, 1.00 tiles/s, 7 cells, 16 min left",
        "a.svs: 120 of 1000 tiles, 1.00 tiles/s, 7 cells, 15 min left",
        "a.svs: 180 of 1000 tiles, 1.00 tiles/s, 7 cells, 14 min left",
        "a.svs: stitching and typing",
    ]


def test_tiles_of_an_earlier_start_do_not_count_for_the_rate(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("a.svs", hidden=False) as shown:
        clock[0] += 100
        shown.update(900, 1000, 5)
        clock[0] += 60
        shown.update(930, 1000, 6)
    said = capsys.readouterr().err.splitlines()
    assert said == ["a.svs: 900 of 1000 tiles, 5 cells", "a.svs: 930 of 1000 tiles, 0.50 tiles/s, 6 cells, 2 min left"]


def test_the_rate_is_that_of_the_last_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("a.svs", hidden=False) as shown:
        shown.update(0, 10_000, 0)
        for rate in (1, 10):
            for _ in range(100):
                clock[0] += 2
                done = shown._seen[-1][1] + 2 * rate
                shown.update(done, 10_000, 0)
    rates = [float(found) for found in re.findall(r"([0-9.]+) tiles/s", capsys.readouterr().err)]
    assert rates[0] == 1
    assert rates[-1] == 10


def test_nothing_is_shown_when_it_is_hidden(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("a.svs", hidden=True) as shown:
        clock[0] += 1000
        shown.update(1, 2, 3)
        shown.phase("planning")
    assert capsys.readouterr() == ("", "")


def test_a_run_says_its_phases_and_its_total_before_the_first_tile(demo: tuple[Path, Path], tmp_path: Path) -> None:
    from wsiseg.config import RunConfig, TilingConfig
    from wsiseg.runs.slide import segment_slide

    told: list[object] = []
    config = RunConfig(tiling=TilingConfig(tile_um=64))
    for _ in range(2):
        segment_slide(
            str(demo[0]), config, tmp_path, on_progress=lambda *state: told.append(state), on_phase=told.append
        )
    tiles = [state for state in told if isinstance(state, tuple)]
    total = tiles[0][1]
    assert told[:3] == ["reading inputs", "planning", (0, total, 0)]
    assert tiles[-1][:2] == (total, total)
    assert told[told.index(tiles[-1]) + 1 :] == [
        "stitching and typing", "writing cells.geojson.gz", "writing cells.parquet", "reading inputs"
    ]  # fmt: skip


def test_the_end_of_a_run_says_what_there_is_and_what_to_do_next(
    demo: tuple[Path, Path], tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    status, output = wsiseg("run", demo[0], "--seeds", demo[1], "--out", tmp_path / "my runs")
    assert status == 0
    rows = {
        name: (int(n), int(density))
        for name, n, density in re.findall(r"^  (\w+) +(\d+) +(\d+) per mm2$", output, re.MULTILINE)
    }
    assert sum(n for name, (n, _) in rows.items() if name != "all") == rows["all"][0]
    area = float(re.search(r"([0-9.]+) mm2 searched", output)[1])
    assert rows["all"][1] == pytest.approx(rows["all"][0] / area, rel=0.01)
    assert f"next: look at {tmp_path / 'my runs' / 'ihc' / 'report.html'}; drag the GeoJSON onto the slide" in output
    assert "files: cells.geojson.gz, cells.parquet, bank.safetensors" in output
    (command,) = re.findall(r"other clicks: (wsiseg type .*) FILE", output)
    assert command == f"wsiseg type '{tmp_path / 'my runs' / 'ihc'}' --seeds"
    quiet = wsiseg("run", demo[0], "--seeds", demo[1], "--out", tmp_path / "my runs", "-q")
    assert quiet == (0, "")
    again = wsiseg("run", demo[0], "--seeds", demo[1], "--out", tmp_path / "my runs")[1]
    assert "already complete" in again
    assert "per mm2" not in again
