"""Reading slides: one protocol, three readers, and the regions that the models see.

``open_slide`` is the only place that opens a slide path. It tries OpenSlide (fastest, most vendors), TiffSlide (TIFF-like files OpenSlide
does not know, and remote paths such as ``s3://``) and plain images, in that order, and raises one error when none of them can.
"""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self, cast

from wsiseg.config import check_mpp
from wsiseg.errors import ConfigError, SlideError
from wsiseg.runtime.paths import kind_of, readable, require_regular, require_text
from wsiseg.slide.mpp import require_cellular
from wsiseg.slide.resample import FOREIGN_ERRORS, read_region, thumbnail

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray

    from wsiseg.geometry import Box
    from wsiseg.records import SlideInfo

__all__ = ["READERS", "TIFF_MAGIC", "SlideReader", "open_slide", "read_region", "require_cellular", "thumbnail"]

READERS: dict[str, str] = {
    "openslide": "wsiseg.slide.openslide_reader:open_openslide",
    "tiffslide": "wsiseg.slide.tiffslide_reader:open_tiffslide",
    "image": "wsiseg.slide.image_reader:open_image",
}  #: reader name -> ``module:function``, loaded on use; the function takes (path, mpp override) and raises SlideError; order = order tried
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  #: first bytes of TIFF and BigTIFF in both byte orders


class SlideReader(Protocol):
    """An open slide. A context manager; ``read`` may be called from several threads at once.

    Attributes
    ----------
    info
        Metadata of the slide.
    """

    info: SlideInfo

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels of one level.

        Parameters
        ----------
        level
            Index into ``info.level_sizes``.
        box
            In px of that level; may reach beyond the slide, or lie outside of it.

        Returns
        -------
        NDArray[np.uint8]
            RGB of shape (box.height, box.width, 3); white outside the slide and where the file marks its tiles as absent.

        Raises
        ------
        SlideError
            Pixels that the file should have cannot be decoded.
        """
        ...

    def close(self) -> None:
        """Release the file; reading afterwards is an error."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_slide(
    path: str | Path,
    *,
    mpp: float | None = None,
    force_mpp: bool = False,
    reader: str = "auto",
    require_mpp: bool = True,
) -> SlideReader:
    """Open a slide with the first reader that can.

    Parameters
    ----------
    path
        A file, or an fsspec address (``s3://bucket/slide.svs``).
    mpp
        Microns per level-0 pixel, in place of what the file says.
    force_mpp
        Accept an ``mpp`` at which no cell can be found.
    reader
        A name of `READERS`, or ``auto`` to try them in order.
    require_mpp
        Treat a slide without microns per pixel as an error; without, its ``info.mpp`` is NaN and ``info.mpp_source`` is ``none``.

    Returns
    -------
    SlideReader
        To be closed by the caller. Doubts about the slide are in ``info.warnings``; `require_cellular` makes the
        worst of it an error.

    Raises
    ------
    SlideError
        Nothing there, no permission, not a slide, or no microns per pixel.
    ConfigError
        ``mpp`` or ``reader`` is not allowed.
    """
    check_mpp(mpp, force=force_mpp)
    if reader != "auto" and reader not in READERS:
        raise ConfigError(f"reader: {reader!r} is unknown; choose auto, {', '.join(READERS)}")
    address = os.fspath(path)
    remote = "://" in address
    if not remote:
        address = str(_checked_file(address))
    if reader != "auto":
        names = [reader]
    elif remote:
        names = [name for name in READERS if name != "openslide"]
    else:
        names = [name for name in READERS if name != "tiffslide" or _head(address)[:4] in TIFF_MAGIC]
    slide = first_that_decodes(address, mpp, names, hidden_damage=reader == "auto")
    if require_mpp and math.isnan(slide.info.mpp):
        slide.close()
        ignored = f" ({slide.info.ignored_scale})" if slide.info.ignored_scale else ""
        raise SlideError(f"{address}: no microns per pixel in the file{ignored}; pass --mpp (for example --mpp 0.25)")
    return slide


def first_that_decodes(address: str, mpp: float | None, names: list[str], *, hidden_damage: bool) -> SlideReader:
    """The first reader that opens the slide and decodes a pixel of it; if none decodes, the first that opens it, for damage may be local.

    Parameters
    ----------
    address, mpp
        As for `open_slide`.
    names
        Names in `READERS`, in the order to try.
    hidden_damage
        Skip a reader that would hide damage in this file.

    Raises
    ------
    SlideError
        No reader opens it; the message gives the reason of each.
    """
    refusals: list[str] = []
    opened: SlideReader | None = None
    for name in names:
        try:
            slide = _load(name)(address, mpp)
        except SlideError as error:
            refusals.append(f"{name}: {error}")
            continue
        if hidden_damage and slide.info.format == "generic-tiff" and _hides_damage(address):
            slide.close()
            refusals.append(f"{name}: does not detect damage in a deflate-compressed TIFF")
            continue
        if len(names) == 1 or _decodes(slide):
            if opened is not None:
                opened.close()
            return slide
        if opened is None:
            opened = slide
        else:
            slide.close()
    unsupported = any("support" in refusal for refusal in refusals)  # in that case the file is sound
    if opened is not None and not unsupported:
        return opened
    if opened is not None:
        opened.close()
        refusals.insert(0, f"{opened.info.reader}: opens it, but cannot decode it")
    guess = "stored in a way that is not supported here" if unsupported else _guess(address, "://" in address)
    raise SlideError(f"{address}: {guess} ({'; '.join(refusals)}); give a whole-slide image, TIFF, PNG or JPEG")


def _decodes(slide: SlideReader) -> bool:
    """Tell whether the first tile of the slide can be decoded."""
    from wsiseg.geometry import Box

    try:
        slide.read(0, Box(0, 0, 1, 1))
    except SlideError:
        return False
    return True


def _load(name: str) -> Callable[[str, float | None], SlideReader]:
    module, function = READERS[name].split(":")
    return cast("Callable[[str, float | None], SlideReader]", getattr(importlib.import_module(module), function))


def _hides_damage(path: str) -> bool:
    """Tell whether OpenSlide would silently fill damaged tiles of this generic TIFF: libtiff repeats grey after a deflate error."""
    import tifffile

    try:
        with tifffile.TiffFile(path) as tiff:
            return any(getattr(page, "compression", 1) in (8, 32946) for page in tiff.pages)
    except FOREIGN_ERRORS:  # then TiffSlide could not read it either
        return False


def _checked_file(address: str) -> Path:
    """Check that a path is a readable file, before a reader fails on it with an obscure error."""
    if not address.strip():
        raise SlideError("the path of the slide is empty; give a file")
    require_text(address, SlideError)
    path = Path(address)
    found = kind_of(path, SlideError)
    if found == "nothing":
        raise SlideError(f"{path}: no such file; check the path")
    if found == "folder":
        raise SlideError(
            f"{path}: is a folder, not a slide; give the file (for MRXS the .mrxs beside the folder, for DICOM one .dcm)"
        )
    with readable(path, SlideError):
        require_regular(path)
        with path.open("rb") as file:
            empty = not file.read(1)
    if empty:
        raise SlideError(f"{path}: the file is empty (0 bytes); copy or download it again")
    return path


def _head(address: str) -> bytes:
    """The first bytes of a file; none of one that is a folder or cannot be read, which the readers report."""
    try:
        with Path(address).open("rb") as file:
            return file.read(512)
    except OSError:
        return b""


def _guess(address: str, remote: bool) -> str:
    """Describe what a file that no reader opens may be."""
    if remote:
        return "no reader can open this address"
    head = _head(address)
    if head[:4] in TIFF_MAGIC:
        return "no reader can open this TIFF: damaged, truncated (compare its size with the original), or of an unknown kind"
    if all(byte >= 32 or byte in b"\t\n\r\f" for byte in head):
        return "this is a text file, not a slide"
    return "no reader can open this file"
