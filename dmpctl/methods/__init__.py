"""What produces the edit: one file per method."""
