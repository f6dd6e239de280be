"""Shared fixtures: the folder of real data (skipped when absent), a model that answers with discs, and small synthetic slides."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

SHARED = Path(__file__).resolve().parents[2] / "shared"


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
