"""What Fusecheck found in FlashInfer's fused kernel, shown with torch and FlashInfer alone on two GPUs of one host.

    python reproduce.py [NAME ...]

Each prints, for each rank, how many elements of residual_out are not the sum that they should be: 0 is right. Inputs
are small integers, so that every sum is exact in bf16. Nothing of Fusecheck is imported.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import flashinfer
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import triton
import triton.language as tl
from flashinfer.comm import trtllm_ar
from torch import Tensor

SECONDS = 30
"""After which an experiment counts as hung."""
START = "spawn" if torch.cuda.is_initialized() else "fork"
"""How ranks are started: importing FlashInfer takes most of an experiment's time."""
LATE = 200_000
"""Cycles that rank 1's stream sleeps before a call, some 0.1 ms."""
QUEUED = 2_000_000_000
"""Cycles that both streams sleep first, some 1.1 s: all calls are queued behind that, and no host holds a rank up."""


class Workspace:
    """FlashInfer's buffers for `tokens` x `hidden`, on one of two ranks."""

    def __init__(self, rank: int, tokens: int, hidden: int) -> None:
        self.rank = rank
        self.handles, self.table, self.metadata = trtllm_ar.trtllm_create_ipc_workspace_for_all_reduce_fusion(
            rank, 2, tokens, hidden, group=dist.group.WORLD, create_metadata=True
        )
        self.gamma = torch.ones(hidden, dtype=torch.bfloat16, device="cuda")

    def close(self) -> None:
        """Give the buffers back."""
        trtllm_ar.trtllm_destroy_ipc_workspace_for_all_reduce_fusion(self.handles, group=dist.group.WORLD)

    def call(self, partial: Tensor, residual: Tensor, *, oneshot: bool, pdl: bool = False) -> Tensor:
        """residual_out of one fused call."""
        residual_out, norm_out = torch.empty_like(residual), torch.empty_like(residual)
        trtllm_ar.trtllm_allreduce_fusion(
            allreduce_in=partial, world_size=2, world_rank=self.rank, token_num=len(partial),
            hidden_dim=partial.shape[1], workspace_ptrs=self.table, launch_with_pdl=pdl,
            trigger_completion_at_end=True, fp32_acc=False, pattern_code=1, use_oneshot=oneshot, allreduce_out=None,
            residual_in=residual, residual_out=residual_out, norm_out=norm_out, quant_out=None, scale_out=None,
            rms_gamma=self.gamma, rms_eps=1e-5,
            scale_factor=None, layout_code=None, metadata=self.metadata,
        )  # fmt: skip
        return residual_out


class Experts(Workspace):
    """A workspace with what calls for experts take besides; made before, so that nothing runs between two calls."""

    def __init__(self, rank: int, tokens: int, hidden: int) -> None:
        super().__init__(rank, tokens, hidden)
        self.routes = torch.arange(tokens, dtype=torch.int32, device="cuda").view(-1, 1)
        self.weights = torch.ones(1, tokens, device="cuda")
        self.no_shared = torch.zeros(tokens, hidden, dtype=torch.bfloat16, device="cuda")

    def finalize(self, partial: Tensor, residual: Tensor) -> Tensor:
        """residual_out of one call of MoE finalize, pattern 7: each token has one route, to the row of its number."""
        residual_out, norm_out = torch.empty_like(residual), torch.empty_like(residual)
        trtllm_ar.trtllm_moe_finalize_allreduce_fusion(
            allreduce_in=partial, residual_in=residual, norm_weight=self.gamma,
            expanded_idx_to_permuted_idx=self.routes[: len(partial)], norm_out=norm_out, residual_out=residual_out,
            quant_out=None, scale_out=None, workspace_ptrs=self.table, launch_with_pdl=False, world_rank=self.rank,
            world_size=2, eps=1e-5, shared_expert_output=None, expert_scale_factor=None, routed_scaling_factor=None,
        )  # fmt: skip
        return residual_out

    def reduce(self, partial: Tensor, residual: Tensor) -> Tensor:
        """residual_out of one call of MoE reduction, pattern 6, over one expert of weight 1."""
        residual_out, norm_out = torch.empty_like(residual), torch.empty_like(residual)
        trtllm_ar.trtllm_moe_allreduce_fusion(
            world_size=2, world_rank=self.rank, token_num=len(partial), hidden_dim=partial.shape[1],
            workspace_ptrs=self.table, launch_with_pdl=False, residual_in=residual, rms_gamma=self.gamma, rms_eps=1e-5,
            scale_factor=1.0, moe_reduction_device_num_experts=1,
            moe_reduction_scale_input=self.weights[:, : len(partial)],
            moe_reduction_active_experts_token_input=partial.unsqueeze(0),
            moe_reduction_token_input=self.no_shared[: len(partial)], layout_code=None, moe_allreduce_out=None,
            residual_out=residual_out, norm_out=norm_out, quant_out=None, scale_out=None,
        )  # fmt: skip
        return residual_out


class Data:
    """Both ranks' addends and the residual of one call."""

    def __init__(self, seed: int, tokens: int, hidden: int) -> None:
        generator = torch.Generator(device="cuda").manual_seed(seed)
        shape = (3, tokens, hidden)
        whole = torch.randint(-8, 9, shape, generator=generator, device="cuda").to(torch.bfloat16)
        *self.partials, self.residual = whole.unbind()
        self.sum = self.partials[0] + self.partials[1] + self.residual

    def wrong(self, residual_out: Tensor) -> int:
        """Elements that are not the sum."""
        return int((residual_out != self.sum).sum())


def cleared_beside(rank: int) -> str:
    """One-shot, 64 rows, a workspace for 32,768 x 8192: a third of 2^30 bytes, and twice that overflows an int32.

    Rank 1 comes 20 ms late each time, so that rank 0 meets whatever an earlier call left in its buffer.
    """
    told = []
    for tokens in (32767, 32768):
        neighbour = torch.full((3 << 30,), 0x11, dtype=torch.uint8, device="cuda")
        workspace = Workspace(rank, tokens, 8192)
        found = []
        for call in range(9):
            data = Data(call, 64, 8192)
            torch.cuda.synchronize()
            dist.barrier()
            time.sleep(0.02 * rank)
            found.append(data.wrong(workspace.call(data.partials[rank], data.residual, oneshot=True)))
        spoilt = int((neighbour != 0x11).sum())
        told.append(f"workspace of {tokens} rows: wrong {found}, bytes of another tensor overwritten {spoilt}")
        torch.cuda.synchronize()
        dist.barrier()
        workspace.close()
        del neighbour, workspace
    return "; ".join(told)


def narrow(rank: int) -> str:
    """Two-shot at hidden 8: a block of one thread for a barrier among two ranks."""
    workspace, data = Workspace(rank, 16, 8), Data(0, 3, 8)
    return f"wrong {data.wrong(workspace.call(data.partials[rank], data.residual, oneshot=False))}"


@triton.jit
def late_copy(source, target, count, nanoseconds, BLOCK: tl.constexpr):
    """Let the next kernel start, wait, then copy."""
    tl.extra.cuda.gdc_launch_dependents()
    began = tl.extra.cuda.globaltimer()
    now = began
    while now - began < nanoseconds:
        now = tl.extra.cuda.globaltimer()
    for start in range(0, count, BLOCK):
        at = start + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < count), mask=at < count)


def early_read(rank: int) -> str:
    """Under PDL, the residual written by the kernel right before, which lets its dependents start early."""
    workspace, found = Workspace(rank, 16, 4096), []
    for call in range(4):
        data = Data(call, 16, 4096)
        residual = torch.zeros_like(data.residual)
        torch.cuda.synchronize()
        dist.barrier()
        words = data.residual.view(torch.int16)
        late_copy[(1,)](words, residual.view(torch.int16), words.numel(), 200_000, BLOCK=1024)
        found.append(data.wrong(workspace.call(data.partials[rank], residual, oneshot=True, pdl=True)))
    return f"wrong {found}"


def small_then_large(rank: int) -> str:
    """Two-shot, 3 rows and then 1024, without a wait between, 64 times."""
    workspace = Workspace(rank, 1024, 4096)
    few = Data(0, 3, 4096)
    many = [Data(1 + turn % 2, 1024, 4096) for turn in range(2)]
    torch.cuda.synchronize()
    dist.barrier()
    returned = []
    for turn in range(64):
        workspace.call(few.partials[rank], few.residual, oneshot=False)
        returned.append(workspace.call(many[turn % 2].partials[rank], many[turn % 2].residual, oneshot=False))
    found = [many[turn % 2].wrong(out) for turn, out in enumerate(returned)]
    return f"wrong in {sum(count > 0 for count in found)} of 64 calls, {sum(found)} elements"


def two_streams(rank: int) -> str:
    """One-shot calls on one workspace from two streams that nothing orders."""
    workspace = Workspace(rank, 16, 4096)
    data = [Data(seed, 16, 4096) for seed in range(2)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    dist.barrier()
    returned = []
    for call in range(64):
        with torch.cuda.stream(streams[call % 2]):
            returned.append(workspace.call(data[call % 2].partials[rank], data[call % 2].residual, oneshot=True))
    torch.cuda.synchronize()
    found = [data[call % 2].wrong(out) for call, out in enumerate(returned)]
    return f"wrong in {sum(count > 0 for count in found)} of 64 calls, {sum(found)} elements"


def experts_in_turn(rank: int, tokens: int, *, finalize: bool) -> str:
    """Sums of experts of 3 rows and of `tokens` in turn, without a wait between, 64 times; rank 1 sleeps before each.

    So rank 0 ends a call as soon as rank 1 has sent its rows, and is in its next call while rank 1 still reads.
    """
    workspace = Experts(rank, tokens, 4096)
    call = workspace.finalize if finalize else workspace.reduce
    sets = [Data(0, 3, 4096), Data(1, tokens, 4096)]
    for data in sets:  # what is compiled or loaded at the first call is there before the ranks drift apart
        call(data.partials[rank], data.residual)
        torch.cuda.synchronize()
    dist.barrier()
    returned = []
    torch.cuda._sleep(QUEUED)
    for turn in range(128):
        data = sets[turn % 2]
        if rank == 1:
            torch.cuda._sleep(LATE)
        returned.append(call(data.partials[rank], data.residual))
    torch.cuda.synchronize()
    found = [sets[turn % 2].wrong(out) for turn, out in enumerate(returned)]
    return f"wrong in {sum(count > 0 for count in found)} of 128 calls, {sum(found)} elements"


def moe_finalize(rank: int) -> str:
    """Pattern 7 at 2048 x 4096, where 16 clusters take 128 rows each: it polls the copies in the peer's memory."""
    return experts_in_turn(rank, 2048, finalize=True)


def moe_finalize_129_rows(rank: int) -> str:
    """The same with 129 rows, nine a cluster: they are read sooner."""
    return experts_in_turn(rank, 129, finalize=True)


def moe_finalize_8_rows(rank: int) -> str:
    """The same with 8 rows: a cluster takes one, and has read it soon."""
    return experts_in_turn(rank, 8, finalize=True)


def moe_reduction(rank: int) -> str:
    """Pattern 6 in the place of pattern 7, at 2048 x 4096: the same exchange, but it polls its own copies."""
    return experts_in_turn(rank, 2048, finalize=False)


def nvfp4(rank: int) -> str:
    """Pattern 5, norm and NVFP4, 16 rows of 4096: which bytes of its outputs are written, and with what."""
    workspace, data = Workspace(rank, 16, 4096), Data(0, 16, 4096)
    told = []
    for poison in (0xA5, 0x5A):
        codes = torch.full((16, 2048), poison, dtype=torch.uint8, device="cuda")
        scales = torch.full((128 * 256,), poison, dtype=torch.uint8, device="cuda")
        norm = torch.full_like(data.residual, float("nan"))
        stream = torch.empty_like(data.residual)
        trtllm_ar.trtllm_allreduce_fusion(
            allreduce_in=data.partials[rank], world_size=2, world_rank=rank, token_num=16,
            hidden_dim=4096, workspace_ptrs=workspace.table, launch_with_pdl=False,
            trigger_completion_at_end=True, fp32_acc=False, pattern_code=5, use_oneshot=True, allreduce_out=None,
            residual_in=data.residual, residual_out=stream, norm_out=norm, quant_out=codes, scale_out=scales,
            rms_gamma=workspace.gamma, rms_eps=1e-5,
            scale_factor=torch.ones(1, device="cuda"), layout_code=0, metadata=workspace.metadata,
        )  # fmt: skip
        torch.cuda.synchronize()
        written = [f"{int((made != poison).sum())} of {made.numel()}" for made in (codes, scales)]
        zeros = [int((made == 0).sum()) for made in (codes, scales)]
        told.append(
            f"poison {poison:#x}: codes written {written[0]} (zeros {zeros[0]}), scales written {written[1]}"
            f" (zeros {zeros[1]}), norm NaN {int(norm.isnan().sum())}, residual wrong {data.wrong(stream)}"
        )
    return "; ".join(told)


EXPERIMENTS: dict[str, Callable[[int], str]] = {
    experiment.__name__.replace("_", "-"): experiment
    for experiment in (
        *(cleared_beside, narrow, early_read, small_then_large, two_streams, nvfp4),
        *(moe_finalize_8_rows, moe_finalize_129_rows, moe_reduction, moe_finalize),
    )
}


def run(rank: int, name: str, port: int) -> None:
    """One experiment on one rank."""
    warnings.simplefilter("ignore")
    torch.cuda.set_device(rank)
    where = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl", where, rank=rank, world_size=2, device_id=torch.device("cuda", rank))
    try:
        told = EXPERIMENTS[name](rank)
        torch.cuda.synchronize()
    except Exception as error:
        told = f"{type(error).__name__}: {str(error).strip().splitlines()[-1].rsplit('/')[-1]}"
    sys.stdout.write(f"{name}, rank {rank}: {told}\n")
    sys.stdout.flush()
    dist.barrier()
    dist.destroy_process_group()


def main(names: list[str]) -> None:
    """Run the experiments, two processes each."""
    print(f"flashinfer {flashinfer.__version__}, torch {torch.__version__}", flush=True)
    for index, name in enumerate(names):
        ranks = mp.start_processes(run, (name, 29600 + index), nprocs=2, join=False, start_method=START)
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and any(process.is_alive() for process in ranks.processes):
            time.sleep(0.1)
        for rank, process in enumerate(ranks.processes):
            if process.is_alive():
                print(f"{name}, rank {rank}: hangs, ended after {SECONDS} s", flush=True)
                process.kill()


if __name__ == "__main__":
    main(sys.argv[1:] or list(EXPERIMENTS))
