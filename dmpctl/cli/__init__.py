"""The command line: one file per command, thin; the work is in `engine`."""
