"""JSON that people bring: plain, gzip (also multi-member) or a zip of documents, recognised by content; UTF-8 with or without BOM."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

from wsiseg.paths import read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wsiseg.errors import WsisegError

MAX_BYTES = 4 << 30  #: of one document once unpacked; the largest honest file (500,000 cells) has about 0.5 GB
DOCUMENT_SUFFIXES = (".geojson", ".json", ".tsv", ".txt")
QUPATH_TYPES = frozenset({
    "FeatureCollection", "Feature", "Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon", "GeometryCollection",
})  # fmt: skip


def read_texts(path: Path, error: type[WsisegError]) -> Iterator[tuple[str, str]]:
    """Each document of a file, one at a time.

    Parameters
    ----------
    path
        Text, gzip or zip; entries of a zip that are no ``.geojson``, ``.json``, ``.tsv`` or ``.txt`` are passed over.
    error
        The class to raise when it cannot be read.

    Yields
    ------
    tuple of (str, str)
        Where the document is (``seeds.zip: points.geojson``), and its text.
    """
    try:
        content = read_bytes(path)
    except OSError as problem:
        raise error(f"{path}: cannot be read ({problem.strerror}); check the path and its permissions") from problem
    if content[:2] == b"\x1f\x8b":
        content = _unpack(gzip.GzipFile(fileobj=io.BytesIO(content)), str(path), error)
        yield str(path), _decode(content, str(path), error)
    elif content[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _zip_texts(path, content, error)
    else:
        yield str(path), _decode(content, str(path), error)


def parse_json(text: str, place: str, error: type[WsisegError], *, unique_keys: bool = False) -> Any:  # noqa: ANN401
    """The document as Python objects; literal ``NaN`` and ``Infinity`` (QuPath 0.4) are read as numbers.

    Parameters
    ----------
    text, place
        The document and where it is.
    error
        The class to raise when it is not JSON.
    unique_keys
        Refuse an object that has the same key twice (QuPath writes such objects, wsiseg does not).
    """

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        members = dict(items)
        if len(members) < len(items):
            keys = [key for key, _ in items]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise error(f"{place}: the key {twice!r} stands twice in one object; keep one of the two")
        return members

    try:
        return json.loads(text, object_pairs_hook=pairs if unique_keys else None)
    except json.JSONDecodeError as problem:
        where = f"line {problem.lineno}, column {problem.colno}"
        raise error(f"{place}: not JSON at {where} ({problem.msg}); repair it there or export it again") from problem
    except (RecursionError, ValueError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{place}: not JSON that can be read (nested too deep, or a number too long); export it again") from problem


def iter_features(document: object, place: str, error: type[WsisegError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Feature of a GeoJSON document with its children, and the place of each in the document.

    Parameters
    ----------
    document
        FeatureCollection, array of Features, single Feature, or a bare geometry (given as a Feature without properties).
    place, error
        Where the document is, and the class to raise when it is none of these.
    """
    if isinstance(document, list):
        yield from _features(document, place, "", error)
        return
    if isinstance(document, dict):
        kind = document.get("type")
        if kind == "FeatureCollection" and isinstance(document.get("features"), list):
            yield from _features(document["features"], place, "features", error)
            return
        if kind == "Feature":
            yield from _with_children(document, "Feature", place, error)
            return
        if isinstance(kind, str) and kind in QUPATH_TYPES and kind != "FeatureCollection":
            yield str(kind), {"type": "Feature", "geometry": document}
            return
    raise error(f"{place}: not GeoJSON; a FeatureCollection with 'features', an array of Features or one Feature is needed")


def _features(items: list[Any], place: str, prefix: str, error: type[WsisegError]) -> Iterator[tuple[str, dict[str, Any]]]:
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise error(f"{place}: {prefix}[{index}]: {json.dumps(item)[:40]} is no GeoJSON Feature; export the file again")
        yield from _with_children(item, f"{prefix}[{index}]", place, error)


def _with_children(item: dict[str, Any], inside: str, place: str, error: type[WsisegError]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield inside, item
    properties = item.get("properties")
    if isinstance(properties, dict):
        for key in ("childObjects", "children"):
            if isinstance(properties.get(key), list):
                yield from _features(properties[key], place, f"{inside}.properties.{key}", error)


def _zip_texts(path: Path, content: bytes, error: type[WsisegError]) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [n for n in archive.namelist() if n.lower().endswith(DOCUMENT_SUFFIXES) and not n.startswith("__MACOSX/")]
            if not names:
                raise error(f"{path}: the zip holds no .geojson or .json; export from QuPath again")
            for name in names:
                place = f"{path}: {name}"
                with archive.open(name) as entry:
                    text = _decode(_unpack(entry, place, error), place, error)
                yield place, text
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as problem:
        raise error(f"{path}: damaged or encrypted zip ({problem}); copy or export it again") from problem


def _unpack(stream: Any, place: str, error: type[WsisegError]) -> bytes:  # noqa: ANN401
    try:
        content: bytes = stream.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as problem:
        raise error(f"{place}: damaged compressed data ({problem}); copy or export the file again") from problem
    if len(content) > MAX_BYTES:
        raise error(f"{place}: more than {MAX_BYTES >> 30} GiB once unpacked; split the file")
    return content


def _decode(content: bytes, place: str, error: type[WsisegError]) -> str:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise error(f"{place}: not UTF-8 text (byte {problem.start}); save it as UTF-8") from problem
    if not text.strip():
        raise error(f"{place}: the file is empty; write or export it again")
    return text
