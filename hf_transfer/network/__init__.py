"""Loads a checkpoint, traces its network, splits the network at cuts, and names its layers."""
