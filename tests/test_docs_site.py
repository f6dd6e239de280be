"""The documentation as a site: it is built without a warning, every link and anchor leads somewhere, and nothing is asked of other hosts."""

from __future__ import annotations

import http.server
import importlib.util
import os
import re
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytest.importorskip("mkdocs")
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", ROOT / "mkdocs.yml", "--site-dir", folder],
        capture_output=True, text=True, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_every_page_command_and_public_name_is_on_it(site: Path) -> None:
    import wsiseg
    from wsiseg.cli import COMMANDS

    for page in (ROOT / "docs").glob("*.md"):
        assert (site / (page.stem if page.stem != "index" else "") / "index.html").is_file(), page
    commands = (site / "commands" / "index.html").read_text()
    assert all(f">wsiseg {name}" in commands for name in COMMANDS)
    python = (site / "python" / "index.html").read_text()
    homes = {name: getattr(wsiseg, name).__module__ for name in wsiseg.__all__ if name != "__version__"}
    assert all(f'id="{home}.{name}"' in python for name, home in homes.items())
    assert ":class:" not in re.sub(r"<code>.*?</code>", "", python, flags=re.DOTALL)


def test_links_to_results_and_code_lead_to_pages_of_the_site(site: Path) -> None:
    methods = (site / "methods" / "index.html").read_text()
    assert (site / "benchmarks" / "results" / "cop" / "index.html").is_file()
    assert "../benchmarks/results/cop/" in methods
    config = site / "source" / "wsiseg" / "config.py" / "index.html"
    assert "class" in config.read_text()
    assert "../source/wsiseg/config.py/" in methods


def test_notebooks_are_pages_with_their_figures(site: Path) -> None:
    for name in ("region", "cohort"):
        page = (site / "examples" / name / "index.html").read_text()
        assert re.search(r'<img alt="[A-Z][^"]{20,}" src="data:image/png;base64,', page)
    assert 'href="../../report/#a-table-of-a-cohort"' in page


def test_pages_show_the_tables_of_the_benchmarks(site: Path) -> None:
    for page, results in (("accuracy", "accuracy"), ("performance", "outputs")):
        text = re.sub(r"<[^>]+>", " ", (site / page / "index.html").read_text())
        rows = [row for row in (ROOT / f"benchmarks/results/{results}.md").read_text().splitlines() if row[:2] == "| "]
        for row in (rows[0], rows[-1]):
            assert " ".join(row.replace("|", " ").split()) in " ".join(text.split())


def test_figures_are_drawn_by_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some ten seconds, most of them a run on the demo slide: nothing else notices when a figure can no longer be made."""
    pytest.importorskip("matplotlib")
    from PIL import Image

    monkeypatch.setenv("MPLBACKEND", "Agg")
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs" / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    monkeypatch.setattr(figures, "PICTURES", tmp_path)
    figures.main(["cells", "apg", "cop"])
    for name in ("start-cells.jpg", "how-apg.jpg", "how-cop.jpg"):
        with Image.open(tmp_path / name) as made, Image.open(ROOT / "docs" / "pictures" / name) as shown:
            assert made.size == shown.size


def test_nothing_is_requested_from_other_hosts(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r'<(?:script|link|img|iframe|source)[^>]+(?:src|href)="(https?:)?//', page.read_text())
        assert not loaded, page


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
        """Say nothing."""


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("page", ["", "start/", "seeds/", "examples/region/"])
def test_pages_are_accessible_at_every_width(check_page: Callable[[str, str], None], address: str, page: str) -> None:
    check_page(address + page, f"docs-{page.strip('/').replace('/', '-') or 'home'}")
