"""Linear-attention layers of hybrid models: operators and end states of segments,
captured when a segment is compiled and composed when it is linked (HYPIC)."""
