"""Distances between images, and how sure they are."""
