"""A line: from cameras to one verdict a part, and what it says of itself."""
