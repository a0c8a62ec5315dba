"""What Fusecheck found in kernels of two other wheels, shown with torch and the wheels' libraries alone.

    python reproduce_wheels.py sglang        sglang-kernel, one GPU
    python reproduce_wheels.py tokenspeed    tokenspeed-kernel, two GPUs of one host

Nothing of Fusecheck is imported.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def sglang() -> None:
    """Groups of 128 as FP8 with scales that are powers of two: one infinity, and what becomes of its neighbours."""
    found = importlib.util.find_spec("sgl_kernel")
    assert found is not None
    assert found.submodule_search_locations
    load: Any = torch.ops.load_library
    load(str(Path(found.submodule_search_locations[0], "sm90", "common_ops.abi3.so")))
    for value in (float("inf"), float("nan"), 1.0):
        given = torch.ones(4, 128, dtype=torch.bfloat16, device="cuda")
        given[0, 0] = value
        codes = torch.empty(4, 128, dtype=torch.float8_e4m3fn, device="cuda")
        packed = torch.zeros(1, 4, dtype=torch.int32, device="cuda").t()  # four exponents a word, by columns
        quantise: Any = torch.ops.sgl_kernel.sgl_per_token_group_quant_8bit_v2
        powers, silu = True, False
        quantise(given, codes, packed, 128, 1e-10, -448.0, 448.0, powers, silu, None)
        exponents = packed.flatten().view(torch.uint8)[::4].tolist()
        rows = [sorted(set(row)) for row in codes.float()[:, 1:].tolist()]
        print(f"element 0 of row 0 is {value}, the others 1: exponents {exponents}, codes of the others by row {rows}")


def tokenspeed(rank: int) -> None:
    """Pattern 4, norm and static FP8: 16 rows of 4096 on outputs that were filled before."""
    from tokenspeed_kernel.thirdparty.cuda import trtllm

    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", "tcp://127.0.0.1:29700", rank=rank, world_size=2)
    made: Any = trtllm
    _, table, metadata = made.trtllm_create_ipc_workspace_for_all_reduce_fusion(
        rank, 2, 16, 4096, group=dist.group.WORLD, create_metadata=True
    )
    for pattern in (1, 4):
        ones = torch.ones(16, 4096, dtype=torch.bfloat16, device="cuda")
        norm, stream = torch.full_like(ones, 7.0), torch.full_like(ones, 7.0)
        codes = torch.full((16, 4096), 7.0, device="cuda").to(torch.float8_e4m3fn)
        made.trtllm_allreduce_fusion(
            allreduce_in=ones, world_size=2, world_rank=rank, token_num=16, hidden_dim=4096, workspace_ptrs=table,
            launch_with_pdl=False, trigger_completion_at_end=True, fp32_acc=False, pattern_code=pattern,
            use_oneshot=True, residual_in=ones, residual_out=stream, norm_out=norm, quant_out=codes,
            rms_gamma=ones[0], rms_eps=1e-5, scale_factor=torch.ones(1, device="cuda"), layout_code=None,
            metadata=metadata,
        )  # fmt: skip
        torch.cuda.synchronize()
        left = [int((tensor.float() == 7.0).sum()) for tensor in (stream, norm, codes)]
        told = dict(zip(("residual", "norm", "codes"), left, strict=True))
        print(f"rank {rank}, pattern {pattern}: of 65536 elements each, left as they were: {told}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name(0)}", flush=True)
    if sys.argv[1:] == ["sglang"]:
        sglang()
    else:
        mp.spawn(tokenspeed, nprocs=2)
