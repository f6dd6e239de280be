"""The published methods on one image, for comparison; none of them runs on slides."""
