"""Frozen denoisers behind one protocol: `embed` and `denoise(..., edit)`."""
