"""The largest micro-batch that the device's memory holds, found by trying."""

from collections.abc import Callable

import torch

# Share of the device's memory that a trial may take: what is left is for fragments.
USABLE_MEMORY = 0.9
# So many pairs keep any device busy; more only make the search longer.
MAX_MICRO_BATCH = 256
# On CPUs memory is no limit; 96 pairs of the built-in model are within 13 % of the fastest size.
CPU_MICRO_BATCH = 96


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size up to ``limit``, to an eighth, for which ``fits(size)`` holds, if it holds
    for all smaller ones; 0 if not even for 1.
    """
    low, high = 0, 1
    while high <= limit and fits(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low


def fitting_micro_batch(run: Callable[[int], None], limit: int, device: torch.device) -> int:
    """The largest size for which ``run(size)``, a forward and a backward, stays within the share
    USABLE_MEMORY of the memory of ``device``.

    Raises torch.OutOfMemoryError, with advice, if there is none.
    """
    if device.type != "cuda":
        return min(limit, CPU_MICRO_BATCH)
    total = torch.cuda.get_device_properties(device).total_memory

    def fits(size: int) -> bool:
        torch.cuda.empty_cache()
        taken = total - torch.cuda.mem_get_info(device)[0]
        others = taken - torch.cuda.memory_reserved(device)  # the CUDA context, other processes
        torch.cuda.reset_peak_memory_stats(device)
        try:
            run(size)
        except torch.OutOfMemoryError:
            return False
        return torch.cuda.max_memory_reserved(device) + others <= USABLE_MEMORY * total

    found = largest(fits, min(limit, MAX_MICRO_BATCH))
    torch.cuda.empty_cache()
    if not found:
        raise torch.OutOfMemoryError(
            "not even one (sample, sigma) pair can be trained in the memory of the GPU; set "
            "perf.gradient_checkpointing = True and perf.offload_text_encoders = True"
        )
    return found
