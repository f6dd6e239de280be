"""QuPath's files: points, coordinates, and the rules of its import."""
