"""One training run for each member of a comparison, on the same groups, and what came of them side by side."""
