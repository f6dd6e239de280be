"""From descriptors and clicks to cell types."""
