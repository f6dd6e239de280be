"""The click page over HTTP: who may ask and for what, what is written and where, and that no click is lost."""

from __future__ import annotations

import dataclasses
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from PIL import Image

from wsiseg.config import RunConfig, TilingConfig
from wsiseg.errors import FormatError, RunError
from wsiseg.formats.geoparquet import write_geoparquet
from wsiseg.formats.parts import write_part
from wsiseg.formats.regions import read_regions
from wsiseg.formats.seeds import read_seeds
from wsiseg.measurements import measure
from wsiseg.models import find_weights
from wsiseg.models.cards import file_hash
from wsiseg.records import Cells, Provenance, SlideInfo, Typing
from wsiseg.runs.retype import type_run
from wsiseg.runs.slide import segment_slide
from wsiseg.segmentation import blocks
from wsiseg.slide.array_reader import ArrayReader
from wsiseg.viewer.opening import open_page
from wsiseg.viewer.server import MAX_BODY, MODULES, PageServer
from wsiseg.viewer.session import Session
from wsiseg.viewer.tiles import SlideTiles

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from wsiseg.viewer.page import SlidePage

WIDTH, HEIGHT, STEP = 1000, 800, 20
EVIL = '<img src=x onerror="document.title=1">&amp;'
KINDS = 3


def state_of(path: Path) -> tuple[int, int, int]:
    """What changes when a file is written again, unlike the time when it was read."""
    state = path.stat()
    return state.st_ino, state.st_mtime_ns, state.st_size


def make_view_run(folder: Path, *, name: str = "slide") -> Path:
    """A finished run of 2000 cells on a lattice; every third column is of one kind, as its descriptors say. Its slide is beside it."""
    rng = np.random.default_rng(0)
    xy = np.stack(np.meshgrid(np.arange(WIDTH // STEP), np.arange(HEIGHT // STEP)), -1).reshape(-1, 2) * STEP + STEP / 2
    kinds = (xy[:, 0] // STEP).astype(int) % KINDS
    z = np.random.default_rng(1).standard_normal((KINDS, 75))[kinds] + 0.2 * rng.standard_normal((len(xy), 75))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    polygons = shapely.buffer(shapely.points(xy), 6, quad_segs=4)
    cells = Cells(
        polygons=polygons, points_xy=xy, scores=np.full(len(xy), 0.9, np.float32), descriptors=z.astype(np.float16)
    )
    pixels = np.full((HEIGHT, WIDTH, 3), 235, np.uint8)
    pixels[::STEP] = (180, 90, 160)
    slide = folder / f"{name}.png"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(slide)
    info = SlideInfo(
        path=str(slide), reader="image", format="png", level_sizes=((WIDTH, HEIGHT),), downsamples=(1.0,), mpp=0.5, mpp_source="--mpp"
    )  # fmt: skip
    run = folder / "run"
    run.mkdir()
    typing = Typing.untyped(len(xy))
    provenance = Provenance(tool="wsiseg", version="0", slide=slide.name, config_hash="0")
    write_geoparquet(run / "cells.parquet", measure(cells, typing, 0.5), typing, info, provenance)
    manifest = {
        "status": "complete",
        "run_hash": "0",
        "parts_hash": "0",
        "folder": str(run),
        "slide": {"path": str(slide), "reader": "image", "format": "png", "size_px0": [WIDTH, HEIGHT], "mpp": 0.5}
        | {"mpp_source": "--mpp", "bounds": None, "searched_mm2": 0.2},
        "model": {"name": "nuclei-compact", "sha256": file_hash(find_weights("nuclei-compact")[1])},
        "seconds": {"total": 1.0},
        "config": dataclasses.asdict(RunConfig(method="apg", precision="fp32", formats=("parquet",))),
    }
    (run / "manifest.json").write_text(json.dumps(manifest))
    return run


def centre(column: int, row: int = 0) -> list[float]:
    """The centre of a cell of the lattice; its kind is column % KINDS."""
    return [column * STEP + STEP / 2, row * STEP + STEP / 2]


@contextmanager
def served(page: SlidePage) -> Iterator[Client]:
    with PageServer(page) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield Client(server.server_port, server.token)
        finally:
            server.shutdown()
            thread.join()
            page.close()


class Client:
    """Asks as the page does; what is asked otherwise is said in each test."""

    run: Path

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token = port, token

    def ask(
        self, path: str, method: str = "GET", body: bytes | None = None, headers: dict[str, str] | None = None, *, raw: bool = False
    ) -> tuple[int, bytes, dict[str, str]]:  # fmt: skip
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path if raw else f"/{self.token}/{path}", body, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.read(), dict(answer.getheaders())
        finally:
            connection.close()

    def get(self, path: str) -> Any:
        status, content, _ = self.ask(path)
        assert status == 200, content
        return json.loads(content)

    def post(self, path: str, body: object) -> tuple[int, Any]:
        status, content, _ = self.ask(path, "POST", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return status, json.loads(content) if content[:1] in (b"{", b"[") else content.decode()

    def click(self, kind: str, point: list[float], *, negative: bool = False) -> tuple[int, Any]:
        return self.post("do", {"kind": "click", "type": kind, "point": point, "negative": negative})

    def wait(self, holds: Callable[[Any], bool], seconds: float = 30) -> Any:
        end = time.monotonic() + seconds
        while not holds(state := self.get("state")):
            assert time.monotonic() < end, state
            time.sleep(0.05)
        return state


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_view_run(tmp_path_factory.mktemp("template"))


@pytest.fixture
def run(template: Path, tmp_path: Path) -> Path:
    """The run and its slide, made once and copied."""
    return copied(template, tmp_path)


def copied(template: Path, folder: Path) -> Path:
    shutil.copytree(template.parent, folder, dirs_exist_ok=True)
    manifest = json.loads((folder / "run/manifest.json").read_text())
    manifest["slide"]["path"] = str(folder / "slide.png")
    manifest["folder"] = str(folder / "run")
    (folder / "run/manifest.json").write_text(json.dumps(manifest))
    return folder / "run"


@pytest.fixture(scope="module")
def refusing(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """One server for all requests that change nothing."""
    run = copied(template, tmp_path_factory.mktemp("refusing"))
    with served(open_page(str(run), RunConfig(), run.parent / "out")) as made:
        made.run = run
        yield made


@pytest.fixture
def client(run: Path) -> Iterator[Client]:
    with served(open_page(str(run), RunConfig(), run.parent / "out")) as made:
        yield made


def files_below(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


# --- who may ask ----------------------------------------------------------------------------------------------------------------------


def test_only_this_machine_and_only_with_the_token(client: Client) -> None:
    """Without the token, with a wrong one or a foreign Host: refused in one line, for every method."""
    for path in (
        "/",
        "/state",
        "/x/state",
        f"/{client.token[:-1]}/state",
        f"/{client.token}x/state",
        "//",
        f"/{client.token}",
    ):
        for method in ("GET", "POST", "HEAD"):
            status, content, _ = client.ask(path, method, raw=True)
            assert status in (403, 404), (path, method)
            assert content.count(b"\n") <= 1
            assert b"revision" not in content
    for host in ("evil.example", "evil.example:80", f"127.0.0.1.evil.example:{client.port}", "[::1]:80", ""):
        assert client.ask("state", headers={"Host": host})[0] == 403, host
    for host in (f"localhost:{client.port}", "localhost:9999"):  # the end of an SSH tunnel
        assert client.ask("state", headers={"Host": host})[0] == 200
    assert socket.create_connection(("127.0.0.1", client.port), 1).close() is None
    listening = (
        [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        if Path("/proc/net/tcp").exists()
        else []
    )
    addresses = {
        fields[1].split(":")[0]
        for fields in listening
        if fields[1].endswith(f":{client.port:04X}") and fields[3] == "0A"
    }
    assert addresses <= {"0100007F"}  # 127.0.0.1


def test_other_sites_are_refused(client: Client) -> None:
    body = json.dumps({"kind": "undo"}).encode()
    kind = {"Content-Type": "application/json"}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        assert client.ask("do", "POST", body, kind | headers)[0] == 403, headers
        assert client.ask("state", headers=headers)[0] == 403
    followed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "document"}  # a link to the page, with its token
    assert client.ask("", headers=followed)[0] == 200
    own = {"Origin": f"http://127.0.0.1:{client.port}", "Sec-Fetch-Site": "same-origin"}
    assert client.ask("do", "POST", body, kind | own)[0] == 200
    for other in ("text/plain", "application/x-www-form-urlencoded", ""):  # what a form of another site can send
        assert client.ask("do", "POST", body, {"Content-Type": other})[0] == 415


def test_the_page_may_load_nothing_from_elsewhere(client: Client) -> None:
    status, content, headers = client.ask("")
    assert status == 200
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "://" not in content.decode()
    for name in ("main.js", "server.js", "overlay.js", "panel.js", "review.js", "style.css"):
        status, content, headers = client.ask(name)
        assert status == 200
        assert b"http" not in content.replace(b"getHttp", b""), name
        assert headers["X-Content-Type-Options"] == "nosniff"


# --- what may be asked ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "../manifest.json", "..%2fmanifest.json", "static/../../manifest.json", "main.js/../../x", "tile/../../0", "%2e%2e/%2e%2e/etc/passwd",
        "outlines/../0/0", "outlines/x/0/0", "tile/0/99/0", "tile/99/0/0", "tile/-1/0/0", "tile/0/-1/0", "tile/a/b/c", "tile/1e9/0/0",
        "types?x0=nan&y0=0&x1=1&y1=1", "types?x0=0", "types?x0=1&y0=1&x1=0&y1=0", "types?x0=-inf&y0=0&x1=inf&y1=1", "density?x0=0&y0=0&x1=9&y1=9",
        "density?x0=0&y0=0&x1=9&y1=9&columns=z&lines=1", "crop?x=1&y=nan&side=20", "crop", "nothing", "a" * 5000,
    ],
)  # fmt: skip
def test_requests_that_the_page_does_not_make_are_refused(refusing: Client, path: str) -> None:
    """No path of the machine is ever opened, and nothing ends in a traceback or a fault of ours."""
    status, content, _ = refusing.ask(path)
    assert status in (400, 403, 404)
    assert b"Traceback" not in content
    assert b"root:" not in content


def test_the_far_end_of_a_tunnel_is_answered(client: Client, tunnel: Callable[[int], int]) -> None:
    """`ssh -L 9000:127.0.0.1:8765`: Host and Origin name the port at the desk. Another port's page is another site all the same."""
    far = Client(tunnel(client.port), client.token)
    here = {
        "Origin": f"http://127.0.0.1:{far.port}",
        "Sec-Fetch-Site": "same-origin",
        "Content-Type": "application/json",
    }
    body = json.dumps({"kind": "click", "type": "tumour", "point": centre(0)}).encode()
    assert far.port != client.port
    assert far.ask("")[0] == far.ask("tile/0/0/0")[0] == 200
    assert far.ask("do", "POST", body, here)[0] == 200
    assert far.ask("do", "POST", body, here | {"Origin": f"http://127.0.0.1:{client.port}"})[0] == 403
    assert Client(far.port, "x" * len(client.token)).ask("state")[0] == 403


@pytest.mark.parametrize(
    "body",
    [
        b"", b"[]", b"null", b"{", b'{"kind": 3}', b'{"kind": "palette", "types": []}', b"\xff\xfe", b"[" * 100_000, b'{"kind": "click"}',
        b'{"kind": "click", "type": "nobody", "point": [1, 1]}', b'{"kind": "click", "type": "tumour", "point": [1e400, NaN]}',
        b'{"kind": "click", "type": "tumour", "point": "here"}', b'{"kind": "region", "add": [[1, 1]]}', b'{"kind": "region", "drop": 5}',
        b'{"kind": "type", "new": {"name": "", "color": "#000000"}}', b'{"kind": "type", "new": {"name": "a:b", "color": "#000000"}}',
        b'{"kind": "type", "new": {"name": "a", "color": "red"}}', b'{"kind": "type", "new": {"name": "Tumour", "color": "#000000"}}',
        b'{"kind": "type", "old": "nobody"}', b'{"kind": "seen", "row": 7}', b'{"kind": "seen", "row": -1, "version": ""}',
        b'{"kind": "unclick", "type": "tumour", "side": "__class__", "point": [1, 1]}',
    ],
)  # fmt: skip
def test_a_change_that_is_none_changes_nothing(refusing: Client, body: bytes) -> None:
    before = (refusing.run / "view.json").read_bytes()
    status, content, _ = refusing.ask("do", "POST", body, {"Content-Type": "application/json"})
    assert status in (400, 422), content
    assert b"Traceback" not in content
    assert content.count(b"\n") <= 1
    assert (refusing.run / "view.json").read_bytes() == before


def test_a_body_of_ten_megabytes_is_refused_unread(client: Client) -> None:
    size = 10_000_000
    status, content, _ = client.ask(
        "do", "POST", None, {"Content-Type": "application/json", "Content-Length": str(size)}
    )
    assert status == 413
    assert str(MAX_BODY).encode() in content
    with socket.create_connection(("127.0.0.1", client.port), 5) as sender:  # and when it is sent all the same
        sender.sendall(
            f"POST /{client.token}/do HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {size}\r\n\r\n".encode()
        )
        try:
            for _ in range(10):
                sender.sendall(b"x" * 1_000_000)
        except OSError:
            pass
    chunked = {"Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    assert client.ask("do", "POST", b"0\r\n\r\n", chunked)[0] in (400, 411)
    assert client.get("state")["revision"] >= 0


def test_a_thousand_requests_at_once_are_served_or_refused(client: Client, capfd: pytest.CaptureFixture[str]) -> None:
    def ask(k: int) -> int:
        try:
            return client.ask(("state", "tile/0/0/0", "counts", "types?x0=0&y0=0&x1=500&y1=500")[k % 4])[0]
        except OSError:  # refused by closing
            return 503

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(1000)))
    assert set(answers) <= {200, 503}
    assert answers.count(200) > 500
    assert client.get("state")["canUndo"] is False
    captured = capfd.readouterr()
    assert "Traceback" not in captured.err + captured.out


def test_connections_beyond_the_limit_are_refused_and_idle_ones_do_no_harm(client: Client) -> None:
    """One line for those that find no room; when there is room again, they are served."""
    idle = [socket.create_connection(("127.0.0.1", client.port), 5) for _ in range(300)]
    try:
        time.sleep(0.5)
        with pytest.raises((AssertionError, OSError, http.client.HTTPException)):
            assert client.ask("state")[0] == 200
    finally:
        for one in idle:
            one.close()
    client.wait(lambda state: state["revision"] >= 0) if _retry(client) else pytest.fail(
        "no answer after the others left"
    )


def _retry(client: Client) -> bool:
    for _ in range(50):
        try:
            if client.ask("state")[0] == 200:
                return True
        except OSError:
            pass
        time.sleep(0.1)
    return False


# --- what it shows --------------------------------------------------------------------------------------------------------------------


def test_tiles_show_the_slide(client: Client) -> None:
    """Zoom 0 is level 0 in tiles of 512 px; the last zoom is the whole slide in one."""
    about = client.get("slide")
    assert about["zooms"] == 2
    _, content, headers = client.ask("tile/0/1/1")
    assert headers["Content-Type"] == "image/jpeg"
    assert Image.open(io.BytesIO(content)).size == (WIDTH - 512, HEIGHT - 512)
    whole = Image.open(io.BytesIO(client.ask("tile/1/0/0")[1]))
    assert whole.size == (WIDTH // 2, HEIGHT // 2)
    assert abs(int(np.asarray(whole)[105, 100].mean()) - 235) < 6  # between two of the slide's stripes
    assert abs(int(np.asarray(whole)[100, 100].mean()) - 189) < 12
    assert client.ask("tile/0/1/1")[1] == content
    assert Image.open(io.BytesIO(client.ask("crop?x=0&y=0&side=40")[1])).size == (256, 256)


def test_outlines_are_those_of_the_table(client: Client, run: Path) -> None:
    """Every cell is in exactly one square, with its own outline to a quarter of a px."""
    state = client.get("state")
    assert state["cells"]["grid"] == [1, 1]
    content = client.ask(f"outlines/{state['cells']['version']}/0/0")[1]
    count, total = np.frombuffer(content, "<u4", 2)
    rows = np.frombuffer(content, "<u4", count, 8)
    xy = np.frombuffer(content, "<i2", 2 * total, 8 + 4 * count).reshape(-1, 2) / 4
    corners = np.frombuffer(content, "<u2", count, 8 + 4 * count + 4 * total)
    assert sorted(rows) == list(range(len(pq.read_table(run / "cells.parquet"))))
    polygons = shapely.from_wkb(pq.read_table(run / "cells.parquet")["geometry"].to_numpy())
    starts = np.cumsum([0, *corners])
    for k in (0, 700, len(rows) - 1):
        ring = shapely.Polygon(xy[starts[k] : starts[k + 1]])
        assert shapely.hausdorff_distance(ring, polygons[rows[k]]) < 0.2
    status, _, _ = client.ask("outlines/other/0/0")
    assert status == 404


def test_names_from_files_are_text_in_every_answer(tmp_path: Path) -> None:
    """HTML in the name of a slide and of a type travels as JSON, with a type that no browser reads as a page."""
    run = make_view_run(tmp_path, name="a<b>&c")
    with served(open_page(str(run), RunConfig(), tmp_path / "out")) as client:
        assert client.post("do", {"kind": "type", "new": {"name": EVIL, "color": "#112233"}})[0] == 200
        _, content, headers = client.ask("state")
        assert headers["Content-Type"] == "application/json"
        assert json.loads(content)["types"][-1]["name"] == EVIL
        assert client.get("slide")["slide"] == "a<b>&c.png"
        page = client.ask("")[1].decode()
        assert EVIL not in page
        assert "a<b>" not in page
        modules = [client.ask(name)[1].decode() for name in MODULES]
        assert len(modules) > 5
        assert ".innerHTML" not in "".join(modules)


# --- clicks ---------------------------------------------------------------------------------------------------------------------------


def clicked(client: Client) -> dict[str, Any]:
    """Three clicks of two types and one against; the state then."""
    for kind, column in (("tumour", 0), ("immune", 1), ("stroma", 2)):
        status, state = client.click(kind, centre(column))
        assert status == 200, state
    status, state = client.click("tumour", centre(4, 3), negative=True)
    assert status == 200, state
    return state


@pytest.mark.parametrize("here", [100_000, 0], ids=["in this process", "in a process of its own"])
def test_apply_is_wsiseg_type_byte_for_byte(
    client: Client, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: int
) -> None:
    """What the page shows before, what Apply writes and what `wsiseg type` writes are the same; seeds.json is what was clicked."""
    monkeypatch.setattr("wsiseg.viewer.applying.TYPED_HERE", here)
    clicked(client)
    before = client.get("counts")
    assert before["whole"]
    content = client.ask(f"types?x0=0&y0=0&x1={WIDTH}&y1={HEIGHT}")[1]
    count, total, whole = np.frombuffer(content, "<u4", 3)
    assert (count, total, whole) == (2000, 2000, 1)
    rows, codes = np.frombuffer(content, "<u4", count, 12), np.frombuffer(content, "u1", count, 12 + 4 * count)
    assert (np.bincount(codes, minlength=4)[1:] > 500).all()
    other = tmp_path / "other"
    other.mkdir()
    for name in ("cells.parquet", "manifest.json"):
        (other / name).write_bytes((run / name).read_bytes())
    assert client.post("apply", {})[0] == 200
    state = client.wait(lambda state: not state["applying"])
    assert state["applyError"] == ""
    assert state["applied"]
    assert client.get("counts") | {"warnings": []} == before | {"warnings": []}
    seeds = read_seeds(run / "seeds.json")
    assert [kind.points for kind in seeds.types] == [(tuple(centre(k)),) for k in range(3)]
    assert seeds.types[0].negative == (tuple(centre(4, 3)),)
    (tmp_path / "copy.json").write_bytes((run / "seeds.json").read_bytes())
    type_run(other, seeds=tmp_path / "copy.json")
    for name in ("cells.parquet", "bank.safetensors"):
        assert (run / name).read_bytes() == (other / name).read_bytes(), name
    table = pq.read_table(run / "cells.parquet")
    names = np.array([kind["name"] for kind in state["kinds"]], object)
    assert (table["cell_type"].to_numpy(zero_copy_only=False)[rows] == names[codes]).all()
    assert (run / "report.html").exists()


def test_what_goes_wrong_with_apply_is_said_in_one_line(
    client: Client, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wsiseg.viewer.applying.TYPED_HERE", 0)
    clicked(client)
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"model": {"name": "x", "sha256": "0"}}))
    assert client.post("apply", {})[0] == 200
    state = client.wait(lambda state: not state["applying"])
    assert "was made with other weights" in state["applyError"]
    assert "\n" not in state["applyError"]
    assert not state["applied"]
    assert client.click("tumour", centre(3))[0] == 200


def test_undo_and_redo_and_a_cell_has_one_type(client: Client) -> None:
    clicked(client)
    status, moved = client.click("stroma", [centre(0)[0] + 3, centre(0)[1]])
    assert status == 200
    by_name = {kind["name"]: kind for kind in moved["types"]}
    assert by_name["tumour"]["points"] == []
    assert by_name["stroma"]["points"] == [centre(2), [centre(0)[0] + 3, centre(0)[1]]]
    assert client.click("stroma", centre(0))[0] == 422
    before = client.post("do", {"kind": "undo"})[1]["types"]
    assert next(k for k in before if k["name"] == "tumour")["points"] == [centre(0)]
    assert client.post("do", {"kind": "redo"})[1]["types"] == moved["types"]
    for _ in range(10):
        state = client.post("do", {"kind": "undo"})[1]
    assert not state["canUndo"]
    assert all(not kind["points"] and not kind["negative"] for kind in state["types"])
    assert client.get("counts")["counts"]["unassigned"] == 2000
    redone = client.post("do", {"kind": "redo"})[1]
    assert redone["canRedo"]
    assert client.click("immune", centre(1))[1]["canRedo"] is False


def test_a_view_of_many_cells_is_typed_alone_and_the_slide_estimated(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More cells than are typed at once: the answers say so, the clicked cells are what they were clicked as, the estimates are near."""
    for module in ("preview", "shown"):
        monkeypatch.setattr(f"wsiseg.viewer.{module}.VIEW_CELLS", 300)
    monkeypatch.setattr("wsiseg.viewer.preview.SAMPLE", 600)
    clicked(client)

    def types(x0: int, y0: int, x1: int, y1: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        content = client.ask(f"types?x0={x0}&y0={y0}&x1={x1}&y1={y1}")[1]
        count = int(np.frombuffer(content, "<u4", 1)[0])
        head = np.frombuffer(content, "<u4", 3).tolist()
        return head, np.frombuffer(content, "<u4", count, 12), np.frombuffer(content, "u1", count, 12 + 4 * count)

    head, rows, codes = types(0, 0, 300, 300)
    assert head == [225, 225, 0]
    assert (codes == rows % (WIDTH // STEP) % KINDS + 1).mean() > 0.97  # the row of the lattice has 50 cells
    assert codes[rows.tolist().index(0)] == 1
    head, rows, codes = types(0, 0, WIDTH, HEIGHT)
    assert head == [300, 2000, 0]
    assert (np.diff(rows) > 0).all()
    counts = client.get("counts")
    assert not counts["whole"]
    assert abs(sum(counts["counts"].values()) - 2000) <= 2
    assert all(abs(counts["counts"][name] - 2000 / 3) < 120 for name in ("tumour", "immune", "stroma"))
    content = client.ask(f"density?x0=0&y0=0&x1={WIDTH}&y1={HEIGHT}&columns=4&lines=4")[1]
    assert abs(int(np.frombuffer(content, "<u4", offset=16).sum()) - 2000) < 60
    assert len(client.get("review")["cells"]) == 20
    client.post("apply", {})
    assert client.wait(lambda state: not state["applying"])["applied"]
    assert client.get("counts")["whole"]
    assert types(0, 0, WIDTH, HEIGHT)[0] == [300, 2000, 1]


def test_a_click_beside_every_cell_is_refused_with_the_nearest(client: Client, run: Path) -> None:
    (run.parent / "x").touch()
    status, answer = client.click("tumour", [WIDTH + 300.0, 10])
    assert status == 422
    assert "no cell at [1300, 10]" in answer["error"]
    assert "nearest" in answer["error"]


def test_review_gives_the_least_certain_cells_and_takes_a_verdict(client: Client) -> None:
    clicked(client)
    found = client.get("review")
    margins = [cell["margin"] for cell in found["cells"]]
    assert margins == sorted(margins)
    assert len(margins) == 20
    cell = found["cells"][0]
    assert shapely.Polygon(cell["ring"]).contains(shapely.Point(cell["point"]))
    name = client.get("state")["kinds"][cell["kind"]]["name"]
    status, state = client.post("do", {"kind": "click", "type": name, "point": cell["point"], "seen": True})
    assert status == 200
    assert state["seen"] == 1
    again = client.get("review")
    assert cell["row"] not in [other["row"] for other in again["cells"]]
    skipped = again["cells"][0]
    assert client.post("do", {"kind": "seen", "row": skipped["row"], "version": again["version"]})[1]["seen"] == 2
    assert skipped["row"] not in [other["row"] for other in client.get("review")["cells"]]
    only = client.get("review?type=stroma")
    assert {client.get("state")["kinds"][cell["kind"]]["name"] for cell in only["cells"]} == {"stroma"}


def test_regions_are_what_roi_reads(client: Client, run: Path) -> None:
    ring = [[100, 100], [400, 100], [400, 300.5]]
    assert client.post("do", {"kind": "region", "add": ring})[0] == 200
    status, answer = client.post("save", {})
    assert status == 200
    assert answer["written"] == [str(run / "regions.geojson")]  # nothing was clicked
    info = SlideInfo(
        path="slide.png", reader="image", format="png", level_sizes=((WIDTH, HEIGHT),), downsamples=(1.0,), mpp=0.5, mpp_source="--mpp"
    )  # fmt: skip
    region, warnings = read_regions(run / "regions.geojson", info)
    assert shapely.equals(region, shapely.Polygon(ring))
    assert not warnings
    assert client.post("do", {"kind": "region", "drop": 0})[1]["regions"] == []


def test_density_counts_every_cell_once(client: Client) -> None:
    clicked(client)
    content = client.ask(f"density?x0=0&y0=0&x1={WIDTH}&y1={HEIGHT}&columns=10&lines=8")[1]
    types, lines, columns, _ = np.frombuffer(content, "<u4", 4)
    counts = np.frombuffer(content, "<u4", offset=16).reshape(types, lines, columns)
    assert counts.sum() == 2000
    assert (counts.sum(0) == 25).all()
    some = client.ask(f"density?x0=0&y0=0&x1={WIDTH}&y1={HEIGHT}&columns=10&lines=8&score=2")[1]
    assert np.frombuffer(some, "<u4", offset=16).sum() < 2000


# --- nothing is lost, nothing is written elsewhere ------------------------------------------------------------------------------------


def test_nothing_is_written_outside_the_folder_of_the_run(client: Client, run: Path) -> None:
    before = files_below(run.parent) - files_below(run)
    clicked(client)
    client.post("do", {"kind": "region", "add": [[0, 0], [9, 0], [9, 9]]})
    client.post("save", {})
    client.post("apply", {})
    client.wait(lambda state: not state["applying"])
    outside = {name for name in files_below(run.parent) if not name.startswith("run/")}
    assert outside == {name for name in before if not name.startswith("run/")} == {"slide.png"}
    assert {"view.json", "seeds.json", "regions.geojson"} <= files_below(run)


def test_the_folder_of_the_slide_may_be_read_only(run: Path) -> None:
    """A change of its time would show a file that was there for a moment, also to root, whom the permissions do not bind."""
    slides = run.parent / "slides"
    slides.mkdir()
    slide = (run.parent / "slide.png").rename(slides / "slide.png")
    slide.chmod(0o444)
    slides.chmod(0o555)
    before = [(path.stat().st_mtime_ns, path.stat().st_size) for path in (slides, slide)]
    try:
        with served(open_page(str(run), RunConfig(), run.parent / "out", slide=slide)) as client:
            clicked(client)
            assert client.ask("tile/0/0/0")[0] == 200
            assert client.post("save", {})[0] == 200
            assert client.post("apply", {})[0] == 200
            assert client.wait(lambda state: not state["applying"])["applied"]
        assert [(path.stat().st_mtime_ns, path.stat().st_size) for path in (slides, slide)] == before
    finally:
        slides.chmod(0o755)


def test_clicks_survive_the_end_of_the_server(run: Path) -> None:
    """Undone changes too; the palette of a first visit is not made again."""
    with served(open_page(str(run), RunConfig(), run.parent)) as client:
        state = clicked(client)
        client.post("do", {"kind": "undo"})
    with served(open_page(str(run), RunConfig(), run.parent)) as client:
        assert client.get("state")["canRedo"]
        assert client.post("do", {"kind": "redo"})[1]["types"] == state["types"]


def test_seeds_given_on_the_command_line_can_be_undone(run: Path, tmp_path: Path) -> None:
    seeds = tmp_path / "s.json"
    seeds.write_text(json.dumps({"version": 1, "types": [{"name": "other", "points": [centre(5)]}]}))
    with served(open_page(str(run), RunConfig(), run.parent)) as client:
        clicked(client)
    with served(open_page(str(run), RunConfig(), run.parent, seeds=seeds)) as client:
        assert [kind["name"] for kind in client.get("state")["types"]] == ["other"]
        undone = client.post("do", {"kind": "undo"})[1]["types"]
        assert [kind["name"] for kind in undone] == ["tumour", "immune", "stroma"]
        assert undone[0]["points"] == [centre(0)]


def test_a_second_page_on_the_folder_is_refused_and_the_first_goes_on(client: Client, run: Path) -> None:
    clicked(client)
    with pytest.raises(RunError, match=r"is open on another click page \(.*process \d+\); use that one"):
        open_page(str(run), RunConfig(), run.parent)
    assert client.click("tumour", centre(3))[0] == 200


def test_two_windows_on_one_server_see_the_same(client: Client) -> None:
    """Changes are carried out in turn, none is lost, and a window that asks sees them all."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda k: client.click("tumour", centre(3 * (k % 10), k // 10 + 5))[0], range(40)))
    assert answers == [200] * 40
    state = client.get("state")
    assert len(state["types"][0]["points"]) == 40
    assert state["revision"] == 41


def session_file(**parts: object) -> str:
    return json.dumps({"version": 1, "slide": "slide.png", "done": 0, "changes": []} | parts)


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", "null", session_file(version=2), session_file(slide="other.png"), session_file(done=3),
        session_file(done=1, changes=[{"kind": "x"}]), session_file(done=1, changes=[7]),
    ],
)  # fmt: skip
def test_a_damaged_session_is_said_in_one_line_and_left_alone(run: Path, content: str) -> None:
    (run / "view.json").write_text(content)
    with pytest.raises(FormatError) as error:
        open_page(str(run), RunConfig(), run.parent)
    assert "\n" not in str(error.value)
    assert "view.json" in str(error.value)
    assert (run / "view.json").read_text() == content


def test_a_table_replaced_by_another_process_is_taken(client: Client, run: Path, tmp_path: Path) -> None:
    """`wsiseg type` from a terminal: the page shows its types; what was shown before stays readable until then."""
    old = client.get("state")["cells"]["version"]
    seeds = tmp_path / "s.json"
    seeds.write_text(
        json.dumps({"version": 1, "types": [{"name": n, "points": [centre(k)]} for k, n in enumerate("abc")]})
    )
    type_run(run, seeds=seeds)
    time.sleep(0.6)
    state = client.wait(lambda state: state["cells"]["version"] != old)
    assert client.ask(f"outlines/{old}/0/0")[0] == 404
    assert {kind["name"] for kind in state["kinds"]} == {"unassigned", "tumour", "immune", "stroma", "a", "b", "c"}
    assert client.get("counts")["counts"]["a"] > 500


def test_a_moved_slide_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "slide.png").rename(tmp_path / "there.png")
    with pytest.raises(Exception, match="pass --slide FILE"):
        open_page(str(run), RunConfig(), tmp_path)
    with served(open_page(str(run), RunConfig(), tmp_path, slide=tmp_path / "there.png")) as client:
        assert client.ask("tile/0/0/0")[0] == 200


# --- the process ----------------------------------------------------------------------------------------------------------------------


class Browser:
    """Stands for a browser: keeps what it was asked to open on its command line while that is there."""

    def __init__(self, folder: Path) -> None:
        self.script, self._asked = folder / "browser.sh", folder / "asked"
        self.script.write_text(
            f'#!/bin/sh\nexec > /dev/null 2>&1\necho "$1" > {self._asked}.new\nmv {self._asked}.new {self._asked}\n'
            'for k in $(seq 200); do [ -e "${1#file://}" ] || exit; sleep 0.1; done\n'
        )
        self.script.chmod(0o755)

    def asked(self) -> str:
        end = time.monotonic() + 20
        while not self._asked.exists():
            assert time.monotonic() < end
            time.sleep(0.02)
        return self._asked.read_text().strip()


@contextmanager
def started(*arguments: object, browser: Browser | None = None) -> Iterator[tuple[subprocess.Popen[str], Client]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "wsiseg", "view", *map(str, arguments), *(["--no-browser"] if browser is None else [])],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | {"BROWSER": f"{browser.script if browser else 0} %s"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("http://127.0.0.1:"), process.stderr.read() if process.stderr else ""
        port, token = line.removeprefix("http://127.0.0.1:").strip("/\n").split("/")
        yield process, Client(int(port), token)
    finally:
        process.kill()
        process.communicate()


def test_kill_9_in_the_middle_of_saving_loses_nothing(run: Path) -> None:
    """Clicks and saves stream in while the process is killed: every click that was answered is there, both files are whole, seeds.json has the
    clicks of one moment, and the page opens again."""
    answered: list[int] = []
    saved: list[int] = []
    with started(run) as (process, client):

        def save() -> None:
            for _ in range(2000):
                try:
                    if client.post("save", {})[0] == 200:
                        saved.append(len(answered))
                except (OSError, http.client.HTTPException):
                    return

        def stream() -> None:
            for k in range(400):
                try:
                    if client.click("tumour", centre(3 * (k % 16), k // 16))[0] == 200:
                        answered.append(k)
                except (OSError, http.client.HTTPException):
                    return

        threads = [threading.Thread(target=work) for work in (stream, save)]
        for thread in threads:
            thread.start()
        while len(answered) < 25 or len(saved) < 5:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        process.wait()
    session = Session.open(run / "view.json", "slide.png")
    assert session is not None
    kept = session.state.types[0].points
    assert [tuple(centre(3 * (k % 16), k // 16)) for k in answered] == list(kept[: len(answered)])
    assert len(kept) <= len(answered) + 1  # one may have been written and not answered
    points = read_seeds(run / "seeds.json").types[0].points
    assert points == kept[: len(points)]
    assert len(points) >= saved[-2]  # clicks answered before the last whole save but one
    with served(open_page(str(run), RunConfig(), run.parent)) as client:
        assert len(client.get("state")["types"][0]["points"]) == len(kept)


def test_the_command_from_its_start_to_its_end(
    run: Path, tmp_path: Path, wsiseg: Callable[..., tuple[int, str]]
) -> None:
    """The browser is led to the page by a file of the user's own; a second command is refused in one line; Ctrl-C ends in order."""
    browser = Browser(tmp_path)
    with started(run, browser=browser) as (process, client):
        asked = browser.asked()
        assert asked == (run / "view.html").as_uri()
        assert (run / "view.html").stat().st_mode & 0o777 == 0o600
        assert f"http://127.0.0.1:{client.port}/{client.token}/" in (run / "view.html").read_text()
        assert client.click("tumour", centre(0))[0] == 200
        status, output = wsiseg("view", run, "--no-browser")
        assert (status, output.count("\n")) == (1, 1)
        assert re.search(rf"is open on another click page \(.*process {process.pid}\b.*\); use that one", output)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "your clicks are kept" in err
    assert "ssh -L" in err
    assert "Traceback" not in out + err
    assert not (run / "parts" / "view.claim").exists()
    assert not (run / "view.html").exists()


@pytest.mark.skipif(not hasattr(os, "fork") or os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_of_the_machine_finds_no_way_in(template: Path) -> None:
    """What user 65534 can read of the run, of the process and of all command lines holds no token; without it every request is refused."""
    with tempfile.TemporaryDirectory() as temporary:  # pytest's own folders are closed to others
        run = copied(template, Path(temporary))
        for path in (run.parent, run):
            path.chmod(0o755)
        browser = Browser(run.parent)
        with started(run, browser=browser) as (process, client):
            assert client.click("tumour", centre(0))[0] == 200
            assert browser.asked().endswith("view.html")
            found = as_user(65534, lambda: looked_around(run, process.pid, client.port))
    assert client.token not in json.dumps(found)
    assert "tumour" in found["files"]["view.json"]  # what others may read, by the user's own umask, they do read
    assert found["files"]["view.html"] == "PermissionError"
    assert "view.html" in found["commands"]
    assert found["environment"] == found["memory"] == found["written"] == "PermissionError"
    assert set(found["answers"]) == {403}


def as_user(number: int, act: Callable[[], Any]) -> Any:
    """What ``act`` returns, in a child process that belongs to a user."""
    readable, writable = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads: the child only reads files
        child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(number)
            os.setuid(number)
            os.write(writable, json.dumps(act()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as answer:
        content = answer.read()
    os.waitpid(child, 0)
    return json.loads(content)


def looked_around(run: Path, pid: int, port: int) -> dict[str, Any]:
    """What a process sees of a page: the files of its run, command lines, its environment, answers without a token."""

    def content(path: Path, mode: str = "rb") -> str:
        try:
            with path.open(mode) as file:
                return file.read().decode("latin-1") if "r" in mode else ""
        except OSError as error:
            return type(error).__name__

    files = {str(path.relative_to(run)): content(path)[:200_000] for path in run.rglob("*") if path.is_file()}
    answers = [
        Client(port, token).ask(path, method, raw=raw)[0]
        for token, path, method, raw in (
            ("x", "state", "GET", False),
            ("", "/", "GET", True),
            ("x", "do", "POST", False),
        )
    ]
    return {
        "files": {name: text for name, text in files.items() if name.endswith((".json", ".html", ".claim"))},
        "commands": "\n".join(content(path / "cmdline") for path in Path("/proc").glob("[0-9]*")),
        "environment": content(Path(f"/proc/{pid}/environ")),
        "memory": content(Path(f"/proc/{pid}/mem")),
        "written": content(run / "view.json", "ab"),
        "answers": answers,
    }


def test_wrong_arguments_end_in_one_line(wsiseg: Callable[..., tuple[int, str]], tmp_path: Path, run: Path) -> None:
    for arguments in (
        [tmp_path / "nowhere.svs"],
        [tmp_path],
        [run, "--seeds", tmp_path / "nowhere.json"],
        [run, "--seeds", run / "cells.parquet"],
        [tmp_path / "slide.png"],  # no mpp
        [tmp_path / "slide.png", "--slide", tmp_path / "slide.png"],
    ):
        status, output = wsiseg("view", *arguments, "--no-browser", "--out", tmp_path / "out")
        assert status == 1, arguments
        assert output.count("\n") == 1, output
        assert output.startswith("Error: "), output
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, output = wsiseg("view", run, "--no-browser", "--port", taken.getsockname()[1])
    assert status == 1
    assert "--port" in output
    assert not (run / "parts" / "view.claim").exists()


def test_a_run_in_progress_is_not_applied_to(client: Client, run: Path) -> None:
    """`wsiseg run --overwrite` has begun on the folder: the cells stay shown, clicks are taken, Apply says why not."""
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    (run / "cells.parquet").unlink()
    state = clicked(client)
    assert state["cells"]["count"] == 2000
    assert client.ask(f"outlines/{state['cells']['version']}/0/0")[0] == 200
    status, answer = client.post("apply", {})
    assert status == 409
    assert "not segmented to its end" in answer["error"]


# --- a slide without a run ------------------------------------------------------------------------------------------------------------


SMALL_BLOCKS = RunConfig(
    stain="ihc", method="apg", formats=("parquet",), tiling=TilingConfig(tile_um=128, block_tiles=1), device="cpu"
)


@pytest.fixture(scope="module")
def demo_run(demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo slide as `wsiseg run` makes it, in blocks of one tile."""
    out = tmp_path_factory.mktemp("plain")
    segment_slide(demo[0], SMALL_BLOCKS, out)
    return out / "ihc"


def test_blocks_in_view_are_segmented_into_the_run_that_others_complete(
    demo: tuple[Path, Path], demo_run: Path, tmp_path: Path
) -> None:
    """First the middle of the view; what was done is not done again, and the finished run is that of `wsiseg run`, byte for byte."""
    with served(open_page(str(demo[0]), SMALL_BLOCKS, tmp_path)) as client:
        state = client.get("state")
        assert state["cells"] is None
        assert state["segmenting"]["blocks"] == 4
        assert client.click("tumour", [67, 82])[0] == 409  # nothing is outlined yet
        assert client.post("segment", {"x0": 0, "y0": 0, "x1": 200, "y1": 200})[0] == 200
        state = client.wait(lambda state: state["cells"] and state["segmenting"]["done"], 60)
        assert state["segmenting"]["done"] == 1
        assert [p.name for p in (tmp_path / "ihc/parts").glob("*.parquet")] == ["0000-0000.parquet"]
        first = state_of(tmp_path / "ihc/parts/0000-0000.parquet")
        assert client.click("tumour", [67, 82])[0] == 200
        assert client.get("counts")["counts"]["tumour"] > 20
        assert client.click("tumour", [433, 330])[0] == 422  # no block is done yet
        assert "not segmented to its end" in client.post("apply", {})[1]["error"]
    assert json.loads((tmp_path / "ihc/manifest.json").read_text())["status"] == "interrupted"
    with served(open_page(str(demo[0]), SMALL_BLOCKS, tmp_path)) as client:  # after a break
        assert client.wait(lambda state: state["cells"], 60)["types"][0]["points"] == [[67, 82]]
        assert client.post("segment", {"all": True})[0] == 200
        client.wait(lambda state: state["segmenting"] is None, 120)
        assert client.get("counts")["cells"] == len(pq.read_table(demo_run / "cells.parquet"))
        assert client.post("apply", {})[0] == 200
        assert client.wait(lambda state: not state["applying"])["applied"]
    assert state_of(tmp_path / "ihc/parts/0000-0000.parquet") == first
    (tmp_path / "plain").mkdir()
    for name in ("cells.parquet", "manifest.json"):
        (tmp_path / "plain" / name).write_bytes((demo_run / name).read_bytes())
    type_run(tmp_path / "plain", seeds=tmp_path / "ihc/seeds.json")
    assert (tmp_path / "ihc/cells.parquet").read_bytes() == (tmp_path / "plain/cells.parquet").read_bytes()


def test_tiles_are_shown_before_their_block_is_done(
    demo: tuple[Path, Path], demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A click on one of their cells holds when the block is written, and the block's cells are those of smaller blocks."""
    one_block = dataclasses.replace(SMALL_BLOCKS, tiling=TilingConfig(tile_um=128, block_tiles=2))
    looked = threading.Event()
    monkeypatch.setattr(blocks, "write_part", lambda *part: looked.wait(60) and write_part(*part))
    with served(open_page(str(demo[0]), one_block, tmp_path)) as client:
        client.post("segment", {"x0": 0, "y0": 0, "x1": 512, "y1": 512})
        state = client.wait(lambda state: state["cells"], 60)
        assert state["segmenting"]["done"] == 0
        assert 1 <= state["segmenting"]["early"] <= state["segmenting"]["each"] == 4
        assert not list((tmp_path / "ihc/parts").glob("*.parquet"))
        assert client.click("tumour", [67, 82])[0] == 200
        looked.set()
        every = len(pq.read_table(demo_run / "cells.parquet"))
        state = client.wait(lambda state: state["segmenting"]["done"] == 1 and state["cells"]["count"] == every, 60)
        assert state["types"][0]["points"] == [[67, 82]]
        assert client.get("counts")["counts"]["tumour"] > 20


def test_a_view_while_a_run_works_on_the_slide(demo: tuple[Path, Path], demo_run: Path, tmp_path: Path) -> None:
    """Both work on one folder, neither waits for the other for ever, and the files are those of one alone."""
    with served(open_page(str(demo[0]), SMALL_BLOCKS, tmp_path)) as client:
        client.post("segment", {"x0": 0, "y0": 0, "x1": 512, "y1": 512})
        manifest = segment_slide(demo[0], SMALL_BLOCKS, tmp_path)
        assert manifest.status == "complete"
        state = client.wait(lambda state: state["segmenting"] is None, 60)
        assert state["cells"]["count"] == manifest.counts["cells"]
    assert (tmp_path / "ihc/cells.parquet").read_bytes() == (demo_run / "cells.parquet").read_bytes()
    assert json.loads((tmp_path / "ihc/manifest.json").read_text())["status"] == "complete"


def test_a_large_slide_is_read_once_for_its_overview() -> None:
    """A slide of one level only: the far zooms come from an overview that is read in the background, and show the same picture."""
    pixels = np.full((600, 9000, 3), 240, np.uint8)
    pixels[:, 4500:] = (120, 40, 160)
    with ArrayReader(pixels, 0.5) as reader:
        tiles = SlideTiles(reader)
        assert tiles.zooms == 6
        assert tiles.tile(5, 0, 0) is None
        end = time.monotonic() + 20
        while tiles.version == 0:
            assert time.monotonic() < end
            time.sleep(0.02)
        shown = np.asarray(Image.open(io.BytesIO(tiles.tile(5, 0, 0) or b"")))
    assert shown.shape == (19, 282, 3)
    assert abs(int(shown[9, 50].mean()) - 240) < 4
    assert abs(int(shown[9, 230, 0]) - 120) < 6
