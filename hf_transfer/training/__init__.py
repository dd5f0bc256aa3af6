"""What trains: the probe's convex solver and the metrics that judge every strategy."""
