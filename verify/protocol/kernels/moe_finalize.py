"""MoE finalize of FlashInfer 0.7.4: `moefinalize_allreduce_fusion_kernel_oneshot_lamport`.

One-shot Lamport but for one line (trtllm_moe_allreduce_fusion.cuh): each rank polls the copy that the *sender* wrote
into its own buffer (`comm.data_bufs[r]`), not the one that was pushed to it. TensorRT-LLM's kernel, and FlashInfer's
others, poll their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusecheck.protocol.kernels.oneshot import OneShot
from fusecheck.protocol.language import Block


@dataclass(frozen=True)
class MoeFinalize(OneShot):
    """The exchange of MoE finalize.

    Attributes:
        polls_senders: as FlashInfer does; its own copy otherwise.
    """

    name: str = "MoE finalize"
    polls_senders: bool = True

    def polled(self, b: Block, source: int) -> int:
        """The sender's."""
        return source if self.polls_senders else b.rank
