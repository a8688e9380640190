"""Where the rooms meet: building, training, generating, measuring."""
