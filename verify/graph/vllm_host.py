"""What vLLM's fusion pass asks of its engine, so that the pass's own code runs where no engine does.

The pass is Python on a graph; it needs no GPU. What it imports around itself does: platform, process groups,
FlashInfer's workspace, compiled operators. Where vLLM cannot be imported whole, but its files are there, the pass's own
modules are loaded from them, and the rest of the package is stood in for. Operators that are missing are registered
under the schemas that vLLM publishes (`schemas.toml`); they are only carried in graphs and never run.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import logging
import re
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch._ops import OpOverload

from fusecheck.backends.flashinfer_patterns import pattern_of
from fusecheck.errors import UsageError
from fusecheck.graph.schemas import published
from fusecheck.operations import Operation

PACKAGE = "vllm"
FUSION = "vllm.compilation.passes.fusion.allreduce_rms_fusion"
OWN_CODE = (
    *("vllm.compilation.passes", "vllm.ir", "vllm.scalar_type"),
    "vllm.model_executor.layers.quantization.utils.quant_utils",
)
"""What is always vLLM's own: the passes, the IR and the descriptions of quantisers."""
GROUP = "tp:0"
"""How vLLM names the tensor-parallel group."""
STRATEGY = "AUTO"
"""Of the exchange: vLLM's graphs name none."""
PARAMETER = "fusecheck_parameter"
"""Key in the meta of an input that is a parameter: its name and tensor."""
PATTERN_CODES = {
    f"kARResidualRMSNorm{rest}": pattern_of(Operation.named(f"kARResidualRMSNorm{rest}"))
    for rest in (
        *("", "FP8Quant", "OutFP8Quant", "FP4Quant", "DynamicFP8Quant", "OutDynamicFP8Quant"),
        *("PerTokenGroupFP8PackedQuant", "OutPerTokenGroupFP8PackedQuant"),
    )
}
"""FlashInfer's numbers of its operations; vLLM's pass makes those of the norm, static FP8 and NVFP4."""
CAPABILITY = 100
"""Of the chip for which the pass is asked where none is here: with NVFP4."""
_NO_OPERATOR = re.compile(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'")


@cache
def files() -> Path | None:
    """Where vLLM's files are, installed whole or not; None where they are not."""
    places = (Path(place or ".") / PACKAGE for place in sys.path)
    return next((place for place in places if (place / "compilation").is_dir()), None)


def status() -> str:
    """What this installation allows, in one line."""
    if files() is None:
        return "vLLM: not installed, its own pass was not checked; its operators are stand-ins"
    return "vLLM: its files are here; --dialect vllm --pass fusecheck.graph.vllm:fuse_allreduce_rms checks its own pass"


@cache
def register() -> None:
    """Register the operators that graphs carry, as far as no vLLM has: its IR's are its own where its files are."""
    if files() is not None:
        _module("vllm.ir")
    for entry in published(PACKAGE).values():
        if entry.overload is None:
            torch.library.define(entry.name, entry.schema)
            _describe(entry.name)


def overload(role: str) -> OpOverload:
    """The operator of a role."""
    found = published(PACKAGE)[role].overload
    assert found is not None, role
    return found


def _describe(name: str) -> None:
    """Fake kernels: results like their first operand, and nothing for operators that write."""

    def like_the_first(x: torch.Tensor, *rest: Any, **options: Any) -> torch.Tensor:
        return torch.empty_like(x)

    def like_both(x: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.empty_like(x), torch.empty_like(x)

    def nothing(*args: Any, **options: Any) -> None:
        return None

    kinds: dict[str, Callable[..., Any]] = {
        "vllm::all_reduce": like_the_first,
        "vllm_ir::rms_norm": like_the_first,
        "vllm_ir::fused_add_rms_norm": like_both,
    }
    torch.library.register_fake(name, kinds.get(name, nothing))


@cache
def fusion_pass(world_size: int, dtype: torch.dtype, max_tokens: float) -> Callable[[Any], None]:
    """VLLM's pass, ready to be called with a graph.

    Args:
        world_size: of the tensor-parallel group; the pass is off for 1.
        dtype: of the activations.
        max_tokens: the end of the range of sizes that the graph is compiled for.

    Raises:
        UsageError: vLLM's files are not here.
    """
    if files() is None:
        raise UsageError("vLLM's own pass needs its files: pip install vllm, with --no-deps where there is no GPU")
    register()
    module = _module(FUSION)
    if world_size < 2:
        return lambda graph: None
    module.flashinfer_comm = SimpleNamespace(AllReduceFusionPattern=SimpleNamespace(**PATTERN_CODES))
    module.flashinfer_trtllm_fused_allreduce_norm = published(PACKAGE)["fused"].overload
    group = SimpleNamespace(all_reduce=lambda x: torch.ops.vllm.all_reduce(x, GROUP), cpu_group=None)
    module.get_tp_group = lambda: group
    module.tensor_model_parallel_all_reduce = group.all_reduce
    module.get_tensor_model_parallel_world_size = lambda: world_size
    made: Any = module.AllReduceFusionPass.__new__(module.AllReduceFusionPass)
    made.pass_name, made.model_dtype, made.device, made.tp_size = "AllReduceFusionPass", dtype, "cpu", world_size
    made.disabled, made.supports_quant_fusion = True, True
    made.max_token_num = 1 << 20
    made.allreduce_params = module.FlashInferFusedAllReduceParams(world_size=world_size, max_token_num=1 << 20)
    made.patterns = module.PatternMatcherPass(pass_name="all_reduce_fusion_pass")
    _configure(dtype)
    made.register_patterns()
    if not made.is_applicable_for_range(SimpleNamespace(start=1, end=max_tokens)):
        return lambda graph: None
    return made  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    """A module of vLLM's: from the package if it can be imported whole, else with stand-ins around it."""
    if not _whole() and not any(isinstance(finder, _StandIns) for finder in sys.meta_path):
        for known in [known for known in sys.modules if known.partition(".")[0] == PACKAGE]:
            del sys.modules[known]
        sys.meta_path.insert(0, _StandIns())
    while True:
        try:
            return importlib.import_module(name)
        except AttributeError as error:  # noqa: PERF203 - once an operator, not once an element
            # The passes name compiled operators that no graph here has.
            absent = _NO_OPERATOR.search(str(error))
            if absent is None:
                raise
            torch.library.define(f"{absent[1]}::{absent[2]}", "(Tensor(a!) result, Tensor input) -> ()")


@cache
def _whole() -> bool:
    """Whether what surrounds the passes can be imported, with all that it needs."""
    try:
        importlib.import_module("vllm.config")
        importlib.import_module("vllm.distributed")
    except Exception:
        return False
    return True


_settings = SimpleNamespace(
    model_config=SimpleNamespace(dtype=torch.bfloat16),
    device_config=SimpleNamespace(device="cpu"),
)


def _configure(dtype: torch.dtype) -> None:
    _settings.model_config.dtype = dtype


class _Anything:
    """Stands for whatever a module imports and only uses where no graph pass gets to."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """Takes whatever it is given."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *args: Any, **options: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) else _Anything()

    def __bool__(self) -> bool:
        return False

    def __or__(self, other: Any) -> Any:
        return object

    __ror__ = __or__

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (object,)


class _Logger(logging.Logger):
    """A logger with vLLM's further methods."""

    debug_once = info_once = warning_once = lambda self, *args, **options: None


ANSWERS: dict[str, dict[str, Any]] = {
    "vllm.platforms": {
        "current_platform": SimpleNamespace(
            fp8_dtype=lambda: torch.float8_e4m3fn,
            device_type="cpu",
            is_cuda=lambda: True,
            is_cuda_alike=lambda: True,
            is_rocm=lambda: False,
            is_xpu=lambda: False,
            is_cpu=lambda: False,
            has_device_capability=lambda least, *_: least <= CAPABILITY,
            get_device_capability=lambda *_: None,
        )
    },
    "vllm.logger": {"init_logger": lambda name: _Logger(name)},
    "vllm.config": {"get_current_vllm_config": lambda: _settings},
    "vllm.model_executor.layers.quantization.input_quant_fp8": {
        "QuantFP8": type("QuantFP8", (_Anything,), {"enabled": staticmethod(lambda: True)})
    },
}
"""What the pass's modules do use of the modules that are stood in for."""


class _StandIn(ModuleType):
    """A module that has whatever is asked of it."""

    __path__: Any = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return ANSWERS.get(self.__name__, {}).get(name) or _Anything()


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds vLLM's modules: its own code in its files, and a stand-in for every other."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        """See `importlib.abc.MetaPathFinder`."""
        if name.partition(".")[0] != PACKAGE:
            return None
        root = files()
        assert root is not None
        place = root.joinpath(*name.split(".")[1:])
        if any(name == own or name.startswith(f"{own}.") for own in OWN_CODE):
            file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
            inside = [str(place)] if place.is_dir() else None
            return importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: Any) -> ModuleType:
        """See `importlib.abc.Loader`."""
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is to be run."""
