"""Import, export and push."""
