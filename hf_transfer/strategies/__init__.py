"""One strategy per file; see `hf_transfer.strategy` for what a file holds."""
