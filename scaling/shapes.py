"""Sizes that repeat, so that a program is compiled for a few shapes and not for every one. No JAX here."""


def bucket(n: int, least: int = 1) -> int:
    """The smallest power of two, or three quarters of one, that is at least n and `least`: few, and at most 1.5 n."""
    size = least
    while size < n:
        size *= 2
    return size * 3 // 4 if size > least and size % 4 == 0 and size * 3 // 4 >= n else size
