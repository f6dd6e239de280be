"""Shared fixtures: the folder of real data (skipped when absent), a model that answers with discs, and small synthetic slides."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # files run side by side: a core for each, also in what they start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
PICTURES = os.environ.get("WSISEG_PAGE_PICTURES")  #: a folder: `check_page` leaves pictures of the pages there

sys.path.append(str(ROOT))  # of training/ and benchmarks/; last, so that the installed wsiseg is the one that is tested


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs the folder of real data, so that no test is forgotten."""
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.realdata)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the folder ../shared with real slides and labelled images is not here")
    return folder


@pytest.fixture(scope="session")
def cmu(shared_data: Path) -> Path:
    """The H&E slide with a correct mpp: 2220 x 2967 px, 0.499 um/px."""
    return shared_data / "slides" / "CMU-1-Small-Region.svs"


@pytest.fixture(scope="session")
def cmu_crop(cmu: Path) -> np.ndarray:
    """700 x 700 px of it, dense in nuclei."""
    from wsiseg.geometry import Box
    from wsiseg.slide import open_slide

    with open_slide(cmu) as reader:
        return reader.read(0, Box(800, 800, 1500, 1500))


@pytest.fixture(scope="session")
def model():
    from wsiseg.models import load_model

    return load_model("nuclei-compact", "cpu")


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    from wsiseg.demo import write_demo

    return write_demo(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="session")
def wsiseg() -> Callable[..., tuple[int, str]]:
    """The command line in this process: arguments -> exit status and output; an exception that is no exit is raised."""
    from click.testing import CliRunner

    from wsiseg.cli import main

    def call(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        if result.exception and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.output

    return call


@pytest.fixture(scope="module")
def check_page() -> Iterator[Callable[[str, str], None]]:
    """Check of a page, by its address and a name, in a real browser at three widths; skipped where there is none.

    axe finds no serious fault, nothing is cut off sideways, nothing is asked of other hosts, no script fails.
    """
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright (dependency group `browser`)")
    axe = pytest.importorskip("axe_playwright_python", reason="needs axe-playwright-python (group `browser`)")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("needs Chromium on the PATH (Debian: apt-get install chromium)")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text()

    def check(address: str, name: str) -> None:
        page = browser.new_page(bypass_csp=True)  # for axe itself
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: asked.append(f"error: {error}"))
        for width in (1440, 820, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(address)
            page.evaluate(script)
            found = page.evaluate("axe.run(document, {resultTypes: ['violations']})")["violations"]
            serious = [fault for fault in found if fault["impact"] in ("serious", "critical")]
            assert [(fault["id"], fault["nodes"][0]["html"][:150]) for fault in serious] == [], (name, width)
            assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), (name, width)
            if PICTURES:
                page.screenshot(path=Path(PICTURES) / f"{name}-{width}.png", full_page=True)
        page.close()
        home = "/".join(address.split("/")[:3])
        assert [url for url in asked if not url.startswith((home, "data:", "blob:"))] == [], name

    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # in containers, as root
        yield check
        browser.close()


@pytest.fixture(scope="session")
def make_run() -> Callable[..., Path]:
    """Maker of finished runs with given cells, without segmenting anything."""
    return _make_run


def _make_run(folder: Path, cells: list[tuple[int, int, int, str]], names: tuple[str, ...], **slide: Any) -> Path:
    """A finished run of square cells (corner, side, type) on a slide of 1000 x 400 px at 0.5 um; ``slide`` is what the manifest says of it."""
    import numpy as np
    import shapely

    from wsiseg.formats.geoparquet import write_geoparquet
    from wsiseg.measurements import measure
    from wsiseg.records import Cells, Provenance, SlideInfo, Typing
    from wsiseg.runs.manifest import Manifest

    polygons = np.array([shapely.box(x, y, x + side, y + side) for x, y, side, _ in cells], object)
    count = len(cells)
    typing = Typing(
        names=("unassigned", *names),
        colors=((128, 128, 128), *((200, 10 * k, 0) for k in range(len(names)))),
        codes=np.array([("unassigned", *names).index(kind) for *_, kind in cells], np.int32),
        scores=np.full(count, 0.9, np.float32),
        margins=np.full(count, 0.5, np.float32),
        prototypes=np.zeros(count, np.int32),
    )
    info = SlideInfo(
        path="s.svs",
        reader="image",
        format="png",
        level_sizes=((1000, 400),),
        downsamples=(1.0,),
        mpp=0.5,
        mpp_source="--mpp",
        bounds=slide.get("bounds"),
    )
    folder.mkdir(parents=True)
    made = Cells(
        polygons=polygons,
        points_xy=shapely.get_coordinates(shapely.centroid(polygons)).reshape(-1, 2),
        scores=np.full(count, 0.5, np.float32),
        descriptors=np.zeros((count, 2), np.float16),
    )
    provenance = Provenance(tool="wsiseg", version="0", slide=slide.pop("slide", f"{folder.name}.svs"), config_hash="h")
    write_geoparquet(folder / "cells.parquet", measure(made, typing, 0.5), typing, info, provenance)
    Manifest(
        slide={
            "path": f"{folder.name}.svs",
            "reader": "image",
            "format": "png",
            "size_px0": [1000, 400],
            "mpp": 0.5,
            "mpp_source": "--mpp",
            "bounds": None,
            "searched_mm2": 0.02,
        }
        | slide,
        config={},
        run_hash="h",
        status="complete",
        folder=str(folder),
        files=("cells.parquet",),
        counts={"cells": count},
        seconds={"total": 1.0},
    ).write(folder / "manifest.json")
    return folder


@pytest.fixture
def tunnel() -> Iterator[Callable[[int], int]]:
    """Makes the end of a tunnel, as `ssh -L` does: port -> another port of this machine, from which bytes are passed on to the first."""
    listeners: list[socket.socket] = []

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                sink.sendall(content)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def pass_on(listener: socket.socket, port: int) -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", port), 5)
                    far.settimeout(None)
                except OSError:
                    near.close()
                    continue
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=pump, args=ends, daemon=True).start()

    def begin(port: int) -> int:
        listeners.append(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=pass_on, args=(listeners[-1], port), daemon=True).start()
        return int(listeners[-1].getsockname()[1])

    yield begin
    for listener in listeners:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
