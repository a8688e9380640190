"""Images in the order of training, and caches of their latents and captions."""
