"""Stored images: found, decoded, cropped, captioned."""
