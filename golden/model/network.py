"""The golden model as a training network: a Llama with grouped-query attention, in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Shape:
    """The sizes of the golden model; heads, intermediate and vocabulary divide by 8 ranks, and by 16 on each."""

    vocabulary: int = 2048
    hidden: int = 512
    layers: int = 4
    heads: int = 16
    kv_heads: int = 8
    head_dim: int = 32
    intermediate: int = 1024
    eps: float = 1e-5
    theta: float = 10000.0
    positions: int = 4096


def rotary(shape: Shape, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cos and sin, each [length, head_dim], in the half-split layout of Hugging Face's Llama."""
    half = torch.arange(0, shape.head_dim, 2, device=device, dtype=torch.float32) / shape.head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float32), shape.theta**-half)
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to [batch, heads, length, head_dim]."""
    first, second = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-second, first], -1) * sin.to(x.dtype)


class Norm(nn.Module):
    """RMSNorm, computed in float32."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        b, n, _ = x.shape
        s = self.shape
        q = rotate(self.q_proj(x).view(b, n, s.heads, s.head_dim).transpose(1, 2), cos, sin)
        k = rotate(self.k_proj(x).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2), cos, sin)
        v = self.v_proj(x).view(b, n, s.kv_heads, s.head_dim).transpose(1, 2)
        groups = s.heads // s.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        y = functional.scaled_dot_product_attention(q, k, v.to(q.dtype), is_causal=True)
        out: Tensor = self.o_proj(y.transpose(1, 2).reshape(b, n, -1))
        return out


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., hidden] to the same shape."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map [batch, length, hidden] to the same shape."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Network(nn.Module):
    """The whole model; its state_dict names are Hugging Face's without the prefix `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.eps)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def decoder(self) -> list[Layer]:
        """Return the decoder layers."""
        return [layer for layer in self.layers if isinstance(layer, Layer)]

    def features(self, ids: Tensor) -> Tensor:
        """Map tokens [batch, length] to the normed last activations [batch, length, hidden]."""
        cos, sin = rotary(self.shape, ids.shape[1], ids.device)
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out

    def forward(self, ids: Tensor) -> Tensor:
        """Map tokens [batch, length] to logits [batch, length, vocabulary]."""
        out: Tensor = self.lm_head(self.features(ids))
        return out


def initialise(network: Network, outliers: tuple[int, ...], size: float) -> None:
    """Draw the weights; the outlier channels of the residual stream start as large constants, as trained LLMs have."""
    shape = network.shape
    for name, weight in network.named_parameters():
        if weight.dim() == 2:
            std = 0.3 if name.startswith("embed") else weight.shape[1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= (2 * shape.layers) ** 0.5
            nn.init.normal_(weight, std=std)
    with torch.no_grad():
        for channel in outliers:
            network.embed_tokens.weight[:, channel] += size
