"""Matching of clicks to cells, and pictures of them."""
