"""From the outlines of all tiles to the cells of a slide."""
