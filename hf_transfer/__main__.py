"""Runs the command `hf-transfer` for `python -m hf_transfer` and `accelerate launch -m hf_transfer`."""

from hf_transfer.cli import main

if __name__ == "__main__":
    main()
