"""The click page in a real browser: clicks, keys, review, what it looks like, what a screen reader finds. Skipped without a browser."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from wsiseg.config import RunConfig
from wsiseg.formats.seeds import read_seeds
from wsiseg.runs.retype import type_run
from wsiseg.runs.slide import segment_slide
from wsiseg.viewer.opening import open_page
from wsiseg.viewer.server import PageServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (dependency group `browser`)")
AXE = pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python (dependency group `browser`)")

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH (Debian: apt-get install chromium)"),
    pytest.mark.timeout(180),
]
SIZES = {"desk": (1440, 900), "laptop": (1024, 700), "phone": (390, 844)}
EVIL = '<img src=x onerror="document.title=1">'
SURE_CELL = """(() => {
  const o = wsiseg.overlay, s = [...o.squares.values()][0], wanted = [...s.rows.keys()].filter((c) => o.codes[s.rows[c]] === 1 && s.area(c) > 60);
  const best = wanted.reduce((a, b) => (o.margins[s.rows[a]] < 255 && o.margins[s.rows[a]] >= o.margins[s.rows[b]] ? a : b));
  return [(s.boxes[4 * best] + s.boxes[4 * best + 2]) / 2, (s.boxes[4 * best + 1] + s.boxes[4 * best + 3]) / 2];
})()"""  #: the middle of a cell of the first type that was not clicked
PAINTED = """code => [false, true].map(anew => {
  const o = wsiseg.overlay;
  o.hovered = null;
  if (anew) o.pictures.clear();
  o.paint();
  const { width, height } = o.canvas, copy = Object.assign(document.createElement('canvas'), { width, height });
  const context = copy.getContext('2d', { willReadFrequently: true });
  context.drawImage(o.canvas, 0, 0);
  const px = context.getImageData(0, 0, width, height).data, wanted = parseInt(o.state.kinds[code].color.slice(1), 16);
  let count = 0, sum = 0;
  for (let k = 0; k < px.length; k += 4) {
    if (px[k + 3] === 255 && (px[k] << 16 | px[k + 1] << 8 | px[k + 2]) === wanted) count += 1;
    sum = (31 * sum + px[k] + 7 * px[k + 1] + 13 * px[k + 2] + 17 * px[k + 3]) % 1000000007;
  }
  return [count, sum];
})"""  #: px of a type's colour, and a number for all px; as painted from what is kept, and drawn anew
PICTURES = os.environ.get("WSISEG_VIEW_PICTURES")  #: a folder: the tests leave pictures of the page there


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # in containers, as root
        yield started
        started.close()


@pytest.fixture(scope="module")
def template(demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the demo slide without clicks."""
    out = tmp_path_factory.mktemp("view")
    segment_slide(demo[0], RunConfig(stain="ihc", formats=("parquet",), device="cpu"), out)
    return out / "ihc"


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(template, tmp_path / "ihc"))


class Served:
    """`wsiseg view` of a run as a process."""

    def __init__(self, run: Path, *more: str) -> None:
        command = [sys.executable, "-m", "wsiseg", "view", str(run), "--no-browser", *more]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().strip()
        assert self.address.startswith("http://127.0.0.1:"), self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@contextmanager
def served_here(run: Path) -> Iterator[str]:
    page = open_page(str(run), RunConfig(), run.parent)
    try:
        with PageServer(page) as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            yield server.address
            server.shutdown()
            thread.join()
    finally:
        page.close()


@pytest.fixture
def address(run: Path) -> Iterator[str]:
    with served_here(run) as made:
        yield made


class Window:
    """A window on the page, what its console said, and what it asked of other machines."""

    def __init__(self, browser: Any, address: str, size: str = "desk") -> None:
        width, height = SIZES[size]
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.said: list[str] = []
        self.page.on(
            "console", lambda message: self.said.append(message.text) if message.type in ("error", "warning") else None
        )
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on(
            "request",
            lambda request: (
                self.said.append(request.url) if not request.url.startswith((address, "data:", "blob:")) else None
            ),
        )
        self.page.goto(address)
        self.ready()

    def ready(self) -> None:
        self.page.wait_for_selector("html[data-ready=yes]")
        self.wait("wsiseg.overlay.squares.size > 0 && wsiseg.overlay.codes && !wsiseg.overlay.busy")

    def state(self) -> Any:
        return self.page.evaluate("wsiseg.state()")

    def position(self, x: float, y: float) -> tuple[float, float]:
        """Where a place of the slide is in the window."""
        left, top = self.page.evaluate(
            "([x, y]) => { const o = wsiseg.overlay.view, b = o.box, f = o.element.getBoundingClientRect();"
            " return [f.left + (x - b.x0) * o.scale, f.top + (y - b.y0) * o.scale]; }", [x, y]
        )  # fmt: skip
        return left, top

    def hover(self, x: float, y: float) -> None:
        self.page.mouse.move(*self.position(x, y))
        self.wait("wsiseg.overlay.hovered !== null")

    def click(self, x: float, y: float, **how: Any) -> None:
        """Move the pointer there, see the cell outlined, click, and wait until the view is typed again."""
        before = self.state()["revision"]
        self.hover(x, y)
        self.page.mouse.click(*self.position(x, y), **how)
        self.wait(f"wsiseg.state().revision > {before} && !wsiseg.overlay.busy")

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def wait(self, holds: str, seconds: float = 30) -> None:
        """Wait until an expression holds; asked from outside, since the page's policy forbids it to evaluate texts."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(holds):
            assert time.monotonic() < end, (holds, self.said, self.page.inner_text("#status"))
            self.page.wait_for_timeout(20)

    def codes(self) -> list[int]:
        return list(self.page.evaluate("Array.from(wsiseg.overlay.codes)"))

    def counts(self) -> dict[str, str]:
        """The numbers beside the types, by name."""
        self.wait("document.querySelector('#palette .count').textContent !== ''")
        return {
            row.query_selector(".name").inner_text(): row.query_selector(".count").inner_text()
            for row in self.page.query_selector_all("#palette [data-code]")
        }

    def painted(self, code: int) -> int:
        """How many px over the slide have the colour of a type. What is kept as pictures is what would be drawn now."""
        self.wait("wsiseg.overlay.settled")
        kept, drawn = self.page.evaluate(PAINTED, code)
        assert kept == drawn
        return int(kept[0])

    def picture(self, name: str) -> None:
        if PICTURES:
            self.page.wait_for_timeout(400)
            self.page.screenshot(path=Path(PICTURES) / f"{name}.png")


def test_from_clicks_to_a_typed_slide(
    browser: Any, address: str, demo: tuple[Path, Path], run: Path, template: Path, tmp_path: Path
) -> None:
    """Open, zoom, click three types, undo, a negative, review ten cells, save, reload, apply: files and page agree to the byte."""
    window = Window(browser, address)
    page = window.page
    window.picture("1-open")
    assert set(window.codes()) == {0}  # a run without clicks
    assert window.painted(0) > 1000
    assert window.painted(1) == 0
    page.click("[data-key='open tumour']")
    page.fill("[aria-label='Name of the type']", "epithelium")
    page.click("text=Rename")
    window.wait("wsiseg.state().types[0].name === 'epithelium'")
    page.click("[data-key='open epithelium']")
    clicks = [(number, x, y) for number, kind in enumerate(read_seeds(demo[1]).types) for x, y in kind.points]
    for k, (number, x, y) in enumerate(clicks):
        window.press(str(number + 1))
        window.click(x, y)
        if k in (0, len(clicks) - 1):
            window.picture(f"{2 if k == 0 else 3}-{'one-click' if k == 0 else 'twelve-clicks'}")
    codes = window.codes()
    assert {1, 2, 3} <= set(codes)
    counts = window.counts()
    assert sum(int(counts[name]) for name in ("epithelium", "immune", "stroma", "unassigned")) == len(codes)
    assert int(counts["epithelium"]) == codes.count(1)
    assert counts["unassigned"] == str(codes.count(0))
    outlined = [window.painted(code) for code in (1, 2, 3)]
    assert min(outlined) > 500

    point = page.evaluate(SURE_CELL)
    window.click(*point)
    assert len(window.state()["types"][2]["points"]) == 5
    window.press("Control+z")
    window.wait("wsiseg.state().types[2].points.length === 4 && !wsiseg.overlay.busy")
    assert window.codes() == codes
    assert [window.painted(code) for code in (1, 2, 3)] == outlined
    window.press("Control+Shift+z")
    window.wait("wsiseg.state().types[2].points.length === 5 && !wsiseg.overlay.busy")
    window.press("Control+z")
    window.wait("wsiseg.state().types[2].points.length === 4 && !wsiseg.overlay.busy")
    window.click(*point, button="right")
    assert len(window.state()["types"][2]["negative"]) == 1
    page.keyboard.down("Alt")
    window.click(310, 340)
    page.keyboard.up("Alt")
    assert len(window.state()["types"][2]["negative"]) == 2

    window.press("r")
    window.wait("!document.getElementById('card').hidden")
    window.picture("4-review")
    for k in range(10):
        shown = page.get_attribute("#card", "data-row")
        window.press(("k", "1", "n", "j", "2")[k % 5])
        window.wait(
            f"wsiseg.state().seen === {k + 1} && !['', '{shown}'].includes(document.getElementById('card').dataset.row)"
        )
    window.press("Escape")
    assert page.is_hidden("#card")

    window.press("Control+s")
    window.wait("document.getElementById('saved').textContent.startsWith('Saved')")
    state = window.state()
    kept = [kind for kind in state["types"] if kind["points"]]
    seeds = json.loads((run / "seeds.json").read_text())
    assert seeds["slide"] == "ihc.tiff"
    assert [(k["name"], k["color"], k["points"], k.get("negative", [])) for k in seeds["types"]] == [
        (k["name"], k["color"], k["points"], k["negative"]) for k in kept
    ]
    assert sum(len(kind["points"]) + len(kind["negative"]) for kind in kept) >= 16

    page.reload()
    window.ready()
    assert window.state()["types"] == state["types"]
    before = window.codes()
    page.click("#apply")
    window.wait(
        "wsiseg.state().applied && !wsiseg.state().applying && document.getElementById('apply').textContent === 'Applied'"
    )
    window.wait("!wsiseg.overlay.busy && wsiseg.overlay.squares.size > 0 && !wsiseg.overlay.codes.includes(255)")
    window.picture("5-applied")
    assert window.codes() == before
    other = Path(shutil.copytree(template, tmp_path / "other"))
    type_run(other, seeds=run / "seeds.json")
    for name in ("cells.parquet", "bank.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes()
    assert window.said == []
    page.close()


def test_the_keyboard_alone_reaches_everything(browser: Any, address: str) -> None:
    """Tab reaches every control in order; the crosshair clicks; a cell is outlined under it before."""
    window = Window(browser, address)
    page = window.page
    controls = "[...document.querySelectorAll('button, input, select, a[href], summary')]"
    controls += ".filter(e => e.offsetParent && !e.disabled && e.tabIndex >= 0)"
    name = "(e => e.id || e.getAttribute('aria-label') || e.textContent)"
    wanted = set(page.evaluate(f"{controls}.map({name})"))
    reached = set()
    page.evaluate("document.body.focus()")
    for _ in range(60):
        window.press("Tab")
        reached.add(page.evaluate(f"{name}(document.activeElement)"))
    assert wanted <= reached
    assert "viewer" in reached
    page.focus("#viewer")
    window.press("0")
    for _ in range(4):
        window.press("+")
    page.wait_for_timeout(600)
    for _ in range(60):  # until the crosshair is on a cell
        if page.evaluate("wsiseg.overlay.hovered !== null"):
            break
        window.press("Shift+ArrowRight")
        page.wait_for_timeout(100)
        window.wait("wsiseg.overlay.settled")
    assert page.evaluate("wsiseg.overlay.hovered !== null")
    window.press("Enter")
    window.wait("wsiseg.state().types[0].points.length === 1")
    assert window.painted(1) > 200  # after moves and zooms
    window.press("2")
    window.press("Shift+Enter")
    window.wait("wsiseg.state().types[1].negative.length === 1")
    page.focus("[data-key='choose immune']")
    window.press("ArrowDown")
    assert page.evaluate("document.activeElement.dataset.key") == "choose stroma"
    assert page.get_attribute("[data-key='choose stroma']", "aria-checked") == "true"
    assert window.said == []
    page.close()


def test_names_are_text_and_panels_work(browser: Any, address: str) -> None:
    """HTML as a type's name is shown as it is; filters, jump, regions, rename, removal, and what is refused is said."""
    window = Window(browser, address)
    page = window.page
    page.fill("#new-type", EVIL)
    window.press("Enter")
    window.wait("wsiseg.state().types.length === 4")
    assert EVIL in page.inner_text("#palette")
    assert page.evaluate("document.querySelectorAll('#palette img').length") == 0
    window.click(67, 82)
    page.hover("#viewer", position={"x": 5, "y": 5})
    window.hover(67, 82)
    assert page.inner_text("#hover").startswith(EVIL)
    assert page.title().startswith("ihc.tiff")
    page.click("[data-key='open " + EVIL.replace('"', '\\"') + "']")
    assert page.is_visible("text=is at 67")
    page.click("text=Remove type")
    window.wait("wsiseg.state().types.length === 3")

    before = page.evaluate("wsiseg.overlay.boxInView()")
    page.fill("#place", "100, 120")
    window.press("Enter")
    page.wait_for_timeout(400)
    box = page.evaluate("wsiseg.overlay.boxInView()")
    assert box != before
    assert box["x0"] < 100 < box["x1"]
    page.fill("#place", "9999, 1")
    window.press("Enter")
    assert "512 × 512" in page.inner_text("#status")

    page.focus("#viewer")
    window.press("0")
    page.wait_for_timeout(600)
    page.click("#draw")
    for x, y in ((100, 100), (400, 100), (400, 300)):
        page.mouse.click(*window.position(x, y))
        page.wait_for_timeout(350)  # two clicks that are quick would be a double click
    page.click("#close-region")
    window.wait("wsiseg.state().regions.length === 1")
    ring = window.state()["regions"][0]
    assert all(
        abs(a - b) < 1.5
        for got, put in zip(ring, ((100, 100), (400, 100), (400, 300)), strict=True)
        for a, b in zip(got, put, strict=True)
    )
    assert window.painted(0) > 1000
    window.press("h")
    assert not page.is_checked("#outlines")
    assert window.painted(0) == 0
    page.click("text=Remove")
    window.wait("wsiseg.state().regions.length === 0")
    assert window.said == []
    page.close()


def test_through_a_tunnel_nothing_is_lost_when_the_server_is_killed(
    browser: Any, run: Path, tunnel: Callable[[int], int]
) -> None:
    """The page works at another port, as `ssh -L` gives it; when the server is gone the page says so, and another has the clicks."""
    served = Served(run)
    try:
        port = served.address.split(":")[2].split("/")[0]
        window = Window(browser, served.address.replace(f":{port}/", f":{tunnel(int(port))}/"))
        assert f":{port}/" not in window.page.url
        window.click(67, 82)
        points = window.state()["types"][0]["points"]
        window.press("Control+s")
        window.wait("document.getElementById('saved').textContent.startsWith('Saved')")
        assert window.said == []
    finally:
        served.kill()
    window.page.mouse.click(*window.position(271, 271))
    window.wait("document.getElementById('status').textContent.includes('does not answer')")
    with served_here(run) as again:
        other = Window(browser, again)
        assert other.state()["types"][0]["points"] == points
        other.page.close()
    window.page.close()


@pytest.mark.parametrize("size", SIZES)
def test_it_is_accessible_at_every_size(browser: Any, address: str, size: str) -> None:
    """axe finds no serious fault, nothing is cut off sideways, the slide and the palette are in the window."""
    window = Window(browser, address, size)
    page = window.page
    window.press("1")
    window.click(67, 82)
    window.press("r")
    window.wait("!document.getElementById('card').hidden")
    page.click("[data-key='open tumour']")
    page.click("summary")
    window.picture(f"size-{size}")
    script = (Path(AXE.__file__).parent / "axe.min.js").read_text()
    page.evaluate(script)  # not as a script element, which the page's policy forbids
    found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    serious = [
        f"{v['id']}: {v['nodes'][0]['html'][:120]}"
        for v in found["violations"]
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    assert page.evaluate("document.getElementById('viewer').clientHeight") > 250
    assert window.said == []
    page.close()
