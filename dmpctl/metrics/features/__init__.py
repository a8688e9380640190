"""Extractors: images to the features that a distance is taken in."""
