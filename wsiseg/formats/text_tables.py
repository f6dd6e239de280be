"""Text tables of users: comma, semicolon or tab, decimal point or comma, any case of names, as spreadsheets write them."""

from __future__ import annotations

import csv
import io
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wsiseg.runtime.text import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Iterable

    from wsiseg.errors import WsisegError

DELIMITERS = ",;\t"
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
#: Blank lines, and Excel's way to say the delimiter.
_FIRST = re.compile(r"(?:[ \t]*\n)*(?:\"?sep=(?P<delimiter>.)\"?[^\n]*\n(?:[ \t]*\n)*)?", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table as text.

    Attributes
    ----------
    place
        The file, for messages.
    columns
        Names in lower case, without blanks at their ends; empty for a column without a name.
    rows
        Line number in the file, counted from 1, and the cells by column; rows without any text are left out.
    decimal_comma
        Whether ``0,25`` is a quarter.
    """

    place: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, dict[str, str]], ...]
    decimal_comma: bool

    def number(self, cell: str) -> float | None:
        """The number in a cell; ``None`` where there is none. ``nan`` and ``inf`` are numbers."""
        if self.decimal_comma and cell.count(",") == 1 and "." not in cell:
            cell = cell.replace(",", ".")
        return float(cell) if _NUMBER.fullmatch(cell) else None


def read_table(
    text: str, place: str, error: type[WsisegError], *, known: Iterable[str], numbers: Iterable[str] = ()
) -> TextTable:
    """Read a table whose first line names the columns.

    Parameters
    ----------
    text, place
        A text from :func:`wsiseg.runtime.text.decode`, and the name of its file.
    error
        The class to raise when it is not such a table.
    known
        Columns that the caller looks at: none of them may be there twice, and the delimiter is the one that finds most of them.
    numbers
        Columns of numbers. A comma in them is a decimal comma unless commas separate the columns or another number has a point.
    """
    known = tuple(known)
    start, delimiter, names = _head(text, known)
    first_line = text.count("\n", 0, start)
    reader = csv.reader(io.StringIO(text[start:], newline=""), delimiter=delimiter, skipinitialspace=True)
    columns = tuple(names)
    for name in known:
        if columns.count(name) > 1:
            raise error(
                f"{place}: line {first_line + 1}: the column {name!r} appears {columns.count(name)} times; name each column once"
            )
    rows: list[tuple[int, dict[str, str]]] = []
    points = commas = False
    try:
        next(reader, None)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            line = first_line + reader.line_num
            if any(cells[len(columns) :]):
                raise error(
                    f"{place}: line {line}: {len(cells)} cells for {len(columns)} columns; name all columns in the first line, and quote "
                    "what has the separator in it (a decimal comma needs ';' or tabs between the columns)"
                )
            found = {name: cell for name, cell in zip(columns, cells, strict=False) if name or cell}
            rows.append((line, found))
            points = points or any("." in found.get(name, "") for name in numbers)
            commas = commas or any("," in found.get(name, "") for name in numbers)
    except csv.Error as problem:
        raise error(
            f"{place}: not a CSV file ({problem}); a first line that names the columns and one line per row are needed"
        ) from problem
    return TextTable(
        place=place, columns=columns, rows=tuple(rows), decimal_comma=commas and not points and delimiter != ","
    )


def columns_of(text: str, known: Iterable[str]) -> tuple[str, ...]:
    """The column names in the first line of a text, in lower case, as :func:`read_table` finds them."""
    return tuple(_head(text, tuple(known))[2])


def unknown_columns(columns: Iterable[str], known: tuple[str, ...]) -> str:
    """``column 'slide'; did you mean 'path'? `` of the first column that is not known; empty when all are."""
    wrong = next((name for name in columns if name and name not in known), None)
    return "" if wrong is None else f"column {wrong[:40]!r}; {did_you_mean(wrong, known)}"


def _head(text: str, known: tuple[str, ...]) -> tuple[int, str, list[str]]:
    """Start of the header line, the delimiter, and the names of the columns."""
    first = _FIRST.match(text)
    start, stated = (first.end(), first["delimiter"]) if first else (0, None)
    line = text[start:].split("\n", 1)[0][:100_000]
    best: tuple[tuple[int, int], str, list[str]] = ((-1, -1), ",", [])
    for delimiter in [stated] if stated in tuple(DELIMITERS) else DELIMITERS:
        try:
            cells = next(csv.reader([line], delimiter=delimiter, skipinitialspace=True), [])
        except csv.Error:
            continue
        names = [cell.strip().lower() for cell in cells]
        score = (len(set(names) & set(known)), len(names))
        if score > best[0]:
            best = (score, delimiter, names)
    return start, best[1], best[2]
