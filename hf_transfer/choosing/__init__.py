"""Chooses a checkpoint and a strategy from one pass of frozen networks over the images."""
