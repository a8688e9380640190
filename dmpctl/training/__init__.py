"""The loop, and the two commands that train."""
