"""The commands of `hf-transfer`, one per file: its docstring is the help text, and `COMMAND` has its flags and its function."""
