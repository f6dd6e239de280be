"""The page of a run: whole in one file, escaped, readable by people and screen readers, with or without the slide."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from wsiseg.cli import main

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    RunMaker = Callable[..., Path]

EVIL = '<script>alert("x")</script>&'
CELLS = [
    (20 + 13 * (k % 60), 20 + 40 * (k // 60), 8 + k % 4, ("tumour", EVIL, "unassigned")[k % 3]) for k in range(300)
]
VOID = {"meta", "img", "br", "input", "link"}


class Page(HTMLParser):
    """Tags of a page with their attributes, its text, and whether every tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, Any]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def all(self, name: str) -> list[dict[str, Any]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def run(make_run: RunMaker, tmp_path: Path) -> Path:
    """A run whose slide is a picture beside it: dark squares where the cells are."""
    pixels = np.full((400, 1000, 3), 230, np.uint8)
    for x, y, side, _ in CELLS:
        pixels[y : y + side, x : x + side] = (90, 40, 140)
    slide = tmp_path / "slide.png"
    Image.fromarray(pixels).save(slide)
    folder = make_run(tmp_path / "run", CELLS, ("tumour", EVIL), path=str(slide), slide=f"{EVIL}.svs")
    manifest = json.loads((folder / "manifest.json").read_text())
    more = {"warnings": [EVIL], "failures": ["tile 3: " + EVIL], "model": {"name": EVIL, "sha256": "0" * 64}}
    (folder / "manifest.json").write_text(
        json.dumps(manifest | more | {"config": {"masks": {"min_score": 0.7}, "device": EVIL}})
    )
    return folder


def report(*arguments: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["report", *map(str, arguments)])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout, done.stderr


def test_the_page_is_whole_escaped_and_small(run: Path) -> None:
    assert report(run) == (0, f"{run / 'report.html'}\n", "")
    text = (run / "report.html").read_text("utf-8")
    assert len(text) < 5_000_000
    assert "<script" not in text
    page = Page(text)
    assert page.open == []
    assert (
        page.text.count('<script>alert("x")</script>&') >= 8
    )  # as text: title, slide, types, warning, failure, model, setting
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        for name in ("src", "href"):
            assert attributes.get(name, "#").startswith(("#", "data:image/"))
    assert not re.search(r"url\(|@import|https?:", text.split("<body>")[0])
    (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_the_numbers_are_those_of_the_table(run: Path) -> None:
    report(run)
    page = Page((run / "report.html").read_text("utf-8"))
    areas = np.array([side * side * 0.25 for *_, side, _ in CELLS])
    mine = np.array([kind == "tumour" for *_, kind in CELLS])
    row = f"tumour {mine.sum()} {mine.mean():.1%} {mine.sum() / 0.02:,.1f} {np.median(areas[mine]):.1f} 0.90"
    assert row in page.text
    assert f"all 300 100.0% {300 / 0.02:,.1f}" in page.text
    assert "masks.min_score 0.7 0.2" in page.text
    assert "0.02 mm² searched (0.5 × 0.2 mm slide, 0.5000 µm per px from --mpp). Run complete." in page.text


def test_twelve_crops_per_type_show_their_cells(run: Path) -> None:
    report(run)
    page = Page((run / "report.html").read_text("utf-8"))
    pictures, outlines = page.all("image"), [p for p in page.all("polygon") if p["class"] == "outline"]
    assert len(pictures) == len(outlines) == 3 * 12  # of two types and of what has none
    labels = [s["aria-label"] for s in page.all("svg") if " at " in s.get("aria-label", "")]
    assert len(set(labels)) == 36  # no cell twice
    for picture, outline in zip(pictures, outlines, strict=True):
        pixels = np.array(Image.open(io.BytesIO(base64.b64decode(picture["href"].split(",")[1]))).convert("RGB"), int)
        xy = np.array([[float(n) for n in point.split(",")] for point in outline["points"].split()])
        x, y = xy.mean(0).round().astype(int)
        assert abs(x - 80) <= 1
        assert abs(y - 80) <= 1
        assert pixels[y, x, 0] < 130  # inside is a cell ..
        left, top = xy.min(0).astype(int)
        assert pixels[top + 2, left + 2, 0] < 150
        assert pixels[top - 6, left - 3, 0] > 190  # .. and beside it is not


def test_a_screen_reader_finds_its_way(run: Path) -> None:
    report(run)
    page = Page((run / "report.html").read_text("utf-8"))
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("h1")) == len(page.all("main")) == 1
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch(r"h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert all(picture["alt"] for picture in page.all("img"))
    assert all(chart["aria-label"] and chart["role"] == "img" for chart in page.all("svg"))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {link["href"][1:] for link in page.all("a")} <= set(ids)
    assert all(s["aria-labelledby"] in ids for s in page.all("section") if "aria-labelledby" in s)
    assert all(cell["scope"] in ("row", "col") for cell in page.all("th"))


def test_it_is_accessible_at_every_width(run: Path, check_page: Callable[[str, str], None], tmp_path: Path) -> None:
    """With everything that pages can show: pictures, types, seams, missing tiles, warnings; and the page of a cohort."""
    manifest = json.loads((run / "manifest.json").read_text())
    tiles = {
        "side_px0": 200.0,
        "origin_px0": [0, 0],
        "block_tiles": 2,
        "failed_px0": [[800, 200]],
        "missing_blocks": [],
    }
    (run / "manifest.json").write_text(
        json.dumps(manifest | {"tiles": tiles, "counts": {"tiles": 10, "tiles_failed": 1}})
    )
    assert report(run)[0] == 0
    check_page((run / "report.html").as_uri(), "report")
    assert report(run, "--cohort", tmp_path / "cohort.html")[0] == 0
    check_page((tmp_path / "cohort.html").as_uri(), "cohort")


def test_a_moved_slide(run: Path, tmp_path: Path) -> None:
    """Without the slide the page has all but its pictures; another slide is refused and the page stays."""
    moved = (tmp_path / "slide.png").rename(tmp_path / "elsewhere.png")
    status, _, warning = report(run)
    assert status == 0
    assert "no pictures of the slide" in warning
    assert "pass --slide FILE" in warning
    page = Page((run / "report.html").read_text("utf-8"))
    assert not page.all("image")
    assert len([i for i in page.all("img") if i["alt"].startswith("Density map")]) == 3
    assert "wsiseg report RUN --slide FILE" in page.text
    assert report(run, "--slide", moved)[0] == 0
    before = (run / "report.html").read_bytes()
    assert b"<image" in before
    Image.new("RGB", (90, 80)).save(tmp_path / "other.png")
    status, _, error = report(run, "--slide", tmp_path / "other.png")
    assert status == 1
    assert "has 90 x 80 px, the run's slide 1000 x 400" in error
    assert (run / "report.html").read_bytes() == before


def test_runs_without_types_and_without_cells(make_run: RunMaker, tmp_path: Path) -> None:
    untyped = make_run(tmp_path / "a", [(x, y, s, "unassigned") for x, y, s, _ in CELLS], ())
    empty = make_run(tmp_path / "b", [], ("tumour",))
    status, printed, _ = report(untyped, empty)
    assert status == 0
    assert printed.count("report.html") == 2
    assert "all cells 300 100.0%" in Page((untyped / "report.html").read_text("utf-8")).text
    assert "tumour 0 0.0% 0.0 – –" in Page((empty / "report.html").read_text("utf-8")).text


def test_the_density_map_counts_squares() -> None:
    from wsiseg.report.pictures import density_map

    found = density_map(np.array([[10.0, 10.0], [20.0, 20.0], [150.0, 10.0]]), (300, 200), 0.5)
    assert found.bin_um == 50
    assert found.highest == 2 / 0.05**2
    assert (found.picture.width, found.picture.height) == (3, 2)
    image = Image.open(io.BytesIO(base64.b64decode(found.picture.data.split(",")[1]))).convert("L")
    shades = np.array(image)
    assert shades[0, 0] < shades[0, 1] < shades[0, 2] == shades[1, 0]


def test_run_and_type_write_it_unless_told_not_to(demo: tuple[Path, Path], wsiseg: Any, tmp_path: Path) -> None:
    slide, seeds = demo
    assert wsiseg("run", slide, "--out", tmp_path / "plain", "--no-report")[0] == 0
    assert not list(tmp_path.glob("plain/*/report.html"))
    assert wsiseg("run", slide, "--out", tmp_path / "plain")[0] == 0  # already complete: only the page is made
    (page,) = tmp_path.glob("plain/*/report.html")
    assert b"all cells" in page.read_bytes()
    assert wsiseg("type", page.parent, "--seeds", seeds)[0] == 0
    assert b"all cells" not in page.read_bytes()
    assert b"epithelium" in page.read_bytes()
    assert wsiseg("type", page.parent, "--seeds", seeds, "--no-report")[0] == 0
    assert not page.exists()  # it showed other types
