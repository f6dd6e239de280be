"""Every way to store a picture in a TIFF: it is read as the picture that made it, or refused by name. No third outcome.

``python tests/test_tiff_matrix.py`` prints the table of docs/formats.md.
"""

from __future__ import annotations

import itertools
import re
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile

from wsiseg.errors import SlideError
from wsiseg.geometry import Box
from wsiseg.slide import open_slide

NUMBERS = ("uint8", "10 bits in uint16", "uint16", "int16", "float32")
MODELS = ("RGB", "grey", "palette", "CMYK", "YCbCr", "RGBA")
COMPRESSIONS = ("none", "LZW", "deflate", "ZSTD", "JPEG")
ORIENTATIONS = (1, 3, 6)
OPTIONS = {"none": None, "LZW": "lzw", "deflate": "zlib", "ZSTD": "zstd", "JPEG": "jpeg"}
DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
HEIGHT, WIDTH = 80, 112  # neither is a multiple of a tile


def picture() -> np.ndarray:
    """H&E-like: pale glass that reaches 255, nothing black; smooth, for JPEG. uint8 of shape (HEIGHT, WIDTH, 3)."""
    y, x = np.mgrid[0:HEIGHT, 0:WIDTH]
    waves = [
        190 + 65 * np.sin(x / 9) * np.cos(y / 12),
        150 + 80 * np.cos(x / 8 + y / 15),
        175 + 60 * np.sin((x + 2 * y) / 21),
    ]
    return np.clip(np.stack(waves, axis=-1).round(), 60, 255).astype(np.uint8)


def numbered(values: np.ndarray, numbers: str) -> np.ndarray:
    """Values from 0 to 255 as the number type has them."""
    scale, kind = {
        "uint8": (1.0, np.uint8),
        "10 bits in uint16": (1023 / 255, np.uint16),
        "uint16": (257.0, np.uint16),
        "int16": (100.0, np.int16),
        "float32": (1 / 255, np.float32),
    }[numbers]
    scaled = values.astype(np.float64) * scale
    return scaled.astype(kind) if kind == np.float32 else scaled.round().astype(kind)


def ycbcr(rgb: np.ndarray) -> np.ndarray:
    red, green, blue = np.moveaxis(rgb.astype(float), 2, 0)
    y = 0.299 * red + 0.587 * green + 0.114 * blue
    return np.clip(np.stack([y, (blue - y) / 1.772 + 128, (red - y) / 1.402 + 128], axis=2).round(), 0, 255)


def stored(model: str, numbers: str, compression: str) -> tuple[np.ndarray, dict[str, object], np.ndarray]:
    """Array to write, how to, and the RGB that must come out."""
    rgb = picture()
    if model == "grey":
        return (
            numbered(rgb[..., :1], numbers)[..., 0],
            {"photometric": "minisblack"},
            np.repeat(rgb[..., :1], 3, axis=2),
        )
    if model == "palette":
        index = rgb[..., 0] // 8
        step = {"uint8": 1, "10 bits in uint16": 31, "uint16": 2000}.get(numbers, 1)
        table = np.zeros((3, 256 if numbers == "uint8" else 65536), np.uint16)
        colours = np.stack([np.arange(32) * 8, 255 - np.arange(32) * 3, 100 + np.arange(32)])
        table[:, np.arange(32) * step] = colours * 257
        kind = {"uint8": np.uint8, "int16": np.int16, "float32": np.float32}.get(numbers, np.uint16)
        return (
            (index.astype(int) * step).astype(kind),
            {"photometric": "palette", "colormap": table},
            colours.T[index].astype(np.uint8),
        )
    if model == "CMYK":
        black = np.zeros((HEIGHT, WIDTH, 1), np.uint8)
        black[:, WIDTH // 2 :] = 40
        inks = np.concatenate([255 - rgb, black], axis=2)
        return (
            numbered(inks, numbers),
            {"photometric": "separated"},
            ((rgb * (255.0 - black)) / 255).round().astype(np.uint8),
        )
    if model == "YCbCr":
        return numbered(ycbcr(rgb), numbers), {"photometric": "ycbcr"}, rgb
    if model == "RGBA":
        opacity = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
        opacity[:20] = np.linspace(0, 255, WIDTH).round()[None, :, None]
        blended = (rgb * (opacity / 255.0) + (255 - opacity)).round().astype(np.uint8)
        return (
            numbered(np.concatenate([rgb, opacity], axis=2), numbers),
            {"photometric": "rgb", "extrasamples": ["unassalpha"]},
            blended,
        )
    return numbered(rgb, numbers), {"photometric": "rgb"}, rgb


def write(
    path: Path, model: str, numbers: str, compression: str, tiled: bool, planar: bool, orientation: int
) -> np.ndarray | None:
    """The RGB that must come out; ``None`` when a TIFF cannot be so."""
    pixels, options, rgb = stored(model, numbers, compression)
    if planar and pixels.ndim == 2:
        return None  # one sample has no planes
    if compression == "JPEG" and (numbers != "uint8" or model == "palette"):
        return None
    if planar:
        pixels, options = np.moveaxis(pixels, -1, 0), options | {"planarconfig": "separate"}
    chunks = {"tile": (48, 32)} if tiled else {"rowsperstrip": 32}
    if compression == "JPEG":
        options |= {"compressionargs": {"level": 95}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tifffile.imwrite(
                path,
                pixels,
                compression=OPTIONS[compression],
                metadata=None,
                resolution=(40000, 40000),
                resolutionunit="CENTIMETER",
                extratags=[(274, 3, 1, orientation, True)],
                **chunks,
                **options,
            )
    except (ValueError, TypeError):  # int16 and float palettes
        return None
    return rgb


def outcome(path: Path, rgb: np.ndarray, compression: str, orientation: int, reader: str = "auto") -> str:
    """``read``, or the reason of the refusal; anything else fails."""
    try:
        slide = open_slide(path, reader=reader)
    except SlideError as error:
        said = str(error)
    else:
        said = ""
    if said:
        assert "\n" not in said
        assert "damaged" not in said
        found = re.search(r"its (?:colours|pixels)[^;]*?(?=\)?;|, which|$)", said)
        assert found, f"not refused by name: {said}"
        return f"refused: {found[0]}"
    with slide:
        assert slide.info.mpp == pytest.approx(0.25, rel=1e-3)
        assert slide.info.size_px0 == (WIDTH, HEIGHT)
        found = slide.read(0, Box(0, 0, WIDTH, HEIGHT)).astype(float)
        error = np.abs(found - rgb).mean()
        assert error < (6 if compression == "JPEG" else 2), f"read wrong by {error:.1f} grey levels: {slide.info}"
        assert (orientation != 1) == any("orientation" in note for note in slide.info.warnings), slide.info
        corner = slide.read(0, Box(70, 40, 100, 75))
        assert np.array_equal(corner, found[40:75, 70:100])
    return "read"


def outcomes(folder: Path, model: str, numbers: str, reader: str = "auto") -> dict[tuple[object, ...], str]:
    """Outcome per compression, layout and orientation; what cannot be written is left out."""
    verdicts = {}
    for number, combination in enumerate(itertools.product(COMPRESSIONS, (False, True), (False, True), ORIENTATIONS)):
        path = folder / f"{number}.tif"
        compression, tiled, planar, orientation = combination
        rgb = write(path, model, numbers, compression, tiled, planar, orientation)
        if rgb is not None:
            try:
                verdicts[combination] = outcome(path, rgb, compression, orientation, reader)
            except AssertionError as error:
                raise AssertionError(f"{model}, {numbers}, {combination}, {reader}: {error}") from error
    return verdicts


def cell(verdicts: dict[tuple[object, ...], str]) -> str:
    """What the table says of a number type and a colour model."""
    if not verdicts:
        return "not a TIFF"
    if set(verdicts.values()) == {"read"}:
        return "read"
    if "read" not in verdicts.values():
        return "refused"
    exceptions = {
        f"{c} {'planar' if p else 'chunky'}" for (c, _, p, _), verdict in verdicts.items() if verdict != "read"
    }
    return f"read; refused: {', '.join(sorted(exceptions))}"


def table(folder: Path) -> str:
    rows = [f"| {' | '.join(('', *NUMBERS))} |", f"|{'---|' * (len(NUMBERS) + 1)}"]
    for model in MODELS:
        cells = []
        for numbers in NUMBERS:
            place = Path(tempfile.mkdtemp(dir=folder))
            cells.append(cell(outcomes(place, model, numbers)))
        rows.append(f"| {model} | {' | '.join(cells)} |")
    return "\n".join(rows)


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("model", MODELS)
def test_a_tiff_is_read_as_the_array_that_made_it_or_refused_by_name(tmp_path, model, numbers):
    verdicts = outcomes(tmp_path, model, numbers)
    row = next(line for line in DOCS.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {model} |"))
    assert cell(verdicts) == row.split("|")[2 + NUMBERS.index(numbers)].strip()


@pytest.mark.parametrize("reader", ["openslide", "tiffslide", "image"])
@pytest.mark.parametrize("model", MODELS)
def test_a_reader_that_is_asked_for_is_right_too_or_refuses(tmp_path, model, reader):
    for combination in itertools.product(
        ("uint8", "int16"), ("none", "LZW", "JPEG"), (False, True), (False, True), (1, 6)
    ):
        numbers, compression, tiled, planar, orientation = combination
        rgb = write(tmp_path / "a.tif", model, numbers, compression, tiled, planar, orientation)
        if rgb is None:
            continue
        try:
            slide = open_slide(tmp_path / "a.tif", reader=reader)
        except SlideError as error:
            assert "\n" not in str(error)  # noqa: PT017
            continue
        slide.close()
        try:
            assert outcome(tmp_path / "a.tif", rgb, compression, orientation, reader) == "read", combination
        except SlideError as error:  # opened, but not decoded
            assert "openslide cannot read" in str(error)  # noqa: PT017
            assert "tiffslide can; pass --reader tiffslide" in str(error)  # noqa: PT017


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        print(table(Path(scratch)))
