"""Two models compared in one way: patch against backbone on common seeds, and their denoising error on common images."""
