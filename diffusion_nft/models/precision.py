"""Compute precision: the dtype of frozen weights, autocast, and fp16's loss scaling.

LoRA weights, their gradients and the optimizer are float32 (float64 under ``fp64``); frozen weights
are stored in the compute dtype.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

COMPUTE_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "no": torch.float32,
    "fp64": torch.float64,
}
# Losses are means over the pairs of an epoch, 10,368 in the presets of SD3.5.  With torch's initial
# scale of 2**16, a factor of 6 per pair, many gradients would underflow in fp16; with its growth
# interval of 2,000 updates, the scale would double once per 2,000 epochs.
FIRST_LOSS_SCALE, UPDATES_UNTIL_IT_DOUBLES = 2.0**20, 200


def set_tf32(allowed: bool) -> None:
    """Allows or forbids TF32 for float32 matrix products and convolutions in this process, which
    also changes the scores of float32 rewards.
    """
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


class Precision:
    """``mixed_precision`` (a key of COMPUTE_DTYPES) on a device.

    ``allow_tf32``: as ``set_tf32``.
    """

    def __init__(self, mixed_precision: str, device: torch.device, *, allow_tf32: bool = True):
        self.compute_dtype = COMPUTE_DTYPES[mixed_precision]
        self.trained_dtype = torch.promote_types(self.compute_dtype, torch.float32)
        self.device = device
        set_tf32(allow_tf32)
        # Sums of half-precision products in float32 (EDM2, arXiv 2312.02696).
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
        # Disabled, and then a no-op, except in fp16.
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=FIRST_LOSS_SCALE,
            growth_interval=UPDATES_UNTIL_IT_DOUBLES,
            enabled=mixed_precision == "fp16",
        )

    def autocast(self, stored: torch.dtype) -> AbstractContextManager:
        """Autocast to the compute dtype for weights ``stored`` in another one, else a no-op.

        Autocast widens LayerNorm's output to float32, and each layer after it keeps a copy of its
        own in the compute dtype for the backward pass.
        """
        if stored == self.compute_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)


def resolves_lora_updates(weight: Tensor, dtype: torch.dtype) -> bool:
    """True if LoRA updates can be merged into ``weight`` at the precision of ``dtype``.

    False if the weight has fewer bits, or TF32 truncates it to 11 bits: early LoRA updates are
    smaller than the spacing of such numbers and would be rounded away.
    """
    cut = weight.is_cuda and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return weight.dtype == dtype and not cut
