"""Encoded documents and the store of one scheduler: written behind, read ahead, kept."""
