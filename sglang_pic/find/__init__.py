"""Segments found in prompts that carry no marks: where they may be cut, and what recurs."""
