"""Digests of arrays: the same on any mesh, on the host or on the devices, and changed by every flipped bit."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint32}  # by bytes of an element
PART = 2**16  # words taken at once on the host: these and their products stay in a core's cache


def digests(state: Any) -> dict[str, int]:
    """The digest of every array of a tree, by its path: the sum of word_i (2 i + 1), modulo 2^32.

    word_i is the i-th element's bits in the order of the flat index; one of eight bytes is two words, the lower first.
    A changed word is always noticed, its factor being odd; what changes several slips through once in about 2^32.
    Arrays that span processes are digested where they lie, the others here.
    """
    arrays = {jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(state)}
    spread = {name: x for name, x in arrays.items() if isinstance(x, jax.Array) and not x.is_fully_addressable}
    on_devices = device_digests(spread) if spread else {}
    return {name: int(on_devices[name]) if name in on_devices else host_digest(x) for name, x in arrays.items()}


def host_digest(x: Any) -> int:
    """The digest of one array, in NumPy."""
    array = np.ascontiguousarray(x).reshape(-1)
    words = array.view(WORDS[array.itemsize])
    odd = np.arange(1, 2 * PART, 2, dtype=np.uint32)
    total = 0
    for at in range(0, words.size, PART):
        part = words[at : at + PART].astype(np.uint32, copy=False)
        # word_i (2 i + 1), where i = at + j
        total += int(np.sum(part * odd[: part.size], dtype=np.uint32))
        total += 2 * at * int(np.sum(part, dtype=np.uint32))
    return total % 2**32


@jax.jit
def device_digests(arrays: Any) -> Any:
    """The digest, uint32 [], of every array of a tree; compiled, so each device sums what it holds."""

    def digest(x: jax.Array) -> jax.Array:
        bits = x.astype(jnp.uint8) if x.dtype == bool else x
        words = jax.lax.bitcast_convert_type(bits, WORDS[bits.dtype.itemsize]).astype(jnp.uint32)
        index = jnp.zeros(words.shape, jnp.uint32)
        for axis in range(words.ndim):
            stride = jnp.uint32(math.prod(words.shape[axis + 1 :]) % 2**32)
            index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * stride
        return jnp.sum(words * (2 * index + 1), dtype=jnp.uint32)

    return jax.tree.map(digest, arrays)
