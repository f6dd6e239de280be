"""Parallel DEFLATE in pieces: one member of a gzip file, or the entries of a zip.

Every piece of ``PIECE`` bytes is compressed on its own and ends on a byte (Z_SYNC_FLUSH); an empty last block ends the stream. That is what
``pigz --independent`` writes, and to a reader it is one stream. The bytes depend on the text and the level alone: not on the threads, nor on
the portions in which the text arrives.

Specification: https://datatracker.ietf.org/doc/html/rfc1951, https://datatracker.ietf.org/doc/html/rfc1952
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import TYPE_CHECKING, BinaryIO

from wsiseg.runtime.prefetch import prefetch_map

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

PIECE = 1 << 21  #: bytes of text: few enough to hold several, and each is one turn at the interpreter's lock
THREADS = 2  #: zlib lets go of the interpreter's lock; two keep up with the thread that makes the text
GZIP_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\0\xff"  #: no name, no time, system unknown
LAST_BLOCK = b"\x03\0"  #: of a stream: empty


def write_gzip(file: BinaryIO, texts: Iterable[bytes], level: int) -> None:
    """Write a gzip file of one member.

    Parameters
    ----------
    file
        Open for writing.
    texts
        The content, in portions of any size.
    level
        zlib's compression level, 1 to 9.
    """
    stream = _Deflate(level)
    file.write(GZIP_HEADER)
    file.writelines(stream.pieces(texts))
    file.write(struct.pack("<LL", stream.crc, stream.size & 0xFFFFFFFF))


def write_entry(
    archive: zipfile.ZipFile, file: BinaryIO, entry: zipfile.ZipInfo, texts: Iterable[bytes], level: int
) -> None:
    """Write one more entry of a zip.

    Parameters
    ----------
    archive, file
        The zip, made with ``ZipFile(file, "w")``, and that file; it can be rewound.
    entry
        Name and attributes.
    texts, level
        As for :func:`write_gzip`.
    """
    stream = _Deflate(level)
    entry.compress_type = zipfile.ZIP_STORED  # zipfile passes on what is compressed already, and would know no better
    with archive.open(entry, "w") as member:
        for piece in stream.pieces(texts):
            member.write(piece)
    entry.compress_type, entry.CRC, entry.file_size = (
        zipfile.ZIP_DEFLATED,
        stream.crc,
        stream.size,
    )  # goes into the directory at the end
    end = file.tell()
    file.seek(entry.header_offset)
    file.write(entry.FileHeader(zip64=False))
    file.seek(end)


class _Deflate:
    """A stream being made; length and CRC-32 of the text so far."""

    def __init__(self, level: int) -> None:
        self.level, self.size, self.crc = level, 0, 0

    def pieces(self, texts: Iterable[bytes]) -> Iterator[bytes]:
        """The compressed stream."""
        yield from prefetch_map(self._compress, self._cut(texts), threads=THREADS, limit=THREADS + 1)
        yield LAST_BLOCK

    def _compress(self, piece: memoryview) -> bytes:
        deflate = zlib.compressobj(self.level, zlib.DEFLATED, -zlib.MAX_WBITS)
        return deflate.compress(piece) + deflate.flush(zlib.Z_SYNC_FLUSH)

    def _cut(self, texts: Iterable[bytes]) -> Iterator[memoryview]:
        """The text in pieces of exactly ``PIECE`` bytes, the last one shorter; counted here, in order."""
        held, size = [b""], 0
        for text in texts:
            held.append(text)
            size += len(text)
            if size >= PIECE:
                whole = b"".join(held)
                for start in range(0, size - PIECE + 1, PIECE):
                    yield self._counted(memoryview(whole)[start : start + PIECE])
                size %= PIECE
                held = [whole[len(whole) - size :]]
        if size:
            yield self._counted(memoryview(b"".join(held)))

    def _counted(self, piece: memoryview) -> memoryview:
        self.size += len(piece)
        self.crc = zlib.crc32(piece, self.crc)
        return piece
