"""Properties that every op and every rule has, as `convloom.testing` offers them to extensions.

The only part of the tests that is shipped: it needs pytest and hypothesis, and is imported when
`convloom.testing` is.
"""
