"""A decoder-only transformer in Flax linen, functional: `init` gives a tree of arrays, `apply` is pure.

Pre-norm RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU / GELU / squared ReLU. Layers have
weight arrays of their own whether they are computed unrolled or in a scan, so that parameters, optimiser state and
checkpoints are the same for both. Nothing here knows a mesh: every parameter carries logical axis names,
`scaling/engine/sharding.py` maps those onto devices, and how things are computed stands in an `Implementation`.

Letters: B batch, T time, S slots of a cache, D model width, F feed-forward width, H query heads, G key/value heads,
J query heads per key/value head, K head width, V vocabulary, L layers.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from models.attention import cached_attention, causal_attention
from models.config import ModelConfig
from models.implementation import Implementation
from models.loss import head_loss, head_token_losses
from models.matmul import cpu_matmul
from models.parametrization import embedding_multiplier, multipliers, rule

Params = Any
DEFAULT = Implementation()
REMAT = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}


KeysValues = tuple[jax.Array, jax.Array]  # (k_BGSK, v_BGSK): time inside heads, as the products want it
FRESH: KeysValues = ()  # in place of a layer of a cache: nothing came before, and keys and values are to come back


class Cache(NamedTuple):
    """What earlier positions left for later ones.

    All sequences write to the same slots, so that a write is one slice, whatever their lengths: a slot that a shorter
    one has no token for is not seen by it, and its position is its own.
    """

    layers: tuple[KeysValues, ...]
    seen_BS: jax.Array  #: slots that hold a token of the sequence, bool
    length_B: jax.Array  #: tokens so far, int32: the next position
    slot: jax.Array  #: the next slot, int32 []


class View(NamedTuple):
    """Where a pass of T tokens writes to in a cache, and what each of its queries sees there."""

    slot: jax.Array  #: of the first of T, int32 []
    seen_BTS: jax.Array
    angles: tuple[jax.Array, jax.Array]  #: of `rotary_angles`; looked up, as cos and sin took a tenth of a step


class Transformer(nn.Module):
    """tokens_BT (int32), or x_BTD in place of their embedding -> logits_BTV (float32).

    Products run in `dtype`, parameters and norms stay float32. Without a cache each position attends to those before
    it in the input, and positions are 0 .. T-1 unless given (positions_T or positions_BT, int32). With a cache the
    input follows what the cache holds, by default at the next T positions: the logits are those of one pass over all
    that it has seen. The new cache comes back. `real_B`: how many of T are tokens of each sequence, the first so many;
    by default all.
    """

    config: ModelConfig
    dtype: jnp.dtype = jnp.float32
    how: Implementation = DEFAULT

    def setup(self) -> None:
        c, how = self.config, self.how
        # Unit-scale embeddings; a tied head wants 1/sqrt(D), so the embedding is then scaled up on the way in.
        std = (c.d_model**-0.5 if c.tied else 1.0) * rule(c, "embed").init
        self.embed_VD = self.param("embed", logical(normal(std), "vocab", "embed"), (c.vocab_size, c.d_model))
        self.block = [block_class(how)(c, self.dtype, how) for _ in range(c.n_layers)]  # parameters block_0, ...
        self.norm_out = RMSNorm("embed")
        if not c.tied:
            zeros = logical(nn.initializers.zeros, "embed", "vocab")
            self.head_DV = self.param("head", zeros, (c.d_model, c.vocab_size))

    def __call__(
        self,
        inputs: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        real_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        x_BTD, cache = self.hidden(inputs, positions, cache, real_B)
        return self.logits(x_BTD), cache

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """logits_BTV of the last hidden layer."""
        return logits(self.config, self.how, x_BTD, self.head())

    def hidden(
        self,
        inputs: jax.Array,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        real_B: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """x_BTD, the last hidden layer after its norm, in `dtype`, and the new cache."""
        x_BTD = self.entered(inputs)
        T = x_BTD.shape[1]
        given = positions is not None
        if positions is None:
            positions = jnp.arange(T)
            positions = positions if cache is None else cache.length_B[:, None] + positions
        if cache is None:
            if self.how.layers == "scanned":
                return self.norm_out(self.scan(x_BTD, positions)), None
            for block in self.block:
                x_BTD, _ = block(x_BTD, positions)
            return self.norm_out(x_BTD), None
        K, theta = self.config.head_dim, self.config.rope_theta
        if given:
            angles = rotary_angles(positions, K, theta)
        else:
            with jax.ensure_compile_time_eval():
                tables = rotary_angles(jnp.arange(cache.seen_BS.shape[1]), K, theta)
            angles = tuple(table_SK[positions] for table_SK in tables)
        layers, view = [], view_of(cache, T, angles)
        for block, layer in zip(self.block, cache.layers, strict=True):
            x_BTD, layer = block(x_BTD, positions, layer, view)
            layers.append(layer)
        return self.norm_out(x_BTD), after(cache, tuple(layers), T, real_B)

    def begin(self, inputs: jax.Array, real_B: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
        """`hidden` of what nothing came before, and a cache of `slots` >= T. As fast as a pass without a cache."""
        x_BTD = self.entered(inputs)
        B, T, _ = x_BTD.shape
        layers, room = [], ((0, 0), (0, 0), (0, slots - T), (0, 0))
        for block in self.block:
            x_BTD, layer = block(x_BTD, jnp.arange(T), FRESH)
            layers.append(tuple(jnp.pad(x_BGTK, room) for x_BGTK in layer))
        empty = Cache((), jnp.zeros((B, slots), bool), jnp.zeros(B, jnp.int32), jnp.int32(0))
        return self.norm_out(x_BTD), after(empty, tuple(layers), T, real_B)

    def entered(self, inputs: jax.Array) -> jax.Array:
        """x_BTD of tokens_BT or of what stands in for their embedding."""
        x_BTD = self.embed(inputs) if jnp.issubdtype(inputs.dtype, jnp.integer) else inputs.astype(self.dtype)
        return self.how.constrain(x_BTD, "batch", "time", None)

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        x_BTD = self.embed_VD[tokens_BT].astype(self.dtype)
        return x_BTD * embedding_multiplier(self.config) if self.config.tied else x_BTD

    def head(self) -> jax.Array:
        """w_DV, which makes logits of the last hidden layer, in `dtype`."""
        return (self.embed_VD.T if self.config.tied else self.head_DV).astype(self.dtype)

    def scan(self, x_BTD: jax.Array, positions: jax.Array) -> jax.Array:
        """The blocks as one compiled loop. `nn.scan` would stack the weights in the state too, and so in checkpoints:
        here they are stacked within the step, one copy in the dtype of the products, and the block applied to a slice.
        """
        params = [self.variables["params"][f"block_{i}"] for i in range(self.config.n_layers)]
        stacked = jax.tree.map(lambda *w: jnp.stack([x.astype(self.dtype) if x.ndim > 1 else x for x in w]), *params)
        block = block_class(self.how)(self.config, self.dtype, self.how, parent=None)
        return jax.lax.scan(lambda x_BTD, layer: block.apply({"params": layer}, x_BTD, positions), x_BTD, stacked)[0]


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + feed-forward(norm(x)). Both outputs start at zero.

    x_BTD; the positions of T, alike for all of B (positions_T) or not (positions_BT); its layer of a `Cache` with the
    view of it, or FRESH, or None.
    """

    config: ModelConfig
    dtype: jnp.dtype
    how: Implementation

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, positions: jax.Array, cache: KeysValues | None = None, view: View | None = None
    ) -> tuple[jax.Array, KeysValues | None]:
        residual = multipliers(self.config).residual
        new_BTD, cache = self.attention(RMSNorm("embed", name="norm_attention")(x_BTD), positions, cache, view)
        x_BTD = x_BTD + scaled(new_BTD, residual)
        new_BTD = self.feed_forward(RMSNorm("embed", name="norm_feed_forward")(x_BTD))
        return x_BTD + scaled(new_BTD, residual), cache

    def attention(
        self, x_BTD: jax.Array, positions: jax.Array, cache: KeysValues | None, view: View | None
    ) -> tuple[jax.Array, KeysValues | None]:
        c = self.config
        B, T, D = x_BTD.shape
        G, J, K = c.n_kv_heads, c.n_heads // c.n_kv_heads, c.head_dim
        # One product for queries, keys and values; grouped by key/value head, so that heads shard together.
        w_DGNK = self.param(
            "qkv", logical(normal(D**-0.5), "embed", "kv_heads", "qkv", "head_dim"), (D, G, J + 2, K)
        ).astype(self.dtype)
        qkv_BTGNK = matmul(x_BTD, w_DGNK, self.how)
        self.sow("intermediates", "qkv", qkv_BTGNK)
        q_BTGJK, k_BTG1K, v_BTG1K = jnp.split(qkv_BTGNK, [J, J + 1], axis=3)
        k_BTGK, v_BTGK = k_BTG1K[..., 0, :], v_BTG1K[..., 0, :]
        if c.qk_norm:
            q_BTGJK = RMSNorm("head_dim", name="norm_q")(q_BTGJK)
            k_BTGK = RMSNorm("head_dim", name="norm_k")(k_BTGK)
        cos, sin = rotary_angles(positions, K, c.rope_theta) if view is None else view.angles
        q_BTGJK = rotate(q_BTGJK, cos[..., None, None, :], sin[..., None, None, :])
        k_BTGK = rotate(k_BTGK, cos[..., None, :], sin[..., None, :])
        q_BTGJK = scaled(q_BTGJK, multipliers(c).attention)
        if cache is not None:
            k_BGTK, v_BGTK = k_BTGK.swapaxes(1, 2), v_BTGK.swapaxes(1, 2)
        if not cache:
            out_BTGJK = causal_attention(q_BTGJK, k_BTGK, v_BTGK, self.how)
            cache = None if cache is None else (k_BGTK, v_BGTK)
        else:
            at = (0, 0, view.slot, 0)
            new = zip(cache, (k_BGTK, v_BGTK), strict=True)
            cache = tuple(jax.lax.dynamic_update_slice(x_BGSK, x_BGTK, at) for x_BGSK, x_BGTK in new)
            out_BTGJK = cached_attention(q_BTGJK, *cache, view.seen_BTS)
        w_GJKD = self.param(
            "attention_out",
            logical(nn.initializers.zeros, "kv_heads", "q_per_kv", "head_dim", "embed"),
            (G, J, K, D),
        ).astype(self.dtype)
        return matmul(out_BTGJK.reshape(B, T, G * J * K), w_GJKD.reshape(G * J * K, D), self.how), cache

    def feed_forward(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        D, F = c.d_model, c.d_ff
        n_in = 2 if c.activation == "swiglu" else 1
        w_DNF = self.param("up", logical(normal(D**-0.5), "embed", "gate", "mlp"), (D, n_in, F)).astype(self.dtype)
        h_BTNF = matmul(x_BTD, w_DNF, self.how)
        self.sow("intermediates", "up", h_BTNF)
        match c.activation:
            case "swiglu":
                h_BTF = nn.silu(h_BTNF[..., 0, :]) * h_BTNF[..., 1, :]
            case "gelu":
                h_BTF = nn.gelu(h_BTNF[..., 0, :])
            case "relu2":
                h_BTF = jnp.square(nn.relu(h_BTNF[..., 0, :]))
        w_FD = self.param("down", logical(nn.initializers.zeros, "mlp", "embed"), (F, D)).astype(self.dtype)
        return matmul(h_BTF, w_FD, self.how)


def block_class(how: Implementation) -> type[nn.Module]:
    """`Block`, of which as much is recomputed on the way back as `how.remat` says."""
    if how.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT[how.remat], prevent_cse=how.layers == "unrolled")


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last axis, in float32 (1910.07467)."""

    axis: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", logical(nn.initializers.ones, self.axis), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + 1e-6)
        return (normed * scale).astype(x.dtype)


def logits(config: ModelConfig, how: Implementation, x_BTD: jax.Array, w_DV: jax.Array) -> jax.Array:
    """logits_BTV, float32, soft-capped where the model is."""
    logits_BTV = scaled(matmul(x_BTD, w_DV, how).astype(jnp.float32), multipliers(config).logits)
    if config.logit_softcap:
        logits_BTV = config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap)
    return logits_BTV


def scaled(x: jax.Array, by: float) -> jax.Array:
    """by * x, and nothing at all where by is 1, so that a model without multipliers keeps its program."""
    return x if by == 1.0 else (x * by).astype(x.dtype)


def matmul(x_BTX: jax.Array, w: jax.Array, how: Implementation) -> jax.Array:
    """x [B, T, X] times w [X, ...] -> [B, T, ...], as one two-dimensional product."""
    B, T, X = x_BTX.shape
    times = cpu_matmul if how.transpose_gradients else jnp.matmul
    return times(x_BTX.reshape(B * T, X), w.reshape(X, -1)).reshape(B, T, *w.shape[1:])


def rotary_angles(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin of position * theta^(-2i/K), each [..., K/2], float32 (RoFormer, 2104.09864 equation 15)."""
    frequency_K = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions.astype(jnp.float32)[..., None] * frequency_K
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (x_i, x_{i+K/2}) of the last axis by the given angles; dtype of x is kept."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def logical(initializer: Callable, *axes: str) -> Callable:
    """An initializer whose array carries the names of its logical axes."""
    return nn.with_logical_partitioning(initializer, axes)


def normal(std: float) -> Callable:
    return nn.initializers.normal(std)


def init(config: ModelConfig, key: jax.Array, boxed: bool = False) -> Params:
    """Fresh float32 parameters as a plain nested dict (boxed: each array in its box of logical axis names)."""
    variables = Transformer(config).init(key, jnp.zeros((1, 1), jnp.int32))
    return variables["params"] if boxed else nn.unbox(variables["params"])


def empty_cache(config: ModelConfig, batch: int, slots: int, dtype: jnp.dtype = jnp.float32) -> Cache:
    """A cache of `slots` positions for `batch` sequences, none filled."""
    zeros = jnp.zeros((batch, config.n_kv_heads, slots, config.head_dim), dtype)
    seen_BS, length_B = jnp.zeros((batch, slots), bool), jnp.zeros(batch, jnp.int32)
    return Cache(((zeros, zeros),) * config.n_layers, seen_BS, length_B, jnp.int32(0))


def view_of(cache: Cache, T: int, angles: tuple[jax.Array, jax.Array]) -> View:
    """For the next T tokens: each sees what the cache holds, and of the T those up to itself."""
    slot_S = jnp.arange(cache.seen_BS.shape[1])
    own_TS = (slot_S >= cache.slot) & (slot_S <= cache.slot + jnp.arange(T)[:, None])
    return View(cache.slot, cache.seen_BS[:, None] | own_TS, angles)


def after(cache: Cache, layers: tuple[KeysValues, ...], T: int, real_B: jax.Array | None) -> Cache:
    """The cache with the layers that T tokens more have made, of which the first real_B count."""
    slot_S = jnp.arange(cache.seen_BS.shape[1])
    real_B = jnp.full_like(cache.length_B, T) if real_B is None else real_B
    new_BS = (slot_S >= cache.slot) & (slot_S < cache.slot + real_B[:, None])
    return Cache(layers, cache.seen_BS | new_BS, cache.length_B + real_B, cache.slot + T)


def apply(
    config: ModelConfig,
    params: Params,
    tokens_BT: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> jax.Array:
    """logits_BTV, float32."""
    return Transformer(config, dtype, how).apply({"params": params}, tokens_BT)[0]


def next_token_loss(
    config: ModelConfig,
    params: Params,
    tokens_BU: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of predicting tokens[:, 1:] from tokens[:, :-1] (U = T + 1), in nats, float32.

    Returns (loss_BT, log_z_BT): the loss per token, and log of the partition function, for z-loss.
    """
    x_BTD, w_DV, logits_of = below_logits(config, params, tokens_BU[:, :-1], dtype, how)
    return head_token_losses(how, logits_of, x_BTD, w_DV, tokens_BU[:, 1:])


def mean_loss(
    config: ModelConfig,
    params: Params,
    tokens_BU: jax.Array,
    dtype: jnp.dtype = jnp.float32,
    how: Implementation = DEFAULT,
    weight_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(objective, loss): means over all tokens in nats, each token's times its weight where weights are given; the
    objective, to be differentiated, has z-loss added.
    """
    x_BTD, w_DV, logits_of = below_logits(config, params, tokens_BU[:, :-1], dtype, how)
    objective, loss = head_loss(config, how, logits_of, x_BTD, w_DV, tokens_BU[:, 1:], weight_BT)
    return objective / tokens_BU[:, 1:].size, loss / tokens_BU[:, 1:].size


def below_logits(
    config: ModelConfig, params: Params, tokens_BT: jax.Array, dtype: jnp.dtype, how: Implementation
) -> tuple[jax.Array, jax.Array, Callable]:
    """(x_BTD, w_DV, logits_of): the last hidden layer, the head, and the function that makes logits of both."""
    model = Transformer(config, dtype, how)
    x_BTD, _ = model.apply({"params": params}, tokens_BT, method="hidden")
    w_DV = model.apply({"params": params}, method="head")
    return x_BTD, w_DV, functools.partial(logits, config, how)
