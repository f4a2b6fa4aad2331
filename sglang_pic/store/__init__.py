"""Segments as values, and the stores that keep them."""
