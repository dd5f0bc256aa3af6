"""Finds wrong labels, duplicates and unusual images in a data set, from the features that the linear probe reads."""
