"""A grid of points over the slide: the prompts of SAM's automatic mask generator [1]_, for models without instance maps.

References
----------
.. [1] Kirillov et al.: Segment Anything, ICCV 2023, arXiv:2304.02643, appendix B.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from wsiseg.geometry import Box


def grid_points(core: Box, spacing_px: float) -> NDArray[np.float64]:
    """Points (N, 2) of the slide's one grid that lie in ``core``; x, y in model px of the slide, corner frame."""
    lines = [
        (np.arange(np.ceil(low / spacing_px - 0.5), np.ceil(high / spacing_px - 0.5)) + 0.5) * spacing_px
        for low, high in ((core.x0, core.x1), (core.y0, core.y1))
    ]
    return np.stack(np.meshgrid(*lines), -1).reshape(-1, 2)
