"""`compare`: variants over seeds and stages."""
