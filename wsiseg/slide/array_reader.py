"""An image in memory as a slide of one level."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

import numpy as np

from wsiseg.errors import SlideError
from wsiseg.records import SlideInfo
from wsiseg.slide.resample import read_padded

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.geometry import Box


class ArrayReader:
    """A uint8 RGB array of shape (H, W, 3) at ``mpp`` microns per pixel.

    Raises
    ------
    SlideError
        The array has another shape or type.
    """

    def __init__(self, image: NDArray[np.uint8], mpp: float, name: str = "image") -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or not image.size:
            raise SlideError(
                f"{name}: an array of shape {image.shape} and type {image.dtype}; a uint8 RGB array of shape (H, W, 3) is needed"
            )
        self._image = image
        size = (image.shape[1], image.shape[0])
        self.info = SlideInfo(
            path=name,
            reader="image",
            format="array",
            level_sizes=(size,),
            downsamples=(1.0,),
            mpp=mpp,
            mpp_source="given with the array",
        )

    def read(self, level: int, box: Box) -> NDArray[np.uint8]:
        """Pixels of ``box``, white outside; the only level is 0."""
        if level != 0:
            raise SlideError(f"{self.info.path}: level {level} does not exist; an array has level 0 only")
        return read_padded(box, self.info.size_px0, lambda b: self._image[b.y0 : b.y1, b.x0 : b.x1])

    def close(self) -> None:
        """Do nothing: there is nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
