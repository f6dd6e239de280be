"""Chain-of-Prompts as published, on one image: guard, non-maximum suppression, painting, and the whole form on real nuclei."""

from __future__ import annotations

import numpy as np
import pytest
from skimage import data

from wsiseg.config import COP_FORMS
from wsiseg.errors import ConfigError
from wsiseg.records import Seeds, SeedType
from wsiseg.reference.chain_of_prompts import chain_image
from wsiseg.reference.cop_label_map import Canvas


def square(side: int) -> np.ndarray:
    return np.ones((side, side), bool)


def test_two_apart_are_both_accepted() -> None:
    canvas = Canvas.blank(40, 40)
    assert canvas.insert(square(10), 0.9, 0, 0)
    assert canvas.insert(square(10), 0.8, 20, 20)
    assert np.bincount(canvas.labels.ravel()).tolist() == [1400, 100, 100]


def test_the_same_cell_again_is_refused() -> None:
    """IoU 90 / 110 is above 0.5, IoU 50 / 150 is not."""
    canvas = Canvas.blank(40, 40)
    assert canvas.insert(square(10), 0.5, 0, 0)
    assert not canvas.insert(square(10), 0.9, 1, 0)
    assert canvas.insert(square(10), 0.9, 5, 0)


def test_a_mask_over_two_cells_is_refused() -> None:
    canvas = Canvas.blank(40, 40)
    canvas.insert(square(10), 0.5, 0, 0)
    canvas.insert(square(10), 0.5, 12, 0)
    assert not canvas.insert(square(30), 0.99, 0, 0)
    assert len(canvas.areas) == 2


def test_the_better_mask_takes_the_contested_pixels() -> None:
    canvas = Canvas.blank(40, 40)
    canvas.insert(square(10), 0.5, 0, 0)
    canvas.insert(square(10), 0.9, 6, 0)
    assert (canvas.labels[:10, 6:10] == 2).all()
    canvas.insert(square(10), 0.2, -4, 6)
    assert (canvas.labels[6:10, :6] == 1).all()
    assert (canvas.labels[10:16, :6] == 3).all()


def test_areas_stay_what_they_were() -> None:
    """A cell that has lost pixels is still compared by its first area: 50 / (100 + 100 - 50) is below 0.5."""
    canvas = Canvas.blank(40, 40)
    canvas.insert(square(10), 0.5, 0, 0)
    canvas.insert(square(10), 0.9, 5, 0)
    assert canvas.areas == [100, 100]
    assert canvas.labels[0, 7] == 2


def test_windows_hang_over_the_edges() -> None:
    canvas = Canvas.blank(20, 30)
    assert canvas.insert(square(10), 0.5, -5, -4)
    assert canvas.insert(square(10), 0.5, 25, 15)
    assert canvas.areas == [30, 25]
    assert not canvas.insert(square(10), 0.5, 40, 0)
    assert not canvas.insert(square(10), 0.5, -10, 0)


@pytest.mark.parametrize("like", ["paper", "demo"])
def test_one_click_finds_many_nuclei_and_the_first_type_claims_them(like: str) -> None:
    """The documented weakness of the published rule: the second type only gets what the first one has left."""
    image = data.immunohistochemistry()[200:400, 120:376]
    first, second = SeedType("stroma", (0, 0, 0), ((69.0, 156.0),)), SeedType("immune", (0, 0, 0), ((176.0, 80.0),))
    labels, types, points = chain_image(image, mpp=0.5, seeds=Seeds((first, second), "test"), like=like)
    turned, other, _ = chain_image(image, mpp=0.5, seeds=Seeds((second, first), "test"), like=like)
    assert labels.shape == turned.shape == (400, 512)
    assert labels.max() == len(types) == len(points) > 10
    if like == "paper":  # the demo's stricter gate finds few here, and they do not meet
        assert (types == 0).sum() + (other == 0).sum() > (types == 1).sum() + (
            other == 1
        ).sum()  # each type clicked first, and second
    assert np.hypot(*(points[0] - np.array([138.0, 312.0]))) < 1


def test_an_unknown_form_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose from wsiseg, paper, demo"):
        chain_image(np.zeros((32, 32, 3), np.uint8), mpp=0.5, seeds=Seeds((), "test"), like="mine")
    assert COP_FORMS["paper"].gate == "product"
