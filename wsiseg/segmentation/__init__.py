"""Segmentation: pixels of tiles to outlines in part files."""
