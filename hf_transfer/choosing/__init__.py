"""Which checkpoint, which strategy: what can be told from one pass of frozen networks over the images."""
