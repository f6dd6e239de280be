"""Checkpoints: every form is read, nothing in a file is run, and what is no SAM is named for what it is."""

from __future__ import annotations

import builtins
import io
import os
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from wsiseg.errors import WeightsError
from wsiseg.models.sam.checkpoints import Architecture, read_checkpoint, recognise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GRID, WINDOW, DIM, HEAD_DIM, DEPTH = 8, 3, 16, 8, 4


ONE = torch.ones(1)


def tiny_sam(dim: int = DIM, depth: int = DEPTH, head_dim: int = HEAD_DIM) -> dict[str, Tensor]:
    """Names and shapes of a small SAM, as far as they are looked at; every second block is global."""
    sam = {
        "image_encoder.pos_embed": torch.randn(1, GRID, GRID, dim),
        "image_encoder.patch_embed.proj.weight": torch.randn(dim, 3, 16, 16),
        "prompt_encoder.no_mask_embed.weight": torch.randn(1, 8),
        "mask_decoder.iou_token.weight": torch.randn(1, 8),
        "mask_decoder.mask_tokens.weight": torch.randn(4, 8),
    }
    for k in range(depth):
        sam[f"image_encoder.blocks.{k}.attn.rel_pos_h"] = torch.randn(2 * (GRID if k % 2 else WINDOW) - 1, head_dim)
    return sam


def tiny_decoder(channels: int = 3) -> dict[str, Tensor]:
    return {
        "deconv1.block.0.conv.weight": torch.randn(4, 4, 1, 1),
        "deconv1.block.2.num_batches_tracked": torch.tensor(7),
        "decoder.samplers.0.conv.weight": torch.randn(4, 4, 1, 1),
        "out_conv.weight": torch.randn(channels, 4, 1, 1),
    }


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in tensors.items()}


def saved(path: Path, content: object, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        assert torch.equal(found[key], value), key


def refused(path: Path, sentence: str, decoder: Path | None = None) -> str:
    with pytest.raises(WeightsError, match=sentence) as caught:
        read_checkpoint(path, decoder)
    said = str(caught.value)
    assert said.startswith(str(decoder if decoder and str(decoder) in said else path))
    assert "\n" not in said
    return said


# Forms


def test_flat(tmp_path: Path) -> None:
    """As published; the constants of the input are not weights."""
    sam = tiny_sam()
    file = saved(tmp_path / "sam.pth", {**sam, "pixel_mean": torch.zeros(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)})
    found = read_checkpoint(file)
    assert_same(found.sam, sam)
    assert found.decoder == {}
    assert found.notes == ()


def test_old_form(tmp_path: Path) -> None:
    sam = tiny_sam()
    assert_same(read_checkpoint(saved(tmp_path / "a", sam, _use_new_zipfile_serialization=False)).sam, sam)


@pytest.mark.parametrize("prefix", ["module.", "sam.", "model.", "module.sam."])
def test_prefixes(prefix: str, tmp_path: Path) -> None:
    sam = tiny_sam()
    assert_same(
        read_checkpoint(
            saved(tmp_path / "a.pt", OrderedDict(with_prefix(prefix, {**sam, "pixel_mean": torch.zeros(3)})))
        ).sam,
        sam,
    )


@pytest.mark.parametrize("container", ["model_state", "state_dict", "model"])
def test_containers(container: str, tmp_path: Path) -> None:
    sam = tiny_sam()
    found = read_checkpoint(saved(tmp_path / "a.pt", {container: sam, "epoch": 3, "optimizer": {"lr": 0.1}}))
    assert_same(found.sam, sam)
    assert found.notes == ("left out of a.pt: epoch, optimizer",)


PREFIXES = [
    "_orig_mod.",
    "net.",
    "sam_model.",
    "model.sam.",
    "module._orig_mod.",
    "_orig_mod.module.model.",
    "trainer.student.sam.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix(prefix: str, tmp_path: Path) -> None:
    """Whatever stands before every name of the model, at the top or in a container; what is beside it is said."""
    sam = tiny_sam()
    assert_same(read_checkpoint(saved(tmp_path / "a.pt", with_prefix(prefix, sam | {"pixel_mean": ONE}))).sam, sam)
    found = read_checkpoint(saved(tmp_path / "a.pt", {"model": with_prefix(prefix, sam) | {"loss.weight": ONE}}))
    assert_same(found.sam, sam)
    assert found.notes == ("left out of a.pt: model.loss.weight",)


def test_wrapped_parts(tmp_path: Path) -> None:
    """torch.compile or DataParallel around a part of the model only."""
    sam = tiny_sam()
    for inner in ("_orig_mod.", "module."):
        wrapped = {key.replace("image_encoder.", f"image_encoder.{inner}"): value for key, value in sam.items()}
        assert_same(read_checkpoint(saved(tmp_path / "a.pt", wrapped)).sam, sam)


@pytest.mark.parametrize(
    ("place", "rest"),
    [
        (("model_state_dict",), "epoch"),
        (("net",), "epoch"),
        (("ema",), "epoch"),
        (("params",), "epoch"),
        (("anything",), "epoch"),
        (("checkpoint", "state_dict"), "checkpoint.epoch, epoch"),
        (("ckpt", "ema", "net"), "ckpt.ema.epoch, ckpt.epoch, epoch"),
    ],
)
def test_any_container(place: tuple[str, ...], rest: str, tmp_path: Path) -> None:
    """Whatever the keys that lead to the model; what is left out on the way is said."""
    sam = tiny_sam()
    content: dict[str, Any] = with_prefix("module.", sam)
    for key in reversed(place):
        content = {key: content, "epoch": 3}
    if len(place) == 3:
        refused(saved(tmp_path / "a.pt", content), "holds no tensors by name")  # one level deeper than is looked
        return
    found = read_checkpoint(saved(tmp_path / "a.pt", content))
    assert_same(found.sam, sam)
    assert found.notes == (f"left out of a.pt: {rest}",)


@pytest.mark.parametrize(
    ("first", "second"),
    [("model", "ema"), ("net", "model_ema"), ("state_dict", "model"), ("zebra", "ema_state"), ("model", "network")],
)
def test_one_of_several_models(first: str, second: str, tmp_path: Path) -> None:
    """The documented order decides, not that of the file; the other is named."""
    sam, other = tiny_sam(), tiny_sam()
    for content in ({first: sam, second: other}, {second: other, first: sam}):
        found = read_checkpoint(saved(tmp_path / "a.pt", content))
        assert_same(found.sam, sam)
        assert found.notes[0] == f"a.pt holds 2 models; {first} was taken, not {second}"
    found = read_checkpoint(
        saved(tmp_path / "a.pt", {"model": with_prefix("ema.", other) | with_prefix("student.", sam)})
    )
    assert_same(found.sam, sam)
    assert found.notes[0] == "a.pt holds 2 models; model.student was taken, not model.ema"


@pytest.mark.parametrize("form", ["beside", "prefix", "nested", "flat and prefix"])
def test_decoder_anywhere(form: str, tmp_path: Path) -> None:
    """An instance decoder under any key or prefix, in the model's file or in its own; nothing of it is said to be left out."""
    sam, decoder = tiny_sam(), tiny_decoder()
    content: dict[str, Any] = {
        "beside": {"model": sam, "unetr": with_prefix("_orig_mod.", decoder)},
        "prefix": {"state_dict": with_prefix("net.sam.", sam) | with_prefix("net.unetr.", decoder)},
        "nested": {"ckpt": {"model": sam, "decoder": decoder}},
        "flat and prefix": sam | with_prefix("decoder.", decoder),
    }[form]
    file = saved(tmp_path / "a.pt", content)
    found = read_checkpoint(file)
    assert_same(found.sam, sam)
    assert_same(found.decoder, decoder)
    assert found.notes == ()
    assert_same(read_checkpoint(saved(tmp_path / "s.pt", sam), file).decoder, decoder)


def test_decoder_beside(tmp_path: Path) -> None:
    sam, decoder = tiny_sam(), tiny_decoder()
    model = saved(tmp_path / "vit_b.pt", sam)
    apart = saved(tmp_path / "vit_b_decoder.pt", OrderedDict({**decoder, "encoder.pos_embed": torch.zeros(2)}))
    assert_same(read_checkpoint(model, apart).decoder, decoder)
    for form in ({"decoder_state": decoder}, {"model_state": {**decoder, "encoder.pos_embed": torch.zeros(2)}}):
        assert_same(read_checkpoint(model, saved(apart, form)).decoder, decoder)


def test_decoder_within(tmp_path: Path) -> None:
    sam, decoder, other = tiny_sam(), tiny_decoder(), tiny_decoder()
    file = saved(
        tmp_path / "a.pt", {"model_state": sam, "decoder_state": {**decoder, "encoder.pos_embed": torch.zeros(2)}}
    )
    found = read_checkpoint(file)
    assert_same(found.sam, sam)
    assert_same(found.decoder, decoder)
    found = read_checkpoint(file, saved(tmp_path / "d.pt", other))
    assert_same(found.decoder, other)
    assert found.notes == ("the decoder in a.pt is ignored in favour of d.pt",)


def test_safetensors(tmp_path: Path) -> None:
    """Ours, and flat ones of others."""
    sam, decoder = tiny_sam(), tiny_decoder()
    save_file(with_prefix("sam.", sam) | with_prefix("decoder.", decoder), tmp_path / "ours")
    found = read_checkpoint(tmp_path / "ours")
    assert_same(found.sam, sam)
    assert_same(found.decoder, decoder)
    save_file(sam, tmp_path / "flat.safetensors")
    assert_same(read_checkpoint(tmp_path / "flat.safetensors").sam, sam)


@pytest.fixture
def from_other_slide(monkeypatch: pytest.MonkeyPatch) -> Callable[[], types.ModuleType]:
    """A module of another program; ``forget`` takes it away again."""
    module = types.ModuleType("training_program.datasets")
    source = """
import enum
class Dataset:
    def __init__(self): self.paths = ["a.tif"]; self.call = self.__len__
    def __len__(self): return 1
class Stateful:
    def __getstate__(self): return [1, 2]
    def __setstate__(self, state): raise SystemError("foreign code ran")
class Listed(list): pass
class Mapped(dict): pass
class Kind(enum.Enum): A = 1
class Made:
    def __new__(cls, *, a): return super().__new__(cls)
    def __getnewargs_ex__(self): return (), {"a": 1}
def identity(x): return x
"""
    exec(compile(source, "datasets", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "training_program", types.ModuleType("training_program"))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return lambda: module


def test_training_checkpoint(
    tmp_path: Path, from_other_slide: Callable[[], types.ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.pt: tensors beside objects of classes that are not here; neither imported nor made."""
    module = from_other_slide()
    sam, decoder = tiny_sam(), tiny_decoder()
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    optimizer.step()
    init = {
        "dataset": module.Dataset(),
        "list": module.Listed([1, 2]),
        "dict": module.Mapped(a=1),
        "state": module.Stateful(),
        "kind": module.Kind.A,
        "transform": module.identity,
        "module": layer,
        "made": module.Made(a=1),
        "path": tmp_path,
        "set": {1, 2},
        "bytes": b"12",
        "size": torch.Size([1]),
        "device": torch.device("cpu"),
        "dtype": torch.float32,
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "generator": torch.get_rng_state(),
    }
    content = {
        "model_state": OrderedDict(with_prefix("sam.", sam)),
        "decoder_state": OrderedDict(decoder),
        "optimizer_state": optimizer.state_dict(),
        "init": init,
        "epoch": 4,
        "best_metric": 0.25,
    }
    content["model_state"]._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    protocols = (2, 4, 5)
    files = [saved(tmp_path / f"best{p}.pt", content, pickle_protocol=p) for p in protocols]
    monkeypatch.delitem(sys.modules, "training_program.datasets")
    monkeypatch.delitem(sys.modules, "training_program")
    for file in files:
        found = read_checkpoint(file)
        assert_same(found.sam, sam)
        assert_same(found.decoder, decoder)
        assert found.notes[1] == f"left out of {file.name}: best_metric, epoch, init, optimizer_state"
        assert found.notes[0].startswith(f"objects of other programs in {file.name} were not loaded (")
    assert "training_program" not in sys.modules


def test_views_dtypes_and_compression(tmp_path: Path) -> None:
    """Tensors that share a storage, strides and offsets, half precision; archives packed again with compression."""
    base = torch.arange(24, dtype=torch.float32)
    sam = tiny_sam() | {
        "mask_decoder.a": base.view(4, 6).T,
        "mask_decoder.b": base[5:9],
        "mask_decoder.c": torch.randn(3).half(),
        "mask_decoder.d": torch.randn(3).bfloat16(),
        "mask_decoder.e": torch.empty(0, 3),
        "mask_decoder.f": torch.tensor(2.0),
        "mask_decoder.g": torch.tensor([True, False]),
    }
    file = saved(tmp_path / "a.pt", sam)
    assert_same(read_checkpoint(file).sam, sam)
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_same(read_checkpoint(tmp_path / "b.pt").sam, sam)


# Nothing is run


class Call:
    """Pickles as a call of ``what``."""

    def __init__(self, what: Any, *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments

    def __call__(self) -> None:
        """Only what looks callable is pickled as a function."""


def malicious(kind: str, marker: Path) -> tuple[Any, str]:
    """Something that makes ``marker`` when it is unpickled, and what the refusal calls it."""
    shell = f"touch {marker}"
    python = f"open({str(marker)!r}, 'w')"
    match kind:
        case "system":
            return Call(os.system, shell), "os.system"
        case "eval":
            return Call(eval, python), "builtins.eval"
        case "exec":
            return Call(exec, python), "builtins.exec"
        case "open":
            return Call(open, str(marker), "w"), "io.open|_io.open|builtins.open"
        case "hub":
            return Call(
                torch.hub.download_url_to_file, f"file://{__file__}", str(marker)
            ), "torch.hub.download_url_to_file"
        case "load":
            return Call(torch.load, str(marker)), "torch.serialization.load"
        case "import":
            return Call(getattr, Call(builtins.__import__, "os"), "system"), "builtins.__import__"
        case "importlib":
            return Call(
                Call(getattr, Call(sys.modules["importlib"].import_module, "os"), "system"), shell
            ), "importlib.import_module"
        case "chain":
            return Call(
                Call(getattr, Call(getattr, torch.serialization._get_layout, "__globals__"), "get"), "os"
            ), r"getattr\(..., __globals__\)"
        case "pickle":
            return Call(pickle.loads, pickle.dumps(Call(os.system, shell))), "_?pickle.loads"
    raise AssertionError(kind)


KINDS = ("system", "eval", "exec", "open", "hub", "load", "import", "importlib", "chain", "pickle")


@pytest.mark.parametrize("place", ["beside", "in model_state", "in a tensor's place", "whole"])
@pytest.mark.parametrize("kind", KINDS)
def test_malicious(kind: str, place: str, tmp_path: Path) -> None:
    """The call is named, and not made."""
    marker = tmp_path / "MARKER"
    bad, name = malicious(kind, marker)
    sam: dict[str, Any] = dict(tiny_sam())
    match place:
        case "beside":
            content: Any = {**sam, "epoch": bad}
        case "in model_state":
            content = {"model_state": {**sam, "image_encoder.extra": bad}}
        case "in a tensor's place":
            content = {**sam, "image_encoder.pos_embed": bad}
        case _:
            content = bad
    for protocol in (2, 4):
        file = saved(tmp_path / "a.pt", content, pickle_protocol=protocol)
        refused(
            file,
            f"asks to run ({name}), which no weight file needs; it was not run; get the file from a source you trust",
        )
        assert not marker.exists()
    old = saved(tmp_path / "old.pt", content, _use_new_zipfile_serialization=False)
    refused(old, "in PyTorch's old form that is damaged or holds more than tensors; nothing in it was run")
    assert not marker.exists()


def handmade(path: Path, instructions: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", instructions)
        archive.writestr("a/data/0", bytes(64))
    return path


STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE


@pytest.mark.parametrize(
    ("instructions", "sentence"),
    [
        (b"cposix\nsystem\n(X\x02\x00\x00\x00lstR.", "asks to run os.system"),
        (b"cnt\nsystem\n(X\x02\x00\x00\x00lstR.", "asks to run os.system"),
        (b"c__builtin__\neval\n(X\x01\x00\x00\x001tR.", "asks to run builtins.eval"),
        (b"\x80\x04\x8c\x05torch\x8c\x17serialization.os.system\x93.", "asks to run torch.serialization.os.system"),
        (b"\x80\x04\x8c\x07logging\x8c\x09os.system\x93.", "asks to run logging.os.system"),
        (b"(X\x02\x00\x00\x00lsios\nsystem\n.", "asks to run os.system"),  # the INST opcode
        (b"\x82\x01.", "truncated or damaged"),  # the extension registry
        # attributes of what the reader hands out
        (b"ctorch._utils\n_rebuild_tensor_v2\n}X\x01\x00\x00\x00aK\x01sb.", "truncated or damaged"),
        (b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\x00\x00\x00__call__K\x01s\x86b.", "truncated or damaged"),
        (b"ccollections\nOrderedDict\nN}X\x05\x00\x00\x00itemsK\x01s\x86b.", "truncated or damaged"),
        (b"cother\nThing\nN}X\x0c\x00\x00\x00__setstate__K\x01s\x86b.", "whole pickled model or another object"),
        # tensors beyond their storage: 16 numbers
        (b"}" + b"X\x01\x00\x00\x00a" + TENSOR + b"K\x00K\x11\x85K\x01\x85\x89NtRs.", "more elements than its storage"),
        (b"}" + b"X\x01\x00\x00\x00a" + TENSOR + b"K\x08K\x09\x85K\x01\x85\x89NtRs.", "truncated or damaged"),
        (
            b"}" + b"X\x01\x00\x00\x00a" + TENSOR + b"J\xff\xff\xff\xffK\x09\x85K\x01\x85\x89NtRs.",
            "truncated or damaged",
        ),
        (
            b"}" + b"X\x01\x00\x00\x00a" + TENSOR + b"K\x00J\x00\x00\x00\x7f\x85K\x00\x85\x89NtRs.",
            "more elements than its storage",
        ),
        (
            b"}" + b"X\x01\x00\x00\x00a" + TENSOR.replace(b"K\x10", b"K\x11") + b"K\x00K\x01\x85K\x01\x85\x89NtRs.",
            "data/0 is too short",
        ),
        (
            b"}" + b"X\x01\x00\x00\x00a" + TENSOR.replace(b"\x000X", b"\x001X") + b"K\x00K\x01\x85K\x01\x85\x89NtRs.",
            "no item named 'a/data/1'",
        ),
        (b"}" + b"X\x01\x00\x00\x00a" + TENSOR + b"K\x00K\x10\x85K\x01\x85\x89NtRs.", "not a SAM checkpoint"),
        (b"", "truncated or damaged"),
        (b"K\x01.", "holds a int, not a dict of tensors"),
        (b"K\x01r\xff\xff\xff\x7f.", "object 2147483647 in 8 bytes of data.pkl"),  # 34 GB of pickle's memo
    ],
)
def test_pickles_by_hand(instructions: bytes, sentence: str, tmp_path: Path) -> None:
    """Opcodes that no program writes; and the stand-ins are as before afterwards."""
    refused(handmade(tmp_path / "a.pt", instructions), sentence)
    sam = tiny_sam()
    assert_same(read_checkpoint(saved(tmp_path / "good.pt", sam)).sam, sam)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.data())
def test_any_bytes_for_a_pickle(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever stands in data.pkl: a checkpoint or a sentence."""
    folder = tmp_path_factory.mktemp("fuzz")
    buffer = io.BytesIO()
    torch.save(OrderedDict(tiny_sam()), buffer)
    good = zipfile.ZipFile(buffer).read("archive/data.pkl")
    place = data.draw(st.integers(0, len(good) - 1))
    changed = good[:place] + data.draw(st.binary(max_size=3)) + good[place + data.draw(st.integers(0, 3)) :]
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(folder / "a.pt", "w") as new:
        for name in old.namelist():
            new.writestr(name, changed if name.endswith("data.pkl") else old.read(name))
    try:
        read_checkpoint(folder / "a.pt")
    except WeightsError as error:
        assert "\n" not in str(error)  # noqa: PT017


# Damage


@pytest.mark.parametrize("form", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0, 1e-9, 0.001, 0.1, 0.5, 0.9, 0.999, 1])
def test_cut_short(form: str, share: float, tmp_path: Path) -> None:
    sam, file = tiny_sam(), tmp_path / "a.pt"
    if form == "safetensors":
        save_file(sam, file)
    else:
        saved(file, sam, _use_new_zipfile_serialization=form == "zip")
    whole = file.read_bytes()
    length = min(int(share * len(whole)) + (share > 0), len(whole) - 1)
    file.write_bytes(whole[:length])
    refused(file, "truncated|is empty|not a checkpoint|old form that is damaged")


def test_changed_bytes(tmp_path: Path) -> None:
    """A flipped bit among the numbers is seen by the archive's own check sums."""
    file = saved(tmp_path / "a.pt", tiny_sam())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    refused(file, "data/0 in it fails its check sum|data/[0-9]+ in it fails its check sum")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "weights.pth"
    refused(file, "no such file; check the path")
    refused(tmp_path, "is a folder; pass the weight file in it")
    file.write_bytes(b"")
    refused(file, "the file is empty")
    Image.new("RGB", (4, 4)).save(file, "PNG")
    refused(file, "not a checkpoint; pass a PyTorch file")
    file.write_text("\n<!DOCTYPE html><html><body>404</body></html>")
    refused(file, "a web page, not a weight file")
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(file, "a pointer of Git LFS")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(file, "a zip archive without data.pkl")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", "hello")
        archive.writestr("a/constants.pkl", "hello")
    refused(file, "a TorchScript program")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a/data.pkl", "hello")
        archive.writestr("a/byteorder", "big" if sys.byteorder == "little" else "little")
    refused(file, "the other byte order")
    refused(saved(file, [torch.zeros(1)]), "holds a list, not a dict of tensors")
    refused(saved(file, torch.nn.Linear(1, 1)), "holds a whole pickled model or another object, not a dict of tensors")
    refused(saved(file, {"epoch": 3}), r"holds no tensors by name \(found: epoch\)")
    refused(saved(file, {}), r"holds no tensors by name \(found: nothing\)")
    refused(saved(file, {"model_state": tiny_sam(), "decoder_state": 3}), "decoder_state is a int")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    file = saved(tmp_path / "a.pt", tiny_sam())
    file.chmod(0)
    refused(file, "cannot be read")


# Other models


SAM = tiny_sam()
ENCODER = {key: value for key, value in SAM.items() if key.startswith("image_encoder.")}


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (
            {"conv1.weight": ONE, "layer1.0.conv1.weight": ONE, "fc.weight": ONE},
            r"not a SAM checkpoint \(it has conv1.weight, fc.weight, layer1",
        ),
        (
            {"model": {"image_encoder.trunk.pos_embed": ONE, "memory_encoder.x": ONE}},
            "a SAM 2 checkpoint, which is not supported",
        ),
        (
            {"image_encoder.patch_embed.seq.0.c.weight": ONE, "mask_decoder.a": ONE},
            r"MobileSAM \(ViT-T\), which is not supported",
        ),
        ({"image_encoder.layers.0.blocks.0.conv1.c.weight": ONE}, r"MobileSAM \(ViT-T\)"),
        ({"image_encoder.stem.weight": ONE}, "has no patch_embed.proj.weight"),
        ({"vision_encoder.pos_embed": ONE}, "of the transformers library"),
        ({"w_a_000": ONE, "image_encoder.blocks.0.attn.qkv.w_a_linear_q.weight": ONE}, "holds only a LoRA adapter"),
        ({"base_model.model.lora_A.weight": ONE}, "holds only a LoRA adapter"),
        (SAM | {"image_encoder.blocks.0.attn.qkv.w_b_linear_q.weight": ONE}, "a model with LoRA layers in it"),
        (ENCODER, "no prompt_encoder and no mask_decoder in it"),
        (
            {"model_state": with_prefix("encoder.", ENCODER) | tiny_decoder(6)},
            r"a semantic model \(6 classes\), whose head is not supported",
        ),
        (
            {"model_state": with_prefix("encoder.", ENCODER) | tiny_decoder()},
            "encoder and instance decoder without SAM's mask decoder",
        ),
        (tiny_decoder(), "an instance decoder, not a model; pass the SAM checkpoint, and this file with --decoder"),
        (
            {"model_state": SAM, "decoder_state": tiny_decoder(6)},
            "a decoder with 6 channels; the semantic head is not supported",
        ),
        ({"model_state": SAM, "decoder_state": {"a": ONE}}, "decoder_state is not an instance decoder"),
        (
            SAM | {"mask_decoder.iou_token.weight": torch.tensor([1.0, float("nan")])},
            r"1 tensors hold NaN or infinity \(first: mask_decoder.iou",
        ),
        (
            SAM | {"image_encoder.pos_embed": torch.zeros(1, 64, 16)},
            r"image_encoder.pos_embed has the shape \(1, 64, 16\)",
        ),
        ({k: v for k, v in SAM.items() if "blocks.0" not in k}, r"image_encoder.blocks has the numbers \[1, 2, 3\]"),
        ({k: v for k, v in SAM.items() if "pos_embed" not in k}, "image_encoder.pos_embed is missing"),
        (
            SAM | {"image_encoder.blocks.0.attn.rel_pos_h": torch.zeros(5, 7)},
            "width 16 is not a multiple of the heads' width 7",
        ),
        (
            SAM | {"image_encoder.blocks.2.attn.rel_pos_h": torch.zeros(7, 8)},
            r"relative positions of \[5, 7, 15\] rows",
        ),
    ],
)
def test_other_models(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    refused(saved(tmp_path / "a.pt", content), sentence)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (SAM, "given as a decoder, but it holds a SAM model"),
        ({"conv1.weight": ONE}, r"not an instance decoder \(found: conv1.weight\)"),
        (tiny_decoder(6), "a decoder with 6 channels; the semantic head is not supported"),
        (tiny_decoder() | {"out_conv.bias": torch.tensor(float("inf"))}, "1 tensors hold NaN or infinity"),
    ],
)
def test_other_decoders(content: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    assert "d.pt" in refused(saved(tmp_path / "a.pt", SAM), sentence, saved(tmp_path / "d.pt", content))


# Shapes


def test_recognise() -> None:
    found = recognise(tiny_sam())
    assert found == Architecture(dim=16, depth=4, heads=2, global_blocks=(1, 3), window=3, grid=8, patch=16)
    assert found.name == "ViT of width 16 and depth 4"


@pytest.mark.parametrize(
    ("dim", "depth", "heads", "name"), [(768, 12, 12, "ViT-B"), (1024, 24, 16, "ViT-L"), (1280, 32, 16, "ViT-H")]
)
def test_published_architectures(dim: int, depth: int, heads: int, name: str) -> None:
    """The shapes of the official checkpoints."""
    every = depth // 4
    sam = {
        "image_encoder.pos_embed": torch.empty(1, 64, 64, dim),
        "image_encoder.patch_embed.proj.weight": torch.empty(dim, 3, 16, 16),
    }
    for k in range(depth):
        sam[f"image_encoder.blocks.{k}.attn.rel_pos_h"] = torch.empty(
            127 if k % every == every - 1 else 27, dim // heads
        )
    found = recognise(sam)
    assert found == Architecture(
        dim=dim,
        depth=depth,
        heads=heads,
        global_blocks=tuple(range(every - 1, depth, every)),
        window=14,
        grid=64,
        patch=16,
    )
    assert found.name == name


def test_one_kind_of_block() -> None:
    """Windows as large as the image and global attention are the same thing."""
    sam = tiny_sam()
    for k in (0, 2):
        sam[f"image_encoder.blocks.{k}.attn.rel_pos_h"] = torch.zeros(15, 8)
    assert recognise(sam).global_blocks == ()
    assert recognise(sam).window == 8
    for k in range(4):
        sam[f"image_encoder.blocks.{k}.attn.rel_pos_h"] = torch.zeros(5, 8)
    assert recognise(sam).global_blocks == ()
    assert recognise(sam).window == 3
