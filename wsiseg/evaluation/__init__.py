"""How good is it: metrics of instance segmentation, each with its formula and source."""
