"""JSON documents of users: plain, gzip (also multi-member) or a zip of documents, recognised by content."""

from __future__ import annotations

import gzip
import io
import lzma
import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, Any

from wsiseg.runtime.text import MAX_BYTES, decode, read_content, show

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from wsiseg.errors import WsisegError

#: What the standard library raises on damaged archives.
DAMAGED = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, struct.error, zipfile.BadZipFile)
DOCUMENT_SUFFIXES = (".geojson", ".json", ".tsv", ".csv", ".txt")
GEOMETRY_TYPES = (
    "Point",
    "MultiPoint",
    "LineString",
    "MultiLineString",
    "Polygon",
    "MultiPolygon",
    "GeometryCollection",
)
QUPATH_TYPES = frozenset({"FeatureCollection", "Feature", *GEOMETRY_TYPES})


def read_texts(path: Path, error: type[WsisegError], *, utf8_only: bool = False) -> Iterator[tuple[str, str]]:
    """Each document of a file, one at a time.

    Parameters
    ----------
    path
        Text, gzip or zip; entries of a zip that are not ``.geojson``, ``.json``, ``.tsv``, ``.csv`` or ``.txt`` are skipped.
    error
        The class to raise when it cannot be read.
    utf8_only
        Refuse UTF-16, as QuPath does.

    Yields
    ------
    tuple of (str, str)
        Place of the document (``seeds.zip: points.geojson``), and its text.
    """
    content = read_content(path, error)
    if content[:2] == b"\x1f\x8b":
        content = _unpack(gzip.GzipFile(fileobj=io.BytesIO(content)), str(path), error)
        yield str(path), decode(content, str(path), error, utf8_only=utf8_only)
    elif content[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
        yield from _zip_texts(path, content, error, utf8_only=utf8_only)
    else:
        yield str(path), decode(content, str(path), error, utf8_only=utf8_only)


def iter_features(document: object, place: str, error: type[WsisegError]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every Feature of a GeoJSON document with its children, and the place of each in the document.

    Parameters
    ----------
    document
        FeatureCollection, array of Features, single Feature, or a bare geometry (given as a Feature without properties).
    place, error
        Place of the document, and the class to raise when it is none of these, or a member has the wrong type.

    Yields
    ------
    tuple of (str, dict)
        ``features[3].properties.childObjects[0]``, and the Feature; its ``properties`` are an object or absent.
    """
    kind = document.get("type") if isinstance(document, dict) else None
    if isinstance(document, list):
        levels = [_listed(document, "")]
    elif isinstance(document, dict) and kind == "FeatureCollection" and isinstance(document.get("features"), list):
        levels = [_listed(document["features"], "features")]
    elif kind == "Feature":
        levels = [iter([("Feature", document)])]
    elif isinstance(kind, str) and kind in GEOMETRY_TYPES:
        levels = [iter([(kind, {"type": "Feature", "geometry": document})])]
    else:
        raise error(
            f"{place}: not GeoJSON; a FeatureCollection with 'features', an array of Features or one Feature is needed"
        )
    while levels:  # a stack instead of recursion: children may be nested deeper than Python calls may
        inside, item = next(levels[-1], (None, None))
        if inside is None:
            levels.pop()
            continue
        feature = _feature(item, f"{place}: {inside}", error)
        yield inside, feature
        for key in ("children", "childObjects"):
            children = (feature.get("properties") or {}).get(key)
            if children is not None and not isinstance(children, list):
                raise error(f"{place}: {inside}.properties.{key}: found {show(children)}; a list of Features is needed")
            if children:
                levels.append(_listed(children, f"{inside}.properties.{key}"))


def class_name(value: object, place: str, error: type[WsisegError]) -> str:
    """Name of a QuPath classification in any of its forms since 0.2; empty: unclassified.

    Raises
    ------
    WsisegError
        An ``error``: the value is not a classification.
    """
    parts: list[str] = []
    while isinstance(value, dict):
        names = value.get("names")
        found = names if isinstance(names, list) else [value.get("name")]
        if not all(part is None or isinstance(part, str | int | float) for part in found):
            raise error(
                f"{place}.properties.classification: {show(value)} has a name that is not text; export the file again"
            )
        parts.insert(0, ": ".join("" if part is None else str(part) for part in found))
        value = value.get("parentClass")
    if isinstance(value, str):
        parts.insert(0, value)
    elif value is not None:
        raise error(f"{place}.properties.classification: {show(value)} is not a class; export the file again")
    return ": ".join(parts).strip()


def _listed(items: list[Any], prefix: str) -> Iterator[tuple[str | None, Any]]:
    return ((f"{prefix}[{index}]", item) for index, item in enumerate(items))


def _feature(item: object, where: str, error: type[WsisegError]) -> dict[str, Any]:
    if not isinstance(item, dict) or item.get("type", "Feature") != "Feature":
        found = f"an object of type {show(item.get('type'))}" if isinstance(item, dict) else show(item)
        raise error(f"{where}: {found} is not a GeoJSON Feature; export the file again")
    if not isinstance(item.get("properties"), dict | None):
        raise error(
            f"{where}.properties: found {show(item['properties'])}; an object is needed, or null; export the file again"
        )
    return item


def _zip_texts(path: Path, content: bytes, error: type[WsisegError], *, utf8_only: bool) -> Iterator[tuple[str, str]]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            names = [
                n for n in archive.namelist() if n.lower().endswith(DOCUMENT_SUFFIXES) and not n.startswith("__MACOSX/")
            ]
            if "xl/workbook.xml" in archive.namelist():
                raise error(f"{path}: this is an Excel workbook, not text; save the sheet as CSV UTF-8")
            if not names:
                raise error(f"{path}: the zip holds no .geojson or .json; export from QuPath again")
            for name in names:
                place = f"{path}: {name}"
                with archive.open(name) as entry:
                    text = decode(_unpack(entry, place, error), place, error, utf8_only=utf8_only)
                yield place, text
    except (*DAMAGED, NotImplementedError, RuntimeError, LookupError) as problem:
        if isinstance(problem, error):
            raise
        raise error(f"{path}: damaged or encrypted zip ({problem}); copy or export it again") from problem


def _unpack(stream: Any, place: str, error: type[WsisegError]) -> bytes:  # noqa: ANN401
    try:
        content: bytes = stream.read(MAX_BYTES + 1)
    except DAMAGED as problem:
        raise error(f"{place}: damaged compressed data ({problem}); copy or export the file again") from problem
    if len(content) > MAX_BYTES:
        raise error(f"{place}: more than {MAX_BYTES >> 30} GiB once unpacked; split the file")
    return content
