"""Data: sources of images, and the order in which training sees them."""
