"""Ranks checkpoints and recommends a strategy for a data set, from the features of frozen networks."""
