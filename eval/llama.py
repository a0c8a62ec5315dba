"""One rank of a tensor-parallel decoder of the Llama family, for evaluation: prefill, KV cache, decode steps."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fusecheck.backends.unfused import rms_norm
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.linear import Linear
from fusecheck.eval.paths import Feed, KernelPath, Norm, OraclePath
from fusecheck.eval.rotary import Rotary, rotate
from fusecheck.interface import Rank

Path = KernelPath | OraclePath

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Layer:
    """One decoder layer's share of a rank; `q_norm` and `k_norm` only where the family norms heads."""

    input_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    post_norm: Norm
    gate: Linear
    up: Linear
    down: Linear
    q_norm: Norm | None
    k_norm: Norm | None


class Cache:
    """Keys and values of a batch, [layers] of [batch, kv_heads, capacity, head_dim].

    Attributes:
        used: positions that the longest row has used, counted on the host: to ask the device would make it wait.
    """

    def __init__(self, layers: int) -> None:
        self.used = 0
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    def fill(self, layer: int, k: Tensor, v: Tensor, capacity: int) -> None:
        """Start with the prompt's keys and values, [batch, kv_heads, length, head_dim]."""
        pad = (0, 0, 0, capacity - k.shape[2])
        self.keys[layer], self.values[layer] = functional.pad(k, pad), functional.pad(v, pad)

    def put(self, layer: int, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Write one step, [batch, kv_heads, 1, head_dim], at each row's position; return all keys and values."""
        keys, values = self.keys[layer], self.values[layer]
        assert keys is not None
        assert values is not None
        rows = torch.arange(len(positions), device=positions.device)
        keys[rows, :, positions] = k[:, :, 0]
        values[rows, :, positions] = v[:, :, 0]
        return keys, values

    def put_behind(self, other: Cache) -> None:
        """Lay these rows behind the other cache's, which is empty afterwards; both have the same capacity."""
        self.used = max(self.used, other.used)
        for own, others in ((self.keys, other.keys), (self.values, other.values)):
            for layer, (rows, first) in enumerate(zip(own, others, strict=True)):
                assert rows is not None
                assert first is not None
                own[layer], others[layer] = torch.cat([first, rows]), None

    def keep(self, rows: Tensor) -> None:
        """Drop all rows of the batch but these."""
        self.keys = [None if k is None else k[rows] for k in self.keys]
        self.values = [None if v is None else v[rows] for v in self.values]


class Llama:
    """The decoder on one rank; the head is on rank 0 only.

    Attributes:
        shape: the model's sizes.
        rank: this rank's place.
        dtype: of the activations between the layers (the oracle's are float32).
    """

    def __init__(self, checkpoint: Checkpoint, rank: Rank) -> None:
        """Load this rank's share.

        Raises:
            UsageError: a tensor or scale is missing or broken, or the world size does not divide the heads.
        """
        self.shape = s = checkpoint.shape
        checkpoint.require_divisible(rank.world_size)
        self.rank, self.dtype = rank, DTYPES[s.dtype]
        self.embedding = checkpoint.tensor("model.embed_tokens.weight", (s.vocabulary, s.hidden)).to(rank.device)
        self.layers = [self._layer(checkpoint, i) for i in range(s.layers)]
        self.norm = self._norm(checkpoint, "model.norm", s.hidden)
        self.head: Tensor | None = None
        if rank.index == 0:
            head = self.embedding
            if not s.tied:
                head = checkpoint.tensor("lm_head.weight", (s.vocabulary, s.hidden)).to(rank.device)
            self.head = head.float()
        self._rotary = Rotary(s, rank.device)

    def _norm(self, checkpoint: Checkpoint, name: str, size: int) -> Norm:
        gamma = checkpoint.tensor(f"{name}.weight", (size,)).to(self.rank.device, self.dtype)
        return Norm(gamma, self.shape.eps)

    def _layer(self, checkpoint: Checkpoint, index: int) -> Layer:
        prefix, s, part = f"model.layers.{index}", self.shape, (self.rank.index, self.rank.world_size)
        sizes = {name: (outputs, inputs) for name, outputs, inputs in checkpoint.linears()}

        def linear(name: str) -> Linear:
            weights = checkpoint.linear(f"{prefix}.{name}", *sizes[f"{prefix}.{name}"], part=part)
            return Linear(weights, self.rank.device, self.dtype)

        def head_norm(name: str) -> Norm | None:
            return self._norm(checkpoint, f"{prefix}.self_attn.{name}", s.head_dim) if s.head_norm else None

        return Layer(
            input_norm=self._norm(checkpoint, f"{prefix}.input_layernorm", s.hidden),
            q=linear("self_attn.q_proj"),
            k=linear("self_attn.k_proj"),
            v=linear("self_attn.v_proj"),
            o=linear("self_attn.o_proj"),
            post_norm=self._norm(checkpoint, f"{prefix}.post_attention_layernorm", s.hidden),
            gate=linear("mlp.gate_proj"),
            up=linear("mlp.up_proj"),
            down=linear("mlp.down_proj"),
            q_norm=head_norm("q_norm"),
            k_norm=head_norm("k_norm"),
        )

    @torch.inference_mode()
    def forward(self, path: Path, ids: Tensor, starts: Tensor, cache: Cache | None = None, capacity: int = 0) -> Tensor:
        """Run the decoder.

        Args:
            path: how to get from layer to layer.
            ids: tokens [batch, length], padded on the right; causal attention keeps padding out of the prompts.
            starts: position of each row's first token, int64 [batch]; all 0 for a prompt.
            cache: written where given; read where it holds a prompt, and `length` is 1 then.
            capacity: positions that a new cache has room for.

        Returns:
            The activations after the last norm, [batch, length, hidden].
        """
        b, n = ids.shape
        if cache is not None:
            cache.used += n
        positions = starts[:, None] + torch.arange(n, device=ids.device)
        cos, sin = self._rotary.at(positions, path.dtype)
        residual = functional.embedding(ids.reshape(-1), self.embedding).to(path.dtype)
        feed = path.start(residual, self.layers[0].input_norm, self._attention_readers(0))
        for index, layer in enumerate(self.layers):
            mixed = self._attention(path, index, feed, (b, n), (cos, sin), positions, cache, capacity)
            feed, residual = path.join(path.apply(mixed, layer.o), residual, layer.post_norm, (layer.gate, layer.up))
            gated = functional.silu(path.read(feed, layer.gate).float()) * path.read(feed, layer.up).float()
            partial = path.apply(gated.to(path.dtype), layer.down)
            last = index + 1 == len(self.layers)
            norm = self.norm if last else self.layers[index + 1].input_norm
            feed, residual = path.join(partial, residual, norm, () if last else self._attention_readers(index + 1))
        assert feed.norm is not None
        return feed.norm.view(b, n, -1)

    def linears(self) -> Iterator[tuple[str, Linear]]:
        """Yield every linear of the layers by its name in the checkpoint."""
        for index, layer in enumerate(self.layers):
            for name in ("q", "k", "v", "o"):
                yield f"model.layers.{index}.self_attn.{name}_proj", getattr(layer, name)
            for name in ("gate", "up", "down"):
                yield f"model.layers.{index}.mlp.{name}_proj", getattr(layer, name)

    def logits(self, hidden: Tensor) -> Tensor:
        """Map activations [..., hidden] to float32 logits [..., vocabulary]; on rank 0."""
        assert self.head is not None
        return hidden.float() @ self.head.t()

    def _attention_readers(self, index: int) -> tuple[Linear, ...]:
        layer = self.layers[index]
        return layer.q, layer.k, layer.v

    def _attention(
        self,
        path: Path,
        index: int,
        feed: Feed,
        size: tuple[int, int],
        rotary: tuple[Tensor, Tensor],
        positions: Tensor,
        cache: Cache | None,
        capacity: int,
    ) -> Tensor:
        """Attend; returns this rank's heads, [tokens, heads * head_dim] of the rank, before the output linear."""
        layer, (b, n) = self.layers[index], size

        def heads(linear: Linear) -> Tensor:
            return path.read(feed, linear).view(b, n, -1, self.shape.head_dim).transpose(1, 2)

        q, k, v = heads(layer.q), heads(layer.k), heads(layer.v)
        if layer.q_norm is not None and layer.k_norm is not None:
            q = rms_norm(q, layer.q_norm.gamma, layer.q_norm.eps, 0.0)
            k = rms_norm(k, layer.k_norm.gamma, layer.k_norm.eps, 0.0)
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if k.device.type == "cpu":
            # Most CPUs have no fast half-precision products; float32 also rounds less.
            q, k, v = q.float(), k.float(), v.float()
        if cache is not None and cache.keys[index] is not None:
            mixed = attend_cached(q, *cache.put(index, k, v, positions[:, 0]), positions, cache.used)
        else:
            if cache is not None:
                cache.fill(index, k, v, capacity)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=n > 1, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(b * n, -1).to(path.dtype)


def attend_cached(q: Tensor, keys: Tensor, values: Tensor, positions: Tensor, used: int) -> Tensor:
    """Attend from one new token per row to all up to it.

    Args:
        q: [batch, heads, 1, head_dim].
        keys: [batch, kv_heads, capacity, head_dim].
        values: likewise.
        positions: of the new tokens, int64 [batch, 1].
        used: how many positions the longest row has used.

    Returns:
        [batch, heads, 1, head_dim].
    """
    b, heads, _, size = q.shape
    keys, values = keys[:, :, :used], values[:, :, :used]
    grouped = q.view(b, keys.shape[1], -1, size)
    scores = grouped @ keys.transpose(-1, -2) / math.sqrt(size)
    hidden = torch.arange(used, device=q.device) > positions
    weights = scores.float().masked_fill(hidden[:, None, None], -torch.inf).softmax(-1).to(values.dtype)
    return (weights @ values).view(b, heads, 1, size)
