"""The user's models: what is imported comes back whole or not at all; downloads go on where they broke, and are checked."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import pkgutil
import resource
import subprocess
import sys
import threading
from functools import cache, partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsiseg.errors import ConfigError, WeightsError
from wsiseg.models import find_weights, store
from wsiseg.models.catalogue import catalogue, known_card, verify, verify_all
from wsiseg.models.download import download
from wsiseg.models.registry import DOWNLOADS, MODELS, SAM_NETWORK, WEIGHTS_FOLDER, Download
from wsiseg.models.sam.checkpoints import Architecture, read_checkpoint
from wsiseg.models.sam.instance_decoder import InstanceDecoder
from wsiseg.models.store import card_of_file, find_card, import_model, models_folder, stored_cards, stored_names
from wsiseg.models.testing import random_sam

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@cache
def networks() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A whole SAM with a small encoder, and a small instance decoder."""
    small = Architecture(dim=16, depth=4, heads=2, global_blocks=(1, 3), window=3, grid=8, patch=16)
    return dict(random_sam(small).state_dict()), dict(InstanceDecoder(16).state_dict())


def tiny_sam() -> dict[str, Tensor]:
    return dict(networks()[0])


def tiny_decoder() -> dict[str, Tensor]:
    return dict(networks()[1])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.save(tiny_sam(), tmp_path / "sam.pt")
    return tmp_path / "sam.pt"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder; not yet there."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path / "models"))
    return tmp_path / "models"


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


# Importing


def test_import_there_and_back(tmp_path: Path, folder: Path) -> None:
    """Tensors, scale, licence: as given, in one precision; half precision, shared numbers and odd strides too."""
    sam = tiny_sam()
    base = torch.arange(256, dtype=torch.float32)
    norms = "mask_decoder.transformer.layers.0.norm1.weight", "mask_decoder.transformer.layers.0.norm2.weight"
    odd = {norms[0]: base, norms[1]: base, "prompt_encoder.no_mask_embed.weight": base.half()[None]}
    key = "mask_decoder.transformer.layers.0.self_attn.q_proj.weight"
    sam |= odd | {key: sam[key].T.contiguous().T}
    decoder = tiny_decoder()
    torch.save(sam, tmp_path / "a.pt")
    torch.save(decoder, tmp_path / "d.pt")
    card = import_model(
        tmp_path / "a.pt",
        "my-sam",
        decoder=tmp_path / "d.pt",
        mpp=0.125,
        licence="MIT",
        source="here",
        normalise="tile-minmax",
    )
    assert files(folder) == ["my-sam.json", "my-sam.safetensors"]
    assert find_card("my-sam") == card == known_card("my-sam") == find_weights("my-sam")[0]
    assert (card.name, card.network, card.weights, card.licence, card.source) == (
        "my-sam",
        SAM_NETWORK,
        folder / "my-sam.safetensors",
        "MIT",
        "here",
    )
    assert (card.mpp, card.normalise, card.architecture, card.instance_decoder) == (
        0.125,
        "tile-minmax",
        "ViT of width 16 and depth 4",
        True,
    )
    verify(card)
    found = load_file(card.weights)
    wanted = {f"sam.{k}": v.float() for k, v in sam.items()} | {f"decoder.{k}": v for k, v in decoder.items()}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], v) and found[k].dtype == v.dtype for k, v in wanted.items())
    with safe_open(card.weights, framework="numpy") as file:
        assert json.loads(file.metadata()["wsiseg"]) == {"network": "sam", "mpp": 0.125, "normalise": "tile-minmax"}
    assert card.weights.stat().st_mode == (folder / "my-sam.json").stat().st_mode
    # what was written is a checkpoint again
    again = import_model(card.weights, "again")
    assert again.instance_decoder
    assert read_checkpoint(again.weights).sam.keys() == sam.keys()


def test_notes(tmp_path: Path, folder: Path) -> None:
    torch.save({"model_state": tiny_sam(), "epoch": 3}, tmp_path / "a.pt")
    notes: list[str] = []
    assert not import_model(tmp_path / "a.pt", "a", on_note=notes.append).instance_decoder
    assert notes == ["left out of a.pt: epoch"]


def test_a_checkpoint_that_lacks_something_is_not_imported(tmp_path: Path, folder: Path) -> None:
    sam = tiny_sam()
    del sam["mask_decoder.iou_token.weight"]
    sam["mask_decoder.more.weight"] = torch.zeros(2)
    torch.save(sam, tmp_path / "a.pt")
    wrong = r"a.pt: not weights of SAM: 1 missing \(first: sam.mask_decoder.iou_token.weight\), 1 unexpected \(first: sam.mask_decoder.more.weight\)"
    with pytest.raises(WeightsError, match=wrong):
        import_model(tmp_path / "a.pt", "a")
    assert not folder.exists()


def test_the_network_that_users_cards_name_is_there() -> None:
    """The string stands in files that we cannot change."""
    assert SAM_NETWORK == "wsiseg.models.sam:SamModel"
    assert pkgutil.resolve_name(SAM_NETWORK).__name__ == "SamModel"


def test_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("WSISEG_MODELS", raising=False)
    assert models_folder().parts[-2:] == ("wsiseg", "models")
    monkeypatch.setenv("WSISEG_MODELS", str(tmp_path))
    assert models_folder() == tmp_path
    assert stored_names() == []
    assert stored_names(tmp_path / "absent") == []


@pytest.mark.parametrize(
    ("name", "options", "sentence"),
    [
        ("../a", {}, r"name '../a': not allowed; use a-z, 0-9"),
        ("", {}, "name '': not allowed"),
        (".a", {}, "name '.a': not allowed"),
        ("A", {}, "name 'A': not allowed"),
        ("a\n", {}, r"name 'a\\n': not allowed"),
        ("nuclei-compact", {}, "name nuclei-compact: belongs to a model of the package"),
        ("a", {"mpp": 0.04}, "mpp 0.04: must lie between 0.05 and 2"),
        ("a", {"mpp": 40.0}, "mpp 40: must lie between"),
        ("a", {"mpp": float("nan")}, "mpp nan: must lie between"),
        ("a", {"mpp": float("inf")}, "mpp inf: must lie between"),
        ("a", {"normalise": "macenko"}, "normalise macenko: unknown; choose from none, tile-minmax"),
    ],
)
def test_import_refuses(name: str, options: dict[str, Any], sentence: str, checkpoint: Path, folder: Path) -> None:
    with pytest.raises(ConfigError, match=f"^{sentence}"):
        import_model(checkpoint, name, **options)
    assert files(folder) == []


def test_overwrite(tmp_path: Path, checkpoint: Path, folder: Path) -> None:
    """Only on request; and a checkpoint that is refused leaves the old model as it was."""
    first = import_model(checkpoint, "a")
    torch.save(tiny_sam(), checkpoint)
    with pytest.raises(WeightsError, match="a: a model of this name already exists; choose another"):
        import_model(checkpoint, "a")
    with pytest.raises(WeightsError, match="no such file"):
        import_model(tmp_path / "absent.pt", "a", overwrite=True)
    assert find_card("a") == first
    verify(first)
    second = import_model(checkpoint, "a", mpp=0.5, overwrite=True)
    assert find_card("a") == second != first
    verify(second)
    assert files(folder) == ["a.json", "a.safetensors"]


@pytest.mark.parametrize("stage", ["weights", "rename", "card"])
def test_disk_full(stage: str, checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, nothing half-written, and the same command works when there is room."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    real = os.fsync

    def fail(*_: object, **__: object) -> None:
        raise full

    def fail_third(descriptor: int, calls: list[int] = []) -> None:  # noqa: B006
        calls.append(descriptor)
        if len(calls) == 3:  # after the weights and their folder
            raise full
        real(descriptor)

    if stage == "weights":
        monkeypatch.setattr(safetensors.torch, "save_file", fail)
    else:
        monkeypatch.setattr(os, "fsync", fail if stage == "rename" else fail_third)
    with pytest.raises(
        WeightsError, match=r"cannot be written \(No space left on device\); make room, or name a folder you may write"
    ) as caught:
        import_model(checkpoint, "a")
    assert "\n" not in str(caught.value)
    assert "a.json" not in files(folder)
    assert not [name for name in files(folder) if "partial" in name]
    assert find_card("a") is None
    monkeypatch.undo()
    verify(import_model(checkpoint, "a", folder=folder))


def test_a_real_limit_on_the_size_of_files(checkpoint: Path, tmp_path: Path) -> None:
    """What safetensors says of a disk that takes no more."""
    script = (
        "import sys; from pathlib import Path; from wsiseg.models.store import import_model\n"
        "try:\n    import_model(Path(sys.argv[1]), 'a', folder=Path(sys.argv[2]))\n"
        "except Exception as error:\n    print(type(error).__name__, error)"
    )
    limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, 20_000))
    done = subprocess.run(
        [sys.executable, "-B", "-c", script, checkpoint, tmp_path / "m"],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.startswith(f"WeightsError {tmp_path / 'm' / 'a.safetensors'}: cannot be written ("), done.stderr
    assert not any(name.endswith(".json") or "partial" in name for name in files(tmp_path / "m"))


def test_folder_that_cannot_be(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot be written"):
        import_model(checkpoint, "a", folder=tmp_path / "file" / "models")


def test_what_a_killed_import_left_goes(checkpoint: Path, folder: Path) -> None:
    folder.mkdir()
    old, young = folder / ".a.safetensors.1.00.partial", folder / ".a.safetensors.2.00.partial"
    for left in (old, young):
        left.touch()
    os.utime(old, (0, 0))
    import_model(checkpoint, "a")
    assert files(folder) == [young.name, "a.json", "a.safetensors"]


# Cards


def test_damage_is_found(checkpoint: Path, folder: Path) -> None:
    """A changed byte, missing weights, files that are not cards; a damaged model does not hide the others."""
    for name in ("a", "b", "c", "d"):
        import_model(checkpoint, name)
    content = bytearray((folder / "a.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "a.safetensors").write_bytes(content)
    (folder / "b.safetensors").unlink()
    (folder / "c.json").write_text("{")
    verdicts = verify_all()
    assert list(verdicts) == ["nuclei-compact", "a", "b", "c", "d"]
    assert verdicts["nuclei-compact"] == verdicts["d"] == ""
    assert "sha256 differs from the card of a; the file is damaged" in verdicts["a"]
    assert "the weights of b are missing" in verdicts["b"]
    assert "the card cannot be read" in verdicts["c"]
    assert "no such model here; models here: nuclei-compact, a, b, c, d" in verify_all(("e",))["e"]
    assert [card.name for card in stored_cards()] == ["a", "d"]
    assert all("\n" not in wrong for wrong in verdicts.values())
    assert import_model(checkpoint, "b", overwrite=True) in stored_cards()


@pytest.mark.parametrize(
    "change",
    [
        {"network": "os:system"},
        {"weights": "../sam.safetensors"},
        {"weights": "/etc/passwd"},
        {"name": "b"},
        {"mpp": "0.25"},
        {"extra": 1},
        {"sha256": None},
    ],
)
def test_cards_of_others(change: dict[str, Any], checkpoint: Path, folder: Path) -> None:
    """A card names no code and no file but its own."""
    import_model(checkpoint, "a")
    path = folder / "a.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=r"a\.json: not a card that wsiseg wrote"):
        find_card("a")


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "", "weights.pt", "absent"])
def test_no_such_card(name: str, folder: Path) -> None:
    assert find_card(name) is None
    with pytest.raises(WeightsError, match="no such model here; models here: nuclei-compact; see `wsiseg models list`"):
        known_card(name)


def test_card_of_a_file(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    """A converted file says itself what it is; the package's own needs not."""
    card = import_model(checkpoint, "a", mpp=0.125, normalise="tile-minmax")
    moved = card.weights.rename(tmp_path / "moved.safetensors")
    found = card_of_file(moved)
    assert (found.network, found.weights, found.mpp, found.normalise, found.sha256) == (
        SAM_NETWORK,
        moved,
        0.125,
        "tile-minmax",
        "",
    )
    packaged = MODELS["nuclei-compact"].weights
    assert card_of_file(packaged) is MODELS["nuclei-compact"]
    copied = tmp_path / "copy.safetensors"
    copied.write_bytes(packaged.read_bytes())
    own = dataclasses.replace(
        MODELS["nuclei-compact"], weights=copied, sha256="", licence="unknown", source=str(copied)
    )
    without = {"phrases": None, "phrases_sha256": "", "prompts": ("points", "boxes")}  # other weights, other features
    assert card_of_file(copied) == dataclasses.replace(own, **without)
    save_file(tiny_sam(), copied)
    with pytest.raises(
        WeightsError,
        match=r"a SAM checkpoint that does not say its scale; convert it: wsiseg models import .* --mpp UM",
    ):
        card_of_file(copied)
    for said in (
        "{}",
        "[]",
        "x",
        '{"network": "sam", "mpp": 9, "normalise": "none"}',
        '{"network": "os:system", "mpp": 1, "normalise": "none"}',
    ):
        save_file(tiny_sam(), copied, metadata={"wsiseg": said})
        with pytest.raises(WeightsError, match="belong to another version; import the checkpoint again"):
            card_of_file(copied)
    copied.write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        card_of_file(copied)


def test_catalogue(checkpoint: Path, folder: Path) -> None:
    """Each model once: here, or to be had."""
    import_model(checkpoint, "sam-vit-b", mpp=0.5, licence="Apache-2.0")
    rows = {row.name: row for row in catalogue()}
    assert len(rows) == len(catalogue())
    assert rows["nuclei-compact"].where == "in the package"
    assert (rows["sam-vit-b"].where, rows["sam-vit-b"].mpp) == ("imported", 0.5)
    assert rows["sam-vit-h"].where == "to download"
    assert rows["vit-l-histopathology"].where == "to get by hand"
    assert rows["vit-l-histopathology"].architecture == "ViT-L"
    assert WEIGHTS_FOLDER.is_dir()


# Downloading


class Server(ThreadingHTTPServer):
    """Serves ``content``; ``ranges``: answers requests for a part; ``stops_after``: breaks the connection there, once."""

    content = b""
    ranges = True
    stops_after = 0
    status = 200
    requests: list[str]

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/sam.pth"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range", "")
        self.server.requests.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and self.server.ranges else 0
        if self.server.status != 200:
            self.send_error(self.server.status)
            return
        if wanted and self.server.ranges and start >= len(self.server.content):
            self.send_error(416)
            return
        body = self.server.content[start:]
        self.send_response(206 if wanted and self.server.ranges else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        stops, self.server.stops_after = self.server.stops_after, 0
        self.wfile.write(body[: stops or None])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(checkpoint: Path) -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as found:
        found.content, found.requests = checkpoint.read_bytes(), []
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


def entry(server: Server, **changes: str) -> Download:
    return dataclasses.replace(
        Download(address=server.address, sha256=sha256(server.content).hexdigest(), architecture="ViT", mpp=0.5),
        **changes,
    )  # type: ignore[arg-type]


def test_download(server: Server, folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    card = download("sam", entry=entry(server), on_progress=lambda done, total: seen.append((done, total)))
    assert card == find_card("sam")
    assert (card.source, card.licence, card.mpp) == (server.address, "Apache-2.0", 0.5)
    assert seen[-1] == (len(server.content), len(server.content))
    assert files(folder) == ["sam.json", "sam.safetensors"]
    with pytest.raises(WeightsError, match="a model of this name already exists"):
        download("sam", entry=entry(server))
    assert len(server.requests) == 1
    assert download("sam", entry=entry(server), overwrite=True) == card


@pytest.mark.parametrize("ranges", [True, False])
def test_a_broken_download_goes_on(ranges: bool, server: Server, folder: Path) -> None:
    """With a server that gives parts, only the rest is fetched; otherwise all of it again."""
    server.ranges, server.stops_after = ranges, 3000
    with pytest.raises(
        WeightsError, match=f"the connection ended after 3000 of {len(server.content)} bytes; run the command again"
    ):
        download("sam", entry=entry(server))
    assert files(folder) == ["sam.part"]
    seen: list[tuple[int, int]] = []
    verify(download("sam", entry=entry(server), on_progress=lambda done, total: seen.append((done, total))))
    assert server.requests == ["", "bytes=3000-"]
    assert seen[-1] == (len(server.content), len(server.content))
    assert files(folder) == ["sam.json", "sam.safetensors"]


def test_a_complete_download_is_used(server: Server, folder: Path) -> None:
    """Left by a conversion that failed, for instance on a full disk."""
    folder.mkdir()
    (folder / "sam.part").write_bytes(server.content)
    verify(download("sam", entry=entry(server)))
    assert files(folder) == ["sam.json", "sam.safetensors"]


def test_another_file(server: Server, folder: Path) -> None:
    """A wrong sum: nothing of it stays, so that the next try begins anew."""
    with pytest.raises(
        WeightsError, match="sha256 differs from the published one, and the file was removed; run the command again"
    ):
        download("sam", entry=entry(server, sha256="0" * 64))
    assert files(folder) == []
    (folder / "sam.part").write_bytes(b"of another file")
    with pytest.raises(WeightsError, match="sha256 differs from the published one"):
        download("sam", entry=entry(server))
    verify(download("sam", entry=entry(server)))


@pytest.mark.parametrize("status", [403, 404, 500])
def test_server_says_no(status: int, server: Server, folder: Path) -> None:
    server.status = status
    with pytest.raises(
        WeightsError,
        match=rf"{server.address}: the server answered {status} .*; try again later, or get the file on another machine",
    ):
        download("sam", entry=entry(server))
    assert files(folder) == []


def test_offline(folder: Path, server: Server) -> None:
    refused = entry(server, address="http://127.0.0.1:9/sam.pth")
    with pytest.raises(
        WeightsError, match=r"127.0.0.1:9/sam.pth: cannot be reached \(.*refused\); try again later"
    ) as caught:
        download("sam", entry=refused)
    assert "\n" not in str(caught.value)
    nowhere = entry(server, address="http://nowhere.invalid/sam.pth")
    with pytest.raises(WeightsError, match=r"nowhere.invalid/sam.pth: cannot be reached \("):
        download("sam", entry=nowhere)


def test_download_on_a_full_disk(folder: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(WeightsError, match=r"sam\.part: cannot be written \(No space left on device\)"):
        download("sam", entry=entry(server), on_progress=full)
    verify(download("sam", entry=entry(server)))


def test_published_downloads() -> None:
    """Over https, each with a sha256; every name is one that can be imported."""
    assert set(DOWNLOADS) == {"sam-vit-b", "sam-vit-l", "sam-vit-h"}
    for name, found in DOWNLOADS.items():
        assert found.address.startswith("https://")
        assert len(bytes.fromhex(found.sha256)) == 32
        assert store._NAME.fullmatch(name)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("sam9", "sam9: no download of this name; available are sam-vit-b, sam-vit-l, sam-vit-h"),
        (
            "vit-b-histopathology",
            r"no sha256 of it is published.*--decoder DECODER --name vit-b-histopathology --mpp 0.125",
        ),
    ],
)
def test_no_such_download(name: str, sentence: str, folder: Path) -> None:
    with pytest.raises(WeightsError, match=sentence):
        download(name)
    assert files(folder) == []
