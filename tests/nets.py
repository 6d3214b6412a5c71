"""Small networks for the compiler's tests (`properties/nets.py`, which is shipped)."""

from .properties.nets import *  # noqa: F403
