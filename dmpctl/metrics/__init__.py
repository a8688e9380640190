"""How far generated images are from real ones, and how certain that is."""
