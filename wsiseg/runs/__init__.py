"""A slide's run from start to finish: plan, order of work, files, manifest."""
