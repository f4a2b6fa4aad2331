"""The segment-hash forest: which segments are compiled, and where their pages lie."""
