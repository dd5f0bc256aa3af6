"""The metrics of a network on one split: formulas, confidence intervals, and the records that every kind of target shares."""
