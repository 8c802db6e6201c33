"""The book: ReDrafter as pure functions on arrays. Names no framework; start with ``step.py``."""
