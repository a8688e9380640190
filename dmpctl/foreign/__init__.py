"""Files of other people: read without running them, taken out of what wraps them, and what they say of themselves."""
