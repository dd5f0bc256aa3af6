"""Training strategies, one per file. `hf_transfer.strategy` describes the content of such a file."""
