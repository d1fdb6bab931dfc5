"""Compute precision: the dtype of frozen weights, autocast, and fp16's loss scaling.

LoRA weights, their gradients and the optimizer are float32 (float64 under ``fp64``); frozen weights
are stored in the compute dtype, and autocast brings the two together.
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
# Losses are means over an epoch's pairs, 10,368 of them in the presets of SD3.5: torch's first
# scale of 2**16 leaves 6 of it to a pair, and much of a gradient below fp16's smallest numbers.
# Its 2,000 good updates until the scale doubles are as many epochs.
FIRST_LOSS_SCALE, UPDATES_UNTIL_IT_DOUBLES = 2.0**20, 200


def set_tf32(allowed: bool) -> None:
    """Lets float32 matrix products and convolutions of this process use TF32 on GPUs that have it,
    or forbids it.  Scores of float32 rewards depend on it, too.
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
        # Overflow is possible in fp16 alone; elsewhere the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=FIRST_LOSS_SCALE,
            growth_interval=UPDATES_UNTIL_IT_DOUBLES,
            enabled=mixed_precision == "fp16",
        )

    def autocast(self) -> AbstractContextManager:
        """Autocast to the compute dtype; a no-op where that is the weights' own."""
        if self.compute_dtype == self.trained_dtype:
            return nullcontext()
        return torch.autocast(self.device.type, self.compute_dtype)


def resolves_lora_updates(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with ``weight`` see a change of it to all digits of ``dtype``.

    Not if its own type is narrower, nor where TF32 cuts it to 11 bits: adding to a weight less than
    half the distance to its neighbour leaves it as it is, and LoRA's early updates are as small.
    """
    cut = weight.is_cuda and dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return weight.dtype == dtype and not cut
