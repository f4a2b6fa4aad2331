"""Linking: which tokens a request computes, where, and what it reports.

``policy`` decides which tokens of a segment are reused, ``plan`` lays reused
and computed tokens out in one row, ``report`` tells the user what happened,
``encoded_report`` where an encoder has read the segments.
"""
