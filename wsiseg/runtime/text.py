"""Text of users, whatever program wrote it: bytes to text, text to JSON, and suggestions for misspelt words."""

from __future__ import annotations

import difflib
import json
import re
import unicodedata
from typing import TYPE_CHECKING, Any

from wsiseg.runtime.paths import require_regular, require_text

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from wsiseg.errors import WsisegError

MAX_BYTES = 4 << 30  #: of one document once unpacked; the largest honest file of ours (100,000 cells) has about 0.1 GB
SHOWN = 40  #: characters of a value in a message

#: What a file that is not text begins with, and what to call it.
_KINDS = (
    (rb"\x89PNG", "a picture (PNG)"),
    (rb"\xff\xd8\xff", "a picture (JPEG)"),
    (rb"(II[*+]\x00|MM\x00[*+])", "a picture (TIFF)"),
    (rb"GIF8[79]a", "a picture (GIF)"),
    (rb"BM.{4}\x00{4}", "a picture (BMP)"),
    (rb"RIFF.{4}WEBP", "a picture (WebP)"),
    (rb"(\x00\x00\x00\x0cjP  |\xff\x4f\xff\x51)", "a picture (JPEG 2000)"),
    (rb".{128}DICM", "a picture (DICOM)"),
    (rb"%PDF-", "a PDF"),
    (rb"PAR1", "a Parquet table"),
    (rb"\x89HDF", "an HDF5 file"),
    (rb"\x93NUMPY", "a NumPy array"),
    (rb"SQLite format 3\x00", "a database (SQLite)"),
    (rb"\xd0\xcf\x11\xe0", "an old Excel or Word file"),
)
_PACKED = ((rb"PK\x03\x04|PK\x05\x06", "a zip archive or an Excel workbook"), (rb"\x1f\x8b", "compressed data (gzip)"))
#: Byte order marks. The first that fits counts: that of UTF-32 begins as one of UTF-16 does.
_MARKS = (
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)
#: Between the digits of other scripts: minus signs, the Arabic decimal separator, marks of direction.
_MINUS_AND_POINT = {"\u2212": "-", "\u066b": ".", "\u200e": "", "\u200f": "", "\u061c": ""}


def read_content(path: Path, error: type[WsisegError]) -> bytes:
    """The bytes of a file that should be text, or text that is packed.

    Raises
    ------
    WsisegError
        An ``error``: it cannot be read, is too large, or begins as a picture or another known kind of file does.
    """
    require_text(path, error)
    try:
        require_regular(path)
        with path.open("rb") as stream:
            _refuse_kinds(stream.peek(512), str(path), error)  # a slide given by mistake is not read whole
            content = stream.read(MAX_BYTES + 1)
    except OSError as problem:
        raise error(
            f"{path}: cannot be read ({problem.strerror or problem}); check the path and its permissions"
        ) from problem
    if len(content) > MAX_BYTES:
        raise error(f"{path}: more than {MAX_BYTES >> 30} GiB; split the file")
    return content


def read_text(path: Path, error: type[WsisegError]) -> str:
    """The text of a file; see :func:`decode`."""
    return decode(read_content(path, error), str(path), error)


def decode(content: bytes, place: str, error: type[WsisegError], *, utf8_only: bool = False) -> str:
    r"""Bytes as text: UTF-8 with or without a byte order mark, UTF-16 and UTF-32 (unless ``utf8_only``) with one; line ends as ``\n``.

    Raises
    ------
    WsisegError
        An ``error``: not text, in another encoding, empty, or with NUL characters.
    """
    _refuse_kinds(content[:512], place, error, _PACKED)
    encoding = "utf-8" if utf8_only else next((name for mark, name in _MARKS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding).removeprefix("\ufeff")
    except UnicodeDecodeError as problem:
        raise error(f"{place}: not {encoding.upper()} text (byte {problem.start}); save it as UTF-8") from problem
    if "\0" in text:
        raise error(
            f"{place}: NUL characters in it, the first is number {text.index(chr(0)) + 1}; save it as UTF-8 text"
        )
    if not text.strip():
        raise error(f"{place}: the file is empty; write or export it again")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(
    text: str, place: str, error: type[WsisegError], *, unique_keys: bool = False, any_digits: bool = False
) -> Any:  # noqa: ANN401
    """The document as Python objects; literal ``NaN`` and ``Infinity`` (QuPath 0.4) are read as numbers.

    Parameters
    ----------
    text, place
        The document and where it is.
    error
        The class to raise when it is not JSON.
    unique_keys
        Refuse an object that has the same key twice (QuPath writes such objects, wsiseg does not).
    any_digits
        Read the digits of other scripts as numbers, too: QuPath writes colours in those of the system's language (``[٢٠٠, ٠, ٠]``).
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(items)
        if len(members) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise error(f"{place}: the key {twice[:SHOWN]!r} appears twice in one object; keep one of the two")
        return members

    if any_digits and not text.isascii():
        text = _with_ascii_digits(text)
    try:
        document = json.loads(text, object_pairs_hook=pairs if unique_keys else None)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a surrogate pair can be neither printed nor written
            json.dumps(document, ensure_ascii=False).encode()
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{place}: not JSON at {where} ({problem.msg}); repair it there or export it again") from problem
    except UnicodeEncodeError as problem:
        raise error(
            f"{place}: half a character ({show(problem.object[problem.start])}) in a text; write the whole character"
        ) from problem
    except (RecursionError, ValueError) as problem:
        if isinstance(problem, error):
            raise
        raise error(
            f"{place}: not JSON that can be read (nested too deep, or a number too long); export it again"
        ) from problem
    return document


def _with_ascii_digits(text: str) -> str:
    """JSON with the digits outside of its texts as ASCII has them, and without marks of direction between them."""

    def ascii_of(found: re.Match[str]) -> str:
        character = found[0]
        if character[0] == '"':
            return character
        if character in _MINUS_AND_POINT:
            return _MINUS_AND_POINT[character]
        return str(unicodedata.decimal(character, character))

    return re.sub(r'"(?:[^"\\]|\\.)*"|[^\x00-\x7f]', ascii_of, text, flags=re.DOTALL)


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """``"did you mean 'cop'? "`` where a word is nearly an allowed one, else nothing."""
    by_case = {name.casefold(): name for name in allowed}
    near = (
        difflib.get_close_matches(str(word)[:100].strip().casefold(), by_case, n=1, cutoff=0.6)
        if isinstance(word, str)
        else []
    )
    return f"did you mean {by_case[near[0]]!r}? " if near else ""


def first_line(error: BaseException) -> str:
    r"""First line of the message of a library's error; its class where there is no message.

    Examples
    --------
    >>> first_line(ValueError("bad header\nat byte 3"))
    'bad header'
    >>> first_line(ValueError())
    'ValueError'
    """
    return (str(error).splitlines() or [""])[0] or type(error).__name__


def show(value: object) -> str:
    """``value`` as JSON, at most ``SHOWN`` characters of it."""
    try:
        text = json.dumps(value, ensure_ascii=True, default=str)
    except (RecursionError, ValueError):
        text = f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _refuse_kinds(head: bytes, place: str, error: type[WsisegError], more: tuple[tuple[bytes, str], ...] = ()) -> None:
    for pattern, kind in (*_KINDS, *more):
        if re.match(pattern, head, re.DOTALL):
            raise error(f"{place}: this is {kind}, not text; check the path")
