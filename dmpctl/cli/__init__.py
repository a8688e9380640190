"""The command line: one table of commands; what they do is in the rooms below."""
