"""Segment and type one image in memory, and count the cells of each type: python segment_image.py"""

from skimage import data

import wsiseg

# An immunohistochemistry of colon glands that ships with scikit-image: uint8 RGB of shape (512, 512, 3).
image = data.immunohistochemistry()

# Clicks on nuclei, in px of the image; a dict or the path of a seeds.json would do as well.
seeds = wsiseg.Seeds(
    (
        wsiseg.SeedType("epithelium", color=(200, 80, 0), points=((310, 127), (424, 112))),
        wsiseg.SeedType("stroma", color=(0, 140, 60), points=((189, 356), (332, 270))),
        wsiseg.SeedType("immune", color=(0, 80, 200), points=((296, 280), (195, 452))),
    )
)

cells = wsiseg.segment_image(image, mpp=0.5, seeds=seeds)

for name, count in cells.count().items():
    print(f"{name:12} {count:4}")
print(f"{'all':12} {len(cells):4}")
