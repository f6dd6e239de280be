"""From the pixels of tiles to outlines in part files."""
