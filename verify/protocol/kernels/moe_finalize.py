"""MoE finalize, pattern 7 of FlashInfer 0.6.13 to 0.7.4: `moefinalize_allreduce_fusion_kernel_oneshot_lamport`.

One-shot Lamport but for one line (trtllm_moe_allreduce_fusion.cuh:1382, 1376 in 0.6.13): each rank polls the copy that
the *sender* wrote into its own buffer (`comm.data_bufs[r]`), not the one that was pushed to it. FlashInfer's others
(MoE reduction, pattern 6, line 1067) and TensorRT-LLM's MoE finalize poll their own (`comm.data_bufs[params.rank]`).
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
