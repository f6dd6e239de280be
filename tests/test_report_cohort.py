"""The page of a cohort: numbers of every run side by side, links to their pages, and nothing that a name could break."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunMaker = Callable[..., Path]

EVIL = '<b onclick="x()">lymphoma</b>'


@pytest.fixture
def runs(make_run: RunMaker, tmp_path: Path) -> list[Path]:
    """Two typed runs, one of them with a type of its own, and one without types."""
    one = [(20 + 13 * k, 20, 8, "tumour" if k < 30 else "stroma") for k in range(40)]
    two = [(20 + 13 * k, 20, 8, EVIL if k < 5 else "tumour") for k in range(10)]
    three = [(20 + 13 * k, 20, 8, "unassigned") for k in range(20)]
    return [
        make_run(tmp_path / "runs/one", one, ("tumour", "stroma"), slide="one.svs"),
        make_run(tmp_path / "runs/two", two, ("tumour", EVIL), slide=f"{EVIL}.svs"),
        make_run(tmp_path / "runs/three", three, (), slide="three.svs"),
    ]


def cells_of(text: str, row: str) -> list[str]:
    """Text of the table cells in the row of a slide, in the table that is in ``text``."""
    (line,) = [r for r in re.findall(r"<tr>.*?</tr>", text, re.DOTALL) if f">{row}<" in r]
    return [re.sub(r"<[^>]*>", "", part).strip() for part in re.findall(r"<t[hd].*?</t[hd]>", line, re.DOTALL)]


def test_the_numbers_of_every_run(runs: list[Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (runs[0] / "report.html").write_text("its own page")
    out = tmp_path / "cohort.html"
    assert wsiseg("report", *runs, "--cohort", out) == (0, f"{out}: 3 slides\n")
    text = out.read_text("utf-8")
    assert len(text) < 100_000
    assert "<script" not in text
    assert "<b onclick" not in text  # a name is text
    assert "default-src 'none'" in text
    assert re.findall(r'href="([^#"][^"]*)"', text) == ["runs/one/report.html"]
    slides, types = text.split('<h2 id="slides">')[1], text.split('<h2 id="types">')[1]
    area = 0.02
    assert cells_of(slides.split("</table>")[0], "one.svs")[:5] == [
        "one.svs",
        "complete",
        "0.02",
        "40",
        f"{40 / area:,.1f}",
    ]
    assert 'aria-label="tumour 75.0%, stroma 25.0%"' in slides
    assert cells_of(types, "one.svs") == ["one.svs", "30", "1,500.0", "10", "500.0", "–", "–", "0", "0.0"]
    assert cells_of(types, "three.svs") == ["three.svs", *["–"] * 6, "20", "1,000.0"]
    assert "tumour per mm²: 250.0 to 1,500.0, median 875.0" in text


def test_one_bad_run_does_not_end_the_page(
    runs: list[Path], wsiseg: Callable[..., tuple[int, str]], tmp_path: Path
) -> None:
    out = tmp_path / "cohort.html"
    status, said = wsiseg("report", runs[0], tmp_path / "runs", "--cohort", out)
    assert status == 3
    assert f"{out}: 1 slide" in said
    assert "no manifest.json of wsiseg in it" in said
    before = out.read_bytes()
    status, said = wsiseg("report", *runs, "--cohort", out)
    assert status != 0
    assert "--overwrite" in said
    assert out.read_bytes() == before
    assert wsiseg("report", *runs, "--cohort", out, "--overwrite")[0] == 0
    assert out.read_bytes() != before


def test_what_does_not_go_together(runs: list[Path], wsiseg: Callable[..., Any], tmp_path: Path) -> None:
    status, said = wsiseg("report", runs[0], "--slide", tmp_path / "a.svs", "--cohort", tmp_path / "c.html")
    assert status != 0
    assert "--slide: the page of --cohort has no pictures" in said
    assert not (tmp_path / "c.html").exists()
