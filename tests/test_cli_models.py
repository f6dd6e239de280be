"""``wsiseg models``: import, list, show, verify, and what each says when it cannot."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

import pytest
import torch

from wsiseg.models import download as downloads
from wsiseg.models.registry import DOWNLOADS
from wsiseg.models.sam.checkpoints import Architecture
from wsiseg.models.testing import random_sam

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A training checkpoint with what is looked at of a small SAM."""
    sam = random_sam(
        Architecture(dim=16, depth=4, heads=2, global_blocks=(1, 3), window=3, grid=8, patch=16)
    ).state_dict()
    torch.save({"model_state": {f"sam.{key}": value for key, value in sam.items()}, "epoch": 3}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def test_import_list_show_verify(checkpoint: Path, folder: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    status, said = wsiseg(
        "models",
        "import",
        checkpoint,
        "--name",
        "mine",
        "--mpp",
        0.125,
        "--licence",
        "MIT",
        "--normalise",
        "tile-minmax",
    )
    assert status == 0
    assert "Note: left out of best.pt: epoch" in said
    rows = dict(line.split(": ", 1) for line in said.splitlines() if not line.startswith("Note"))
    assert rows == {
        "name": "mine",
        "architecture": "ViT of width 16 and depth 4",
        "takes": "points, boxes",
        "instance decoder": "no",
        "mpp": "0.125",
        "tile": "128 x 128 px, 16 x 16 um",
        "memory": "about 0.5 GB on the CPU, a tile at a time",
        "normalise": "tile-minmax",
        "licence": "MIT",
        "source": str(checkpoint),
        "weights": str(folder / "mine.safetensors"),
        "sha256": rows["sha256"],
    }
    status, said = wsiseg("models", "show", "mine")
    assert (status, rows) == (0, dict(line.split(": ", 1) for line in said.splitlines()))
    status, said = wsiseg("models", "list")
    assert status == 0
    lines = {line.split()[0]: line for line in said.splitlines()}
    assert lines["mine"].endswith("imported")
    assert lines["nuclei-compact"].endswith("in the package")
    assert lines["sam-vit-b"].endswith("to download")
    cells = {name: re.split("  +", line) for name, line in lines.items()}
    assert cells["sam-vit-b"][2:5] == ["points, boxes", "256", "0.25"]
    assert cells["vit-b-histopathology"][2:5] == ["points, boxes, maps", "128", "0.125"]
    assert cells["nuclei-compact"][2:5] == ["points, boxes, text, maps", "any", "0.25"]
    assert cells["sam2.1-hiera-tiny"][2:] == ["points, boxes", "128", "0.125", "Apache-2.0", "to get from the hub"]
    assert cells["sam3"][2:5] == ["points, boxes, text, exemplars", "126", "0.125"]
    assert wsiseg("models", "verify") == (0, "nuclei-compact: OK\nmine: OK\n")
    assert wsiseg("models", "verify", "mine") == (0, "mine: OK\n")


def test_verify_finds_damage(checkpoint: Path, folder: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    """A line for each damaged model, after which the others are looked at all the same."""
    for name in ("a", "b", "c"):
        assert wsiseg("models", "import", checkpoint, "--name", name)[0] == 0
    (folder / "a.safetensors").write_bytes(b"")
    (folder / "b.safetensors").unlink()
    status, said = wsiseg("models", "verify")
    assert status == 1
    assert said.splitlines()[0] == "nuclei-compact: OK"
    assert f"Error: {folder / 'a.safetensors'}: sha256 differs from the card of a" in said
    assert f"Error: {folder / 'b.safetensors'}: the weights of b are missing" in said
    assert "c: OK" in said


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (("import", "absent.pt", "--name", "a"), 1, "absent.pt: no such file; check the path"),
        (("import", "{checkpoint}", "--name", "A"), 1, "name 'A': not allowed"),
        (("import", "{checkpoint}", "--name", "a", "--mpp", "9"), 1, "mpp 9: must lie between 0.05 and 2"),
        (("import", "{checkpoint}", "--name", "a", "--mpp", "nan"), 1, "mpp nan: must lie between 0.05 and 2"),
        (("import", "{checkpoint}", "--name", "nuclei-compact"), 1, "belongs to a model of the package"),
        (
            ("import", "{checkpoint}", "--name", "a", "--decoder", "{checkpoint}"),
            1,
            "given as a decoder, but it holds a SAM model",
        ),
        (("import", "{checkpoint}"), 2, "Missing option '--name'"),
        (("import", "{checkpoint}", "--name", "a", "--normalise", "x"), 2, "Invalid value for '--normalise'"),
        (("show", "absent"), 1, "absent: no such model here; models here: nuclei-compact"),
        (("verify", "absent"), 1, "absent: no such model here"),
        (("download", "absent"), 1, "absent: no download of this name"),
        (("download", "vit-h-histopathology"), 1, "vit-h-histopathology: no sha256 of it is published"),
        (
            ("download", "sam2.1-hiera-large"),
            1,
            "`hf download facebook/sam2.1-hiera-large --exclude '*.pt' --local-dir sam2.1-h",
        ),
        (
            ("download", "sam3"),
            1,
            "accept its licence at https://huggingface.co/facebook/sam3, `hf auth login`, then `hf download",
        ),
        (("show", "sam3"), 1, "sam3: not downloaded yet; how to get it is said by `wsiseg models download sam3`"),
    ],
)
def test_refusals(
    arguments: tuple[str, ...],
    status: int,
    sentence: str,
    checkpoint: Path,
    folder: Path,
    wsiseg: Callable[..., tuple[int, str]],
) -> None:
    found, said = wsiseg("models", *(a.format(checkpoint=checkpoint) for a in arguments))
    assert found == status
    errors = [line for line in said.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1
    assert sentence in errors[0]
    assert not list(folder.glob("*"))


def test_overwrite(checkpoint: Path, folder: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    command = ("models", "import", checkpoint, "--name", "a")
    assert wsiseg(*command)[0] == 0
    status, said = wsiseg(*command)
    assert status == 1
    assert "a model of this name already exists; choose another name, or pass --overwrite" in said
    assert wsiseg(*command, "--overwrite")[0] == 0


def test_a_malicious_file(tmp_path: Path, folder: Path, wsiseg: Callable[..., tuple[int, str]]) -> None:
    class Call:
        def __reduce__(self) -> tuple[object, ...]:
            return os.system, (f"touch {tmp_path / 'MARKER'}",)

    torch.save({"model_state": {"image_encoder.pos_embed": torch.ones(1)}, "init": Call()}, tmp_path / "bad.pt")
    status, said = wsiseg("models", "import", tmp_path / "bad.pt", "--name", "bad")
    assert status == 1
    assert (
        "bad.pt: asks to run os.system, which no weight file needs; it was not run; get the file from a source you trust"
        in said
    )
    assert not (tmp_path / "MARKER").exists()


def test_download_reports(
    checkpoint: Path, folder: Path, wsiseg: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command passes name and --overwrite on, and shows the card."""
    content = checkpoint.read_bytes()

    def fetch(address: str, part: Path, on_progress: Callable[[int, int], None]) -> None:
        assert address == DOWNLOADS["sam-vit-b"].address
        part.write_bytes(content)
        on_progress(len(content), 0)

    monkeypatch.setattr(downloads, "_fetch", fetch)
    status, said = wsiseg("models", "download", "sam-vit-b")
    assert status == 1
    assert "sha256 differs from the published one" in said
    monkeypatch.setattr(downloads, "file_hash", lambda _: DOWNLOADS["sam-vit-b"].sha256)
    status, said = wsiseg("models", "download", "sam-vit-b")
    assert status == 0
    assert "source: https://dl.fbaipublicfiles.com/segment_anything/sam_vit_b_01ec64.pth" in said
    assert wsiseg("models", "download", "sam-vit-b")[0] == 1
    assert wsiseg("models", "download", "sam-vit-b", "--overwrite")[0] == 0
