"""Cell types from descriptors and clicks."""
