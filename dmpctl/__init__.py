"""dmpctl: make a converged diffusion transformer better without retraining it."""

__version__ = "0.1.0"
