"""Stitching of the outlines of all tiles into the cells of a slide."""
