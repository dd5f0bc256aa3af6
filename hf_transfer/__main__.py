"""`python -m hf_transfer` and `accelerate launch -m hf_transfer`: the same as the command `hf-transfer`."""

from hf_transfer.cli import main

if __name__ == "__main__":
    main()
