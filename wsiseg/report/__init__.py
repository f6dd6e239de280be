"""What is told about finished runs: the table of a cohort, and a page per run."""
