"""The network's side: loading a checkpoint, tracing it, cutting it, naming its layers."""
