"""A contact sheet of clicks: one small picture each, rows by type, a caption under it. Draws; it decides nothing about cells."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from wsiseg.records import SeedType

Color = tuple[int, int, int]

MANY = 96  #: panels from which on they are drawn smaller
SIDES = (
    192,
    128,
)  #: px of a panel's side: few, many; both show a nucleus with its neighbours, the smaller 500 of them on one sheet
COLUMNS = (8, 16)  #: at most in a row: few, many; the sheet is 1600 or 2200 px wide at most
MIN_COLUMNS = 4  #: room for the heading

_GAP = 8  # px between panels
_FRAME = 3  # px of the frame of a bad or doubtful click; inside the gap
_SMOOTH = 3  # lines are drawn this many times larger and averaged
_INK, _FAINT, _LINE, _PAPER = (20, 20, 20), (110, 110, 110), (200, 200, 200), (255, 255, 255)
_BAD, _DOUBTFUL = (220, 0, 0), (190, 110, 0)
_FAULT_LINES = 4
_BAR_UM = 10
#: Directions of a cross's arms; diagonal for a click against the type.
_ARMS = {False: ((1, 0), (0, 1), (-1, 0), (0, -1)), True: ((0.7, 0.7), (0.7, -0.7), (-0.7, 0.7), (-0.7, -0.7))}
_LEGEND = (
    "+ click; x negative click (outline dashed); outline: the cell that a run matches to the click; under it: name, the click's number, "
    "place in level-0 px, score (predicted IoU x stability). Red frame: a run refuses the click. Orange: the model finds no nucleus there."
)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One click. Lengths are px of the panel, origin at its outer corner.

    Attributes
    ----------
    kind, number
        Index of the type, and of its click (of its negative click if ``negative``), in the seeds file.
    negative
        True for a negative click.
    point
        The click, level-0 px.
    pixels
        uint8 RGB of shape (side, side, 3): what lies around the click.
    click_xy
        Position of the click in the panel.
    outline
        (K, 2), closed: the cell that the click means; ``None`` when there is none.
    score
        Predicted IoU x stability of the outline.
    fault
        Reason why a run would refuse the click; empty when it would not.
    doubt
        Reason why this may not be a nucleus; empty when the model finds one.
    """

    kind: int
    number: int
    negative: bool
    point: tuple[float, float]
    pixels: NDArray[np.uint8]
    click_xy: tuple[float, float]
    outline: NDArray[np.float64] | None
    score: float | None
    fault: str
    doubt: str = ""


def panel_side(count: int) -> int:
    """Side of a panel in px on a sheet of ``count`` panels."""
    return SIDES[count > MANY]


def draw_sheet(panels: Sequence[Panel], types: Sequence[SeedType], title: str, um_per_px: float) -> Image.Image:
    """Lay out the panels: a title, then for each type a heading and its panels, wrapped into rows.

    Parameters
    ----------
    panels
        All of side ``panel_side(len(panels))``, in the order in which they are drawn within their type.
    types
        Give names, colours and the number of clicks.
    title
        First line.
    um_per_px
        Scale of the panels.

    Returns
    -------
    Image
        RGB. 500 panels are about 2200 x 7000 px.
    """
    many = len(panels) > MANY
    side, most = panel_side(len(panels)), COLUMNS[many]
    by_type = [[p for p in panels if p.kind == t] for t in range(len(types))]
    columns = min(most, max(MIN_COLUMNS, *(len(group) for group in by_type)))
    rows = [(t, group[k : k + columns]) for t, group in enumerate(by_type) for k in range(0, len(group), columns)]
    pen = _SheetStyle(side, _font(10 if many else 12), _font(14))
    width = _GAP + columns * (side + _GAP)
    intro = [
        *_wrap(title, pen.large, width - 2 * _GAP, 3),
        *_wrap(_LEGEND, pen.small, width - 2 * _GAP - pen.bar(um_per_px), 3),
    ]
    heights = [pen.row_height(row) for _, row in rows]
    first_rows = {t: k for k, (t, _) in reversed(list(enumerate(rows)))}
    top = 2 * _GAP + len(intro) * pen.step(pen.large)
    sheet = Image.new("RGB", (width, top + sum(heights) + len(first_rows) * pen.heading_height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    pen.write_intro(draw, intro, um_per_px, width)
    for k, ((t, row), height) in enumerate(zip(rows, heights, strict=True)):
        if first_rows[t] == k:
            pen.write_heading(draw, top, t, types[t], len(by_type[t]))
            top += pen.heading_height
        for column, panel in enumerate(row):
            pen.place(sheet, draw, (_GAP + column * (side + _GAP), top), panel, types[t])
        top += height
    return sheet


@dataclass(frozen=True)
class _SheetStyle:
    """Sizes and fonts of one sheet."""

    side: int
    small: ImageFont.FreeTypeFont | ImageFont.ImageFont
    large: ImageFont.FreeTypeFont | ImageFont.ImageFont

    @staticmethod
    def step(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
        """Px from line to line."""
        return int(getattr(font, "size", 11) * 1.3) + 1

    @property
    def heading_height(self) -> int:
        return self.step(self.large) + _GAP

    @staticmethod
    def bar(um_per_px: float) -> int:
        """Px that the scale bar with its number takes at the right end of the introduction."""
        return round(_BAR_UM / um_per_px) + 2 * _GAP

    def row_height(self, row: Sequence[Panel]) -> int:
        """Panel, caption and gap; a caption is longer when a click of the row is bad."""
        lines = 2 + max(len(self.fault_lines(panel)) for panel in row)
        return self.side + _FRAME + lines * self.step(self.small) + _GAP

    def fault_lines(self, panel: Panel) -> list[str]:
        said = panel.fault or panel.doubt
        return _wrap(said, self.small, self.side, _FAULT_LINES) if said else []

    def write_intro(self, draw: ImageDraw.ImageDraw, lines: Sequence[str], um_per_px: float, width: int) -> None:
        for k, line in enumerate(lines):
            font = self.large if not k else self.small
            draw.text((_GAP, _GAP + k * self.step(self.large)), line, _INK if not k else _FAINT, font)
        length, right = round(_BAR_UM / um_per_px), width - _GAP
        bottom = _GAP + len(lines) * self.step(self.large)
        draw.rectangle((right - length, bottom - 5, right, bottom - 2), _INK)
        text = f"{_BAR_UM} um"
        draw.text(
            (right - draw.textlength(text, self.small), bottom - 8 - self.step(self.small)), text, _INK, self.small
        )

    def write_heading(self, draw: ImageDraw.ImageDraw, top: int, number: int, kind: SeedType, drawn: int) -> None:
        size = self.step(self.large)
        draw.rectangle((_GAP, top + 2, _GAP + size, top + size - 2), kind.color, _FAINT)
        total = len(kind.points) + len(kind.negative)
        text = f"types[{number}] {_printable(kind.name, self.large)}: {len(kind.points)} click{'s' if len(kind.points) != 1 else ''}"
        text += f", {len(kind.negative)} negative" if kind.negative else ""
        text += f" ({drawn} drawn)" if drawn < total else ""
        draw.text((2 * _GAP + size, top), text, _INK, self.large)

    def place(
        self, sheet: Image.Image, draw: ImageDraw.ImageDraw, corner: tuple[int, int], panel: Panel, kind: SeedType
    ) -> None:
        """Draw a panel with its caption."""
        x, y = corner
        alarm = _BAD if panel.fault else _DOUBTFUL if panel.doubt else None
        if alarm:
            draw.rectangle((x - _FRAME, y - _FRAME, x + self.side - 1 + _FRAME, y + self.side - 1 + _FRAME), alarm)
        else:
            draw.rectangle((x - 1, y - 1, x + self.side, y + self.side), _LINE)
        sheet.paste(_picture(panel, kind.color), corner)
        y += self.side + _FRAME
        name = f"not {kind.name}" if panel.negative else kind.name
        number = f"negative[{panel.number}]" if panel.negative else f"points[{panel.number}]"
        if draw.textlength(f"{name}  {number}", self.small) > self.side:
            number = f"[{panel.number}]"
        room = self.side - draw.textlength(f"  {number}", self.small)
        draw.text((x, y), _shortened(_printable(name, self.small), self.small, room), _INK, self.small)
        draw.text((x + self.side - draw.textlength(number, self.small), y), number, _FAINT, self.small)
        y += self.step(self.small)
        draw.text((x, y), "[{}, {}]".format(*(f"{c:.1f}".removesuffix(".0") for c in panel.point)), _INK, self.small)
        if panel.score is not None:
            score = f"{panel.score:.2f}"
            draw.text((x + self.side - draw.textlength(score, self.small), y), score, _INK, self.small)
        for line in self.fault_lines(panel):
            y += self.step(self.small)
            draw.text((x, y), line, alarm, self.small)


def _picture(panel: Panel, color: Color) -> Image.Image:
    """The pixels with outline and cross. Lines are drawn on an enlarged copy and averaged; the pixels between them stay as they are."""
    side = len(panel.pixels)
    image = Image.fromarray(panel.pixels).resize((side * _SMOOTH, side * _SMOOTH), Image.Resampling.NEAREST)
    draw = ImageDraw.Draw(image, "RGBA")
    if panel.outline is not None:
        # A light rim sets dark colours off from dark nuclei, a dark rim light colours from pale stroma.
        rim = (0, 0, 0, 110) if np.dot(color, (0.299, 0.587, 0.114)) > 140 else (255, 255, 255, 150)
        strokes = _dashes(panel.outline) if panel.negative else [panel.outline]
        for width, shade in ((10, rim), (5, (*color, 255))):
            for stroke in strokes:
                draw.line([(x * _SMOOTH, y * _SMOOTH) for x, y in stroke.tolist()], shade, width, joint="curve")
    x, y = panel.click_xy
    for width, shade in ((11, (255, 255, 255, 230)), (5, (0, 0, 0, 255))):
        for dx, dy in _ARMS[panel.negative]:
            # The place itself stays open: one sees what was clicked.
            ends = [((x + dx * r) * _SMOOTH, (y + dy * r) * _SMOOTH) for r in (3, 8)]
            draw.line(ends, shade, width)
    return image.reduce(_SMOOTH)


def _dashes(ring: NDArray[np.float64], dash: float = 5.0, gap: float = 4.0) -> list[NDArray[np.float64]]:
    """Pieces of a closed line (K, 2), ``dash`` px long and ``gap`` px apart."""
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(ring, axis=0).T))])
    pieces = []
    for start in np.arange(0.0, at[-1], dash + gap):
        stations = np.linspace(start, min(start + dash, at[-1]), 6)
        pieces.append(np.column_stack([np.interp(stations, at, ring[:, k]) for k in (0, 1)]))
    return pieces


# --- text -------------------------------------------------------------------------------------------------------------------------


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _printable(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """``text`` without the accents, and with ``?`` for the letters, that the font does not have; ``types[i]`` still tells the types apart."""
    missing = bytes(font.getmask("\uffff"))

    def known(letter: str) -> bool:
        return letter == " " or bytes(font.getmask(letter)) != missing

    plain = (letter if known(letter) else unicodedata.normalize("NFKD", letter)[0] for letter in text)
    return "".join(letter if known(letter) else "?" for letter in plain)


def _shortened(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """Beginning of a text, as much as fits, with ``...`` where it is cut."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float, most: int) -> list[str]:
    """At most ``most`` lines; what does not fit is cut off with ``...``."""
    lines: list[str] = []
    words = _printable(text, font).split()
    while words and len(lines) < most - 1:
        count = 1
        while count < len(words) and font.getlength(" ".join(words[: count + 1])) <= width:
            count += 1
        lines.append(_shortened(" ".join(words[:count]), font, width))
        words = words[count:]
    return [*lines, _shortened(" ".join(words), font, width)] if words else lines
