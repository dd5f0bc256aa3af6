"""Targets: what a network predicts for an image (a class, several labels, numbers), and everything that follows from it."""

from hf_transfer.targets import multi_label, regression, single_label  # registers the targets of this package

__all__ = ["multi_label", "regression", "single_label"]
