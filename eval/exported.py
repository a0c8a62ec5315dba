"""The evaluated model as an exported graph, fused by the graph question's own passes.

`fusecheck accuracy --backend fusecheck.eval.exported:emulated --tasks golden_mmlu` puts this form into the fused arm:
one rank's decoder goes through `torch.export`, both passes rewrite it, and every fused node calls the backend's kernel,
which the arm's counters count. The unfused arm stays the model as it is, written by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from fusecheck.backends import backend
from fusecheck.errors import UsageError
from fusecheck.eval.checkpoint import Checkpoint
from fusecheck.eval.llama import DTYPES, Cache
from fusecheck.eval.paths import KernelPath, OraclePath
from fusecheck.eval.rotary import Rotary, rotate
from fusecheck.graph.config import SharedConfig
from fusecheck.graph.context import RankContext, tensor_parallel
from fusecheck.graph.ops import NAMESPACE
from fusecheck.graph.passes import fuse_all
from fusecheck.interface import Backend, FusionOp, Kernel, Limits, Rank, RankInputs, RankOutputs, Strategy
from fusecheck.problem import Problem

own = getattr(torch.ops, NAMESPACE)
LONGEST = 1 << 14
"""Texts and tokens of a text that the graph is exported for."""


class Projection(nn.Module):
    """One rank's share of an FP8 linear as the graph has it, and the sum over ranks where it is split by inputs."""

    weight: Tensor
    input_scale: Tensor
    weight_scale: Tensor

    def __init__(self, checkpoint: Checkpoint, name: str, sizes: tuple[int, int], rank: Rank) -> None:
        super().__init__()
        weights = checkpoint.linear(name, *sizes, part=(rank.index, rank.world_size))
        if weights.input_scale is None or weights.weight_scale is None or weights.bias is not None:
            told = "the exported graph takes FP8 linears with one static scale a tensor and no bias"
            raise UsageError(f"{name}: {told}; choose another checkpoint")
        self.register_buffer("weight", weights.weight.to(rank.device))
        self.register_buffer("input_scale", torch.tensor(weights.input_scale, device=rank.device))
        self.register_buffer("weight_scale", weights.weight_scale.reshape(()).to(rank.device))
        self.reduce = name.endswith(("o_proj", "down_proj"))

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        out: Tensor = own.fp8_linear(x, self.weight, None, self.input_scale, self.weight_scale)
        return own.all_reduce(out, Strategy.AUTO.value) if self.reduce else out


class Decoder(nn.Module):
    """One rank's decoder without a cache: tokens [batch, length] to the last norm's output [batch, length, hidden]."""

    frequencies: Tensor

    def __init__(self, checkpoint: Checkpoint, rank: Rank) -> None:
        super().__init__()
        self.shape = s = checkpoint.shape
        self.dtype = DTYPES[s.dtype]
        self.register_buffer("embedding", checkpoint.tensor("model.embed_tokens.weight", (s.vocabulary, s.hidden)))
        rotary = Rotary(s, rank.device)
        self.amplitude = rotary.amplitude
        self.register_buffer("frequencies", rotary.frequencies)
        self.projections = nn.ModuleDict(
            {
                name.replace(".", "/"): Projection(checkpoint, name, (outputs, inputs), rank)
                for name, outputs, inputs in checkpoint.linears()
            }
        )
        norms = [
            f"model.layers.{i}.{name}"
            for i in range(s.layers)
            for name in ("input_layernorm", "post_attention_layernorm")
        ]
        for index, name in enumerate([*norms, "model.norm"]):
            gamma = checkpoint.tensor(f"{name}.weight", (s.hidden,)).to(rank.device, self.dtype)
            self.register_buffer(f"gamma{index}", gamma)
        self.to(rank.device)

    def forward(self, ids: Tensor) -> Tensor:
        """Run all layers; the residual stream is `stream`."""
        stream = functional.embedding(ids, self.get_buffer("embedding")).to(self.dtype)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None].float() * self.frequencies
        angles = torch.cat([angles, angles], -1)
        rotary = (angles.cos() * self.amplitude).to(self.dtype), (angles.sin() * self.amplitude).to(self.dtype)
        for layer in range(self.shape.layers):
            stream = self._attention(layer, self._norm(stream, 2 * layer), rotary) + stream
            stream = self._feed_forward(layer, self._norm(stream, 2 * layer + 1)) + stream
        return self._norm(stream, 2 * self.shape.layers)

    def _norm(self, stream: Tensor, index: int) -> Tensor:
        return own.triton_rms_norm(stream, self.get_buffer(f"gamma{index}"), self.shape.eps)  # type: ignore[no-any-return]

    def _project(self, layer: int, name: str, x: Tensor) -> Tensor:
        return self.projections[f"model/layers/{layer}/{name}"](x)  # type: ignore[no-any-return]

    def _attention(self, layer: int, x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            torch.unflatten(self._project(layer, f"self_attn/{part}_proj", x), -1, (-1, self.shape.head_dim)).transpose(
                1, 2
            )
            for part in "qkv"
        )
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed = functional.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True
        )
        return self._project(layer, "self_attn/o_proj", mixed.transpose(1, 2).flatten(2).to(self.dtype))

    def _feed_forward(self, layer: int, x: Tensor) -> Tensor:
        gate, up = (self._project(layer, f"mlp/{part}_proj", x) for part in ("gate", "up"))
        gated = functional.silu(gate.float()) * up.float()
        return self._project(layer, "mlp/down_proj", gated.to(self.dtype))


class _Opened:
    """A kernel that is open already and stays so, as the backend of a `RankContext`; it counts for the arm's path."""

    def __init__(self, path: KernelPath) -> None:
        self.path = path

    def open(self, rank: Rank, limits: Limits) -> _Opened:
        """Hand out the arm's kernel."""
        del rank, limits
        return self

    def run(self, inputs: RankInputs, *, op: FusionOp, strategy: Strategy) -> RankOutputs:
        """Run the arm's kernel."""
        self.path.calls += 1
        self.path.rows += inputs.partial.shape[0]
        return self.path.kernel.run(inputs, op=op, strategy=strategy)

    def close(self) -> None:
        """Leave the kernel to the arm."""


class ExportedModel:
    """The fused graph on one rank, with the forward of `fusecheck.eval.llama.Llama`.

    Attributes:
        graph: after both passes.
    """

    def __init__(self, folder: Path, rank: Rank, made: Backend) -> None:
        """Export and fuse; a collective call.

        Raises:
            UsageError: the checkpoint is not all FP8, has norms of heads, or a pass left a site unfused.
        """
        with Checkpoint(folder) as checkpoint:
            if checkpoint.shape.head_norm:
                raise UsageError(f"{folder}: the exported graph has no norms of heads; choose a Llama or Mistral")
            decoder = Decoder(checkpoint, rank)
            problem = Problem(world_size=rank.world_size, hidden=checkpoint.shape.hidden, dtype=checkpoint.shape.dtype)
        self.rank, self.flow = rank, made.dataflow(problem)
        sizes = tuple(torch.export.Dim(name, min=2, max=LONGEST) for name in ("texts", "length"))
        example = torch.zeros(3, 5, dtype=torch.int64, device=rank.device)
        with torch.no_grad():
            exported = torch.export.export(decoder, (example,), dynamic_shapes=(dict(enumerate(sizes)),), strict=False)
        self.graph: GraphModule = exported.module(check_guards=False)
        idle = RankContext(rank, made, self.flow)
        fuse_all(self.graph, SharedConfig(rank.index, rank.world_size, idle.gather_text))
        left = [node.name for node in self.graph.graph.nodes if node.target is own.all_reduce.default]
        if left and rank.world_size > 1:
            raise UsageError(f"the passes left {len(left)} sums over ranks unfused, the first is {left[0]}")

    def forward(
        self, path: KernelPath | OraclePath, ids: Tensor, starts: Tensor, cache: Cache | None, capacity: int
    ) -> Tensor:
        """Run prompts; see `Llama.forward`.

        Raises:
            UsageError: a cache is given: the graph has none, so it scores texts and generates none.
        """
        del starts, capacity
        if cache is not None:
            raise UsageError("the exported graph has no cache of keys and values; choose multiple-choice tasks")
        assert isinstance(path, KernelPath)
        rows, length = ids.shape
        # The graph is for two texts of two tokens and more; causal attention keeps padding out of what is asked.
        padded = functional.pad(ids, (0, max(0, 2 - length), 0, max(0, 2 - rows)))
        opened: Any = _Opened(path)
        with tensor_parallel(RankContext(self.rank, opened, self.flow)), torch.no_grad():
            hidden: Tensor = self.graph(padded)
        return hidden[:rows, :length]


class ExportedBackend:
    """A backend whose fused arm is the exported graph."""

    def __init__(self, name: str) -> None:
        self._made = backend(name)
        self.name = f"fusecheck.eval.exported:{name}"
        self.supports = self._made.supports
        self.dataflow = self._made.dataflow
        self.open: Callable[[Rank, Limits], Kernel] = self._made.open

    def model(self, folder: Path, rank: Rank) -> ExportedModel:
        """The model that the arm runs instead of the one written by hand."""
        return ExportedModel(folder, rank, self._made)


def __getattr__(name: str) -> ExportedBackend:
    """The exported arm of the backend `name`, with `__` for a colon: `emulated`, `flashinfer__fp32`."""
    if name.startswith("_"):
        raise AttributeError(name)
    return ExportedBackend(name.replace("__", ":"))
