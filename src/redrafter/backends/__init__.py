"""Modules and devices. The backends do not see each other."""
