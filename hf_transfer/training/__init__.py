"""Training: phases of gradient steps, the solver of the linear probe, and the metrics."""
