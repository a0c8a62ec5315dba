"""Graphs of models: Fusecheck's own decoder, and Hugging Face models, sharded, quantised, calibrated and exported.

Hugging Face models are made from tiny configurations with random weights, so that nothing is fetched. What remains of
them is the structure that `torch.export` finds: attention, masks, rotary embeddings, residuals, biases, norms of heads.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from fusecheck.dataflow import DATAFLOWS
from fusecheck.errors import UsageError
from fusecheck.formats.element import E2M1
from fusecheck.graph import roles
from fusecheck.graph.build import CPU, BuiltGraph
from fusecheck.graph.builder import WIDE, missing
from fusecheck.graph.decoder import build_decoder
from fusecheck.graph.family import takes_scale
from fusecheck.graph.model_plan import DECODER, ModelPlan
from fusecheck.graph.quantised import Form, quantise
from fusecheck.operations import GIVEN_SCALE

own = torch.ops.fusecheck

E4M3_MAX = 448.0
VOCABULARY = 96
WIDE_TOKEN = VOCABULARY - 1
"""Its embedding lies beyond fp16's range; it comes last, so that no other token attends to it."""
LONGEST = 256
"""Positions of the tiny configurations."""
CALIBRATION = (4, 32)
"""Sequences and tokens that the activation scales are calibrated on."""
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
"""Layers of which each rank holds some outputs."""
ROW = ("o_proj", "down_proj")
"""Layers of which each rank holds some inputs, followed by the sum over ranks."""
CONFIGS = {"llama": "LlamaConfig", "qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "mistral": "MistralConfig"}


def build_model(plan: ModelPlan, rank: int, world_size: int, device: torch.device = CPU) -> BuiltGraph:
    """One rank's graph of a model; deterministic, so that every rank makes its own.

    Raises:
        UsageError: the world size does not divide the heads, or `transformers` is not installed.
    """
    if 4 % world_size:
        raise UsageError(f"tp {world_size} does not divide the 4 key/value heads, expected 1, 2 or 4")
    if plan.model == DECODER:
        return build_decoder(plan, rank, world_size, device)
    model = _tiny(plan)
    _quantize_and_shard(model, _calibrate(model, plan), plan, rank, world_size)
    model.to(device)
    example = (_token_ids(plan, plan.tokens).to(device),)
    dimension = torch.export.Dim("tokens", min=2, max=LONGEST)
    shapes = ({1: dimension},) if plan.dynamic else None
    with torch.no_grad():
        exported = torch.export.export(_Logits(model), example, dynamic_shapes=shapes, strict=False)
    module = exported.module(check_guards=False)

    def inputs(tokens: int) -> tuple[Tensor, ...]:
        return (_token_ids(plan, tokens).to(device),)

    return BuiltGraph(module, inputs, (0,), 1 if plan.dynamic else None, LONGEST)


def _token_ids(plan: ModelPlan, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(plan.seed * 1009 + tokens)
    ids = torch.randint(0, VOCABULARY - 1, (1, tokens), generator=generator)
    if tokens > 1:
        ids[:, -1] = WIDE_TOKEN
    return ids


class _Logits(nn.Module):
    """A causal model as a function of token ids, [1, tokens] to [1, tokens, vocabulary]."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def _tiny(plan: ModelPlan) -> Any:
    try:
        import transformers  # slow to import, and needed only here
    except ImportError:
        raise UsageError(f"model {plan.model} needs transformers: pip install 'fusecheck[eval]'") from None
    config = getattr(transformers, CONFIGS[plan.model])(
        hidden_size=plan.hidden,
        intermediate_size=2 * plan.hidden,
        num_hidden_layers=plan.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=plan.hidden // 8,
        vocab_size=VOCABULARY,
        max_position_embeddings=LONGEST,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(plan.seed)
        dtype = getattr(torch, plan.dtype)
        model = (
            cast("Any", transformers.AutoModelForCausalLM)
            .from_config(config, dtype=dtype, attn_implementation="sdpa")
            .eval()
        )
        for name, parameter in model.named_parameters():
            # Weights as spread as trained ones: the initial 0.02 makes every block vanish beside the residual.
            noise = torch.randn(parameter.shape)
            fresh = 1 + 0.25 * noise if "norm" in name else 0.1 * noise if name.endswith("bias") else noise
            scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 and "embed" not in name else 1.0
            parameter.data = (fresh * scale).to(parameter.dtype)
            if "embed" in name and parameter.dtype is torch.bfloat16:
                parameter.data[WIDE_TOKEN, ::4] *= WIDE
    return model.requires_grad_(requires_grad=False)


def _calibrate(model: nn.Module, plan: ModelPlan) -> dict[str, float]:
    """The largest input of each layer over a few random sequences, by the layer's name."""
    largest: dict[str, float] = {}
    handles = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: largest.update({name: max(largest.get(name, 0.0), float(args[0].abs().max()))})
        )
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in COLUMN + ROW
    ]
    generator = torch.Generator().manual_seed(plan.seed + 1)
    with torch.no_grad():
        model(input_ids=torch.randint(0, WIDE_TOKEN, CALIBRATION, generator=generator), use_cache=False)
    for handle in handles:
        handle.remove()
    return largest


class _QuantLinear(nn.Module):
    """A rank's shard of a layer: E4M3 weight, static scales of its own, then the sum over ranks if it needs one."""

    weight: Tensor
    bias: Tensor | None
    input_scale: Tensor
    weight_scale: Tensor

    def __init__(self, layer: nn.Linear, largest: float, shard: tuple[int, int, int], strategy: str):
        """Quantise with whole-layer scales, then keep part `rank` of `world_size` of `dimension`."""
        super().__init__()
        dimension, rank, world_size = shard
        scale = float(layer.weight.abs().max()) / E4M3_MAX
        codes = (layer.weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        self.register_buffer("weight", codes.chunk(world_size, dimension)[rank].contiguous())
        bias = None if layer.bias is None else layer.bias.detach().chunk(world_size)[rank].contiguous()
        self.register_buffer("bias", bias)
        self.register_buffer("input_scale", torch.tensor(largest / E4M3_MAX))
        self.register_buffer("weight_scale", torch.tensor(scale))
        self.linear: Any = own.fp8_linear.default
        self.reduce: Any = own.all_reduce.default if dimension == 1 else None
        self.strategy = strategy

    def forward(self, x: Tensor) -> Tensor:
        partial: Tensor = self.linear(x, self.weight, self.bias, self.input_scale, self.weight_scale)
        return partial if self.reduce is None else self.reduce(partial, self.strategy)


class _MadeLinear(nn.Module):
    """A rank's shard of a layer in a format that makes its scales, then the sum over ranks if it needs one."""

    weight: Tensor
    bias: Tensor | None
    weight_scales: Tensor
    factor: Tensor | None

    def __init__(self, layer: nn.Linear, largest: float, shard: tuple[int, int, int], plan: ModelPlan):
        """Keep part `rank` of `world_size` of `dimension`, and quantise it."""
        super().__init__()
        dimension, rank, world_size = shard
        self.form, self.dtype, self.strategy = Form(plan.quantiser), plan.dtype, plan.strategy
        mine = layer.weight.detach().chunk(world_size, dimension)[rank]
        self.short = missing(mine.shape[1], self.form)
        codes, scales = quantise(self.padded(mine), None, self.form, DATAFLOWS["trtllm"])
        bias = None if layer.bias is None else layer.bias.detach().chunk(world_size)[rank].contiguous()
        given = torch.tensor(E2M1.largest * E4M3_MAX / largest) if takes_scale(plan.quantiser) else None
        for name, tensor in (("weight", codes), ("weight_scales", scales), ("bias", bias), ("factor", given)):
            self.register_buffer(name, tensor)
        self.quantize: Any = own.quantize.default
        self.linear: Any = own.quantized_linear.default
        self.reduce: Any = own.all_reduce.default if dimension == 1 else None

    def padded(self, x: Tensor) -> Tensor:
        """Rows filled up to whole groups."""
        return torch.cat([x, x.new_zeros(*x.shape[:-1], self.short)], -1) if self.short else x

    def forward(self, x: Tensor) -> Tensor:
        name, layout = self.form.name, self.form.layout
        codes, scales = self.quantize(self.padded(x), self.factor, name, layout)
        operands = (codes, scales, self.weight, self.weight_scales, self.bias, self.factor, None)
        partial: Tensor = self.linear(*operands, name, layout, self.dtype)
        return partial if self.reduce is None else self.reduce(partial, self.strategy)


class _Norm(nn.Module):
    """RMSNorm as one operator, with the two roundings of Hugging Face's."""

    def __init__(self, weight: Tensor, eps: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach())
        self.eps = eps
        self.operator: Any = roles.NORMS["torch"]

    def forward(self, x: Tensor) -> Tensor:
        return self.operator(x, self.weight, self.eps)  # type: ignore[no-any-return]


def _quantize_and_shard(
    model: nn.Module, largest: dict[str, float], plan: ModelPlan, rank: int, world_size: int
) -> None:
    """Put a rank's quantised shards and operator norms in the place of the model's modules."""
    for name, module in list(model.named_modules()):
        owner, _, leaf = name.rpartition(".")
        if leaf in COLUMN + ROW and isinstance(module, nn.Linear):
            shard = (int(leaf in ROW), rank, world_size)
            made = (
                _QuantLinear(module, largest[name], shard, plan.strategy)
                if plan.quantiser == GIVEN_SCALE
                else _MadeLinear(module, largest[name], shard, plan)
            )
            setattr(model.get_submodule(owner), leaf, made)
        elif type(module).__name__.endswith("RMSNorm"):
            eps = float(getattr(module, "variance_epsilon", 1e-6))
            weight = module.get_parameter("weight")
            setattr(model.get_submodule(owner), leaf, _Norm(weight, eps))
