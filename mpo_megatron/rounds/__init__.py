"""Rounds of sampling, scoring and training, each from the policy that the last one has made; see docs/rounds.md."""
