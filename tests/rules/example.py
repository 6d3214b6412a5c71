"""What an example of a rule is (`properties/example.py`, which is shipped)."""

from ..properties.example import *  # noqa: F403
