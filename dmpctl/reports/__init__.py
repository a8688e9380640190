"""`report` and `doctor`."""
