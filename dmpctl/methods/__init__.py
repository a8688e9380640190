"""Methods, which produce the edit: one file each."""
