"""PyTorch files, read without running anything that is in them.

A file of ``torch.save`` is a zip archive::

    NAME/data.pkl      a pickle: dicts, lists, and tensors as calls of torch._utils._rebuild_tensor_v2 on numbered storages
    NAME/data/<key>    one storage: raw numbers
    NAME/byteorder     "little" (absent in older files)

Training programs put objects of their own classes into data.pkl, and a pickle may name any function of the machine and have it called.
``torch.load(weights_only=True)`` refuses both alike. Here both are read: a name that is not one of the few that tensors need becomes `_Inert`,
which can be made, called, filled and changed like anything and does nothing; a name that no weight file needs (os.system, eval) ends the reading.
"""

from __future__ import annotations

import io
import lzma
import math
import mmap
import pickle
import pickletools
import struct
import sys
import zipfile
import zlib
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from wsiseg.errors import WeightsError
from wsiseg.runtime.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

#: First parts of module names that can run, fetch or overwrite things.
_HARMFUL = {
    "os",
    "posix",
    "nt",
    "subprocess",
    "pty",
    "sys",
    "importlib",
    "imp",
    "zipimport",
    "runpy",
    "shutil",
    "socket",
    "ctypes",
    "pickle",
    "_pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "marshal",
    "webbrowser",
    "urllib",
    "urllib2",
    "http",
    "requests",
    "ftplib",
    "smtplib",
    "asyncio",
    "timeit",
    "pdb",
    "bdb",
    "cProfile",
}
_HARMFUL_PARTS = (
    "torch.hub",
    "torch.jit",
    "torch.load",
    "torch.package",
    "torch.serialization",
    "torch.utils.cpp_extension",
    "torch.utils.model_zoo",
    "numpy.f2py",
    "numpy.load",
    "numpy.testing",
    "code.interact",
    "code.InteractiveInterpreter",
    "code.InteractiveConsole",
    "io.open",
    "_io.open",
)
_HARMFUL_ATTRIBUTES = {
    "system",
    "popen",
    "eval",
    "exec",
    "compile",
    "open",
    "__import__",
    "__builtins__",
    "__globals__",
    "__subclasses__",
    "__code__",
    "__loader__",
}
_HARMLESS_BUILTINS = {
    "bool",
    "bytearray",
    "bytes",
    "complex",
    "dict",
    "Ellipsis",
    "float",
    "frozenset",
    "int",
    "list",
    "object",
    "range",
    "reversed",
    "set",
    "slice",
    "str",
    "tuple",
    "type",
}
_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
# What a damaged or hostile archive or pickle can raise.
_BROKEN = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    OverflowError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
)


class TorchFile(NamedTuple):
    """Content of a file, and the names of the foreign classes that were skipped."""

    content: Any
    foreign: tuple[str, ...]


def read_torch_file(path: Path) -> TorchFile:
    """Read a file of ``torch.save``.

    Parameters
    ----------
    path
        A zip archive (PyTorch 1.6 and later), or the older form.

    Returns
    -------
    TorchFile
        Dicts, lists, numbers, strings and CPU tensors, which read the file when they are used (do not change it meanwhile). Objects of foreign
        classes are there, empty.

    Raises
    ------
    WeightsError
        Damaged, not of ``torch.save``, or with something in it that could do harm.
    """
    with path.open("rb") as stream:
        is_zip = stream.read(2) == b"PK"
    return _read_zip(path) if is_zip else _read_old(path)


def _read_zip(path: Path) -> TorchFile:
    try:
        with path.open("rb") as stream, zipfile.ZipFile(stream) as archive:
            root = _root(path, archive)
            whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            instructions = archive.read(f"{root}data.pkl")
            _require_plausible_memo(instructions)
            reader = _Reader(io.BytesIO(instructions), archive, root, whole)
            return TorchFile(reader.load(), tuple(sorted(reader.foreign)))
    except WeightsError:
        raise
    except _HarmError as error:
        raise WeightsError(
            f"{path}: asks to run {error}, which no weight file needs; it was not run; get the file from a source you trust"
        ) from None
    except _BROKEN as error:
        reason = first_line(error)
        raise WeightsError(
            f"{path}: truncated or damaged ({reason}), as after a broken download; download it again"
        ) from error


def _root(path: Path, archive: zipfile.ZipFile) -> str:
    """The folder of data.pkl in a whole archive of weights."""
    names = archive.namelist()
    found = sorted((n for n in names if n == "data.pkl" or n.endswith("/data.pkl")), key=len)
    if not found:
        raise WeightsError(
            f"{path}: a zip archive without data.pkl, so not a PyTorch file; unpack it and pass the weight file inside"
        )
    root = found[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in names:
        raise WeightsError(
            f"{path}: a TorchScript program, not a file of weights; pass the checkpoint that it was made from"
        )
    if f"{root}byteorder" in names and archive.read(f"{root}byteorder").decode(errors="replace") != sys.byteorder:
        raise WeightsError(f"{path}: its numbers have the other byte order; save it again on a machine like this one")
    damaged = archive.testzip()
    if damaged:
        raise WeightsError(f"{path}: {damaged} in it fails its check sum; the file is damaged: download it again")
    return root


def _require_plausible_memo(instructions: bytes) -> None:
    """Refuse a pickle that numbers an object beyond its own length: pickle's memo is as long as the highest number, so one bit is gigabytes."""
    for opcode, number, _ in pickletools.genops(instructions):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(number or 0) > len(instructions):
            raise ValueError(f"object {number} in {len(instructions)} bytes of data.pkl")


def _read_old(path: Path) -> TorchFile:
    try:
        return TorchFile(torch.load(path, map_location="cpu", weights_only=True), ())
    except _BROKEN as error:
        raise WeightsError(
            f"{path}: a file in PyTorch's old form that is damaged or holds more than tensors; nothing in it was run; "
            "pass a zip checkpoint (PyTorch 1.6 and later) or a .safetensors file"
        ) from error


class _HarmError(Exception):
    """The pickle names something that could do harm."""


# A pickle can set attributes of whatever it gets hold of, so no stand-in takes any.


class _Inert:
    """Stand-in for every foreign class and function, and for what they return."""

    __slots__ = ()

    def __new__(cls, *_: object, **__: object) -> _Inert:  # noqa: PYI034
        return object.__new__(cls)

    def __init__(self, *_: object, **__: object) -> None: ...

    def __call__(self, *_: object, **__: object) -> _Inert:
        return self

    # may be asked of the class as well as of an object
    def __setstate__(*_: object) -> None: ...

    append = extend = add = update = __setstate__

    def __setitem__(self, key: object, value: object) -> None: ...


class _OrderedDict(dict[Any, Any]):
    """Stand-in for collections.OrderedDict; its attributes (``_metadata`` of a state dict) are dropped."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None: ...


class _Tensor:
    """Stand-in for torch._utils._rebuild_tensor_v2."""

    __slots__ = ()

    def __call__(
        self, storage: object, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
    ) -> Tensor | _Inert:
        if not isinstance(storage, torch.Tensor):
            return _Inert()
        if math.prod(size) > storage.numel():
            raise ValueError("a tensor has more elements than its storage")
        return torch.as_strided(storage, size, stride, offset)  # checks that it stays within the storage


class _Parameter:
    """Stand-in for torch._utils._rebuild_parameter."""

    __slots__ = ()

    def __call__(self, tensor: object, *_: object) -> object:
        return tensor


class _Getattr:
    """Stand-in for getattr, with which pickles name methods."""

    __slots__ = ()

    def __call__(self, _: object, name: object, *__: object) -> _Inert:
        if str(name) in _HARMFUL | _HARMFUL_ATTRIBUTES:
            raise _HarmError(f"getattr(..., {name})")
        return _Inert()


_STAND_INS: dict[str, Any] = {
    "collections.OrderedDict": _OrderedDict,
    "torch._utils._rebuild_tensor_v2": _Tensor(),
    "torch._utils._rebuild_parameter": _Parameter(),
    "torch._utils._rebuild_parameter_with_state": _Parameter(),
    "builtins.getattr": _Getattr(),
    "torch.serialization._get_layout": _Inert,
    **{f"{module}.{name}": dtype for name, dtype in _DTYPES.items() for module in ("torch", "torch.storage")},
}


class _Reader(pickle.Unpickler):
    """Unpickler that builds data.pkl from stand-ins and tensors, and finds no real class or function."""

    def __init__(self, instructions: Any, archive: zipfile.ZipFile, root: str, whole: mmap.mmap) -> None:  # noqa: ANN401
        super().__init__(instructions, encoding="utf-8")
        self._archive, self._root, self._whole = archive, root, whole
        self._storages: dict[str, Tensor] = {}
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str) -> Any:  # noqa: ANN401
        module = {"__builtin__": "builtins", "posix": "os", "nt": "os"}.get(module, module)
        full = f"{module}.{name}"
        if full in _STAND_INS:
            return _STAND_INS[full]
        harmful = name not in _HARMLESS_BUILTINS if module == "builtins" else module.split(".", 1)[0] in _HARMFUL
        # module "torch", name "serialization.os.system" is a way to say os.system too
        if (
            harmful
            or _HARMFUL & set(name.split(".")[:-1])
            or any(f"{full}.".startswith(f"{part}.") for part in _HARMFUL_PARTS)
        ):
            raise _HarmError(full)
        if module != "builtins":
            self.foreign.add(full)
        return _Inert

    def persistent_load(self, pid: Any) -> Tensor | _Inert:  # noqa: ANN401
        kind, dtype, key, _, count = pid
        if kind != "storage":
            raise ValueError(f"{kind} is not a storage")
        if not isinstance(dtype, torch.dtype):
            return _Inert()
        if key not in self._storages:
            self._storages[key] = self._storage(str(key), dtype, int(count))
        return self._storages[key]

    def _storage(self, key: str, dtype: torch.dtype, count: int) -> Tensor:
        """The numbers of a storage, flat: a view of the file, or a copy when the archive compresses them."""
        entry = self._archive.getinfo(f"{self._root}data/{key}")
        if count <= 0:
            return torch.empty(0, dtype=dtype)
        if entry.file_size < count * dtype.itemsize:
            raise ValueError(f"data/{key} is too short")
        if entry.compress_type != zipfile.ZIP_STORED:
            return torch.frombuffer(bytearray(self._archive.read(entry)), dtype=dtype, count=count)
        # before the numbers: a header of 30 bytes, whose last four are the lengths of the two fields after it
        name, extra = struct.unpack_from("<HH", self._whole, entry.header_offset + 26)
        return torch.frombuffer(self._whole, dtype=dtype, count=count, offset=entry.header_offset + 30 + name + extra)
