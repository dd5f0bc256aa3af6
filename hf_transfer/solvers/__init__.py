"""The solver of linear probes: convex problems on stored features, for many regularization strengths and folds at once."""
