"""Platforms that this package teaches SGLang, one module each.

A module offers ``activate()``, the entry point that SGLang asks in every
process, and the platform class that it names.
"""

# SGLang loads these modules while it is itself imported. Whoever imports one
# of them first must therefore import SGLang before it, or it would be asked
# for `activate` half-way through its own import.
import sglang  # noqa: F401
