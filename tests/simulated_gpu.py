"""The device "gpu:0" in host memory: real values, and CUDA's rule that devices do not mix.

Tensors on it hold a CPU tensor and report another device.  torch runs its autograd on them, so a
whole training run can be compared with one on the CPU.  Not simulated: streams, events and pinned
memory, which the program uses for devices of the type "cuda" alone.
"""

from collections import Counter
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
COPIES = (aten.copy_.default, aten._to_copy.default)
# Operations after which the host waits for the device, as they are called by name.
WAITS: Counter[str] = Counter()
_library = torch.library.Library("aten", "IMPL")


class SimulatedTensor(Tensor):
    """``held``, reported as a tensor on the simulated GPU."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, inner: Tensor) -> "SimulatedTensor":
        tensor = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("gpu", 0),
        )
        tensor.held = inner
        return tensor

    def tolist(self) -> Any:
        WAITS["tolist"] += 1
        return self.held.tolist()

    def numpy(self, **options: Any) -> Any:
        raise TypeError("can't convert a tensor on the simulated GPU to numpy")

    def __repr__(self, **options: Any) -> str:
        return f"gpu({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_gpu = {id(t.held): t for t in tensors if isinstance(t, cls)}
        for tensor in tensors:
            # CUDA takes numbers, which tensors of no dimension are, from the CPU.
            if func not in COPIES and not isinstance(tensor, cls) and tensor.dim():
                shape = tuple(tensor.shape)
                raise RuntimeError(f"{func}: a CPU tensor of shape {shape} meets one on the GPU")
        if func is aten._fused_sdp_choice.default:
            return 0  # the formula: the fused kernels are chosen by device
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = torch.device("cpu")
        out = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if func in (aten._local_scalar_dense.default, aten.nonzero.default):
            WAITS[func.name()] += 1
        if device is not None and torch.device(device).type == "cpu":
            WAITS["to cpu"] += 1
            return out
        if func is aten.copy_.default and not isinstance(args[0], cls):
            WAITS["to cpu"] += 1
            return args[0]
        return tree_map(lambda x: on_gpu.get(id(x), cls(x)) if isinstance(x, Tensor) else x, out)


def _inner(value: Any) -> Any:
    return value.held if isinstance(value, SimulatedTensor) else value


def _empty(size, *, memory_format=None, dtype=None, layout=None, device=None, pin_memory=None):
    memory_format = memory_format or torch.contiguous_format
    return SimulatedTensor(torch.empty(size, dtype=dtype, memory_format=memory_format))


def _empty_strided(size, stride, *, dtype=None, layout=None, device=None, pin_memory=None):
    return SimulatedTensor(torch.empty_strided(size, stride, dtype=dtype))


def _copy_from(source, target, non_blocking=False):
    _inner(target).copy_(_inner(source))
    return target


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


@cache
def simulated_gpu() -> torch.device:
    """The device, which this process can use from now on; call it before any backward pass."""
    _setup_privateuseone_for_python_backend("gpu", backend_module=_Backend())
    # ``Module.to`` would otherwise change what a parameter reports, not what it holds.
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy_from, "PrivateUse1")
    return torch.device("gpu", 0)
