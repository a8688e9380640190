"""Gaussian diffusion: noise schedules, the training objective, guidance and samplers."""
