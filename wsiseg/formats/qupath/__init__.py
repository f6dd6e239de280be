"""What QuPath reads and writes."""
