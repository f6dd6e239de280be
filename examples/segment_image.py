"""Segment and type one image in memory, and count the cells of each type: python segment_image.py"""

from collections import Counter

from skimage import data

from wsiseg import segment_image
from wsiseg.records import Seeds, SeedType

# An immunohistochemistry of colon glands that ships with scikit-image: uint8 RGB of shape (512, 512, 3).
image = data.immunohistochemistry()

# Clicks on nuclei, in px of the image; colours as QuPath would draw them.
seeds = Seeds(
    types=(
        SeedType("epithelium", color=(200, 80, 0), points=((310, 127), (424, 112))),
        SeedType("stroma", color=(0, 140, 60), points=((189, 356), (332, 270))),
        SeedType("immune", color=(0, 80, 200), points=((296, 280), (195, 452))),
    ),
    source="clicks of this script",
)

cells, typing = segment_image(image, mpp=0.5, seeds=seeds)

counts = Counter(typing.names[code] for code in typing.codes)
for name in typing.names:
    print(f"{name:12} {counts[name]:4}")
print(f"{'all':12} {len(cells):4}")
