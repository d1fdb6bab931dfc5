"""Estimated GPU memory of an SD3 model by micro-batch, without a GPU or weights.

The trainer's own parts (policy, velocity, loss, backward pass, decoder) run on tensors that have
shapes and dtypes but no storage.  The peak is the largest sum of the bytes of all live tensors
after an operation.  Attention is fused.  Not included: the CUDA context, workspaces of cuBLAS and
cuDNN, fragmentation of the allocator, and rewards.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from diffusion_nft.algorithms import Batch
from diffusion_nft.benchmarks.models import CLIP_TOKENS, Setup
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.flow import add_noise
from diffusion_nft.models import image_size
from diffusion_nft.models.embeddings import PromptEmbeds
from diffusion_nft.tracking.plan import memory
from diffusion_nft.update import build_learner
from diffusion_nft.utils.tables import markdown_table

META = torch.device("meta")
# The only one of ARCHITECTURES for which the text encoders are counted.
WITH_TEXT_ENCODERS = "sd3.5-medium"
# Numbers of parameters; T5_FLOAT32: the second projections of its 24 feed-forward layers.
TEXT_ENCODERS = {"CLIP-L/14": 123_650_304, "OpenCLIP-G/14": 694_659_840, "T5-XXL": 4_762_310_656}
T5_FLOAT32 = 24 * 10240 * 4096


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live storages made by operations: currently ``now``, at most ``peak``."""

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # In-place operations and views return existing storages.
            if isinstance(leaf, Tensor) and not func.is_view and not func._schema.is_mutable:
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    assert not options.get("dropout_p") and not options.get("is_causal")
    assert options.get("attn_mask") is None
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


def peak_bytes(work: Callable[[], object]) -> int:
    """Peak bytes of the tensors made in ``work()``.

    Attention keeps what CUDA's fused kernels keep for the backward pass: the inputs, the output and
    one number per row.  The default for tensors without storage keeps one per pair of tokens.
    """
    with mock.patch.object(F, "scaled_dot_product_attention", _attention), LiveBytes() as live:
        work()
    return live.peak


class MemoryEstimate:
    """Memory of a model, its policy and the parts of an epoch.

    Raises ValueError if the model does not support the resolution.
    """

    def __init__(self, config: ConfigDict, arch: str):
        setup = Setup.of(config, Distributed(0, 1, 0, META), arch)
        with META:
            self.model: Any = setup.load()
            learner = build_learner(config, setup.dist, self.model)
        self.policy, self.algorithm = learner.policy, learner.algorithm
        self.latent_shape = self.model.latent_shape(image_size(config))
        self.kept = dict(memory(self.model, self.policy, setup.num_samples, self.latent_shape))
        for weight in self.policy.parameters():
            weight.grad = torch.zeros_like(weight)

    def _inputs(self, size: int) -> tuple[Tensor, Tensor, PromptEmbeds]:
        """x, sigma and conditioning of a micro-batch."""
        shape, precision = self.model.transformer.config, self.model.precision
        length = CLIP_TOKENS + self.model.max_sequence_length
        with META:
            prompt_embeds = torch.empty(size, length, shape.joint_attention_dim)
            pooled = torch.empty(size, shape.pooled_projection_dim)
            x = torch.empty(size, *self.latent_shape, dtype=precision.trained_dtype)
            sigma = torch.empty(size, dtype=precision.trained_dtype)
        dtype = precision.compute_dtype
        lengths = (length,) * size
        return x, sigma, PromptEmbeds(prompt_embeds.to(dtype), lengths, pooled.to(dtype))

    def training(self, size: int, *, checkpointing: bool) -> float:
        """GB of a training step on a micro-batch of ``size`` (sample, sigma) pairs."""

        def work() -> None:
            x0, sigma, cond = self._inputs(size)
            noise = torch.empty_like(x0)
            batch = Batch(x0, noise, add_noise(x0, noise, sigma), sigma, torch.empty_like(sigma))

            def velocity(policy: str) -> Tensor:
                with self.policy.use_adapter(policy), torch.set_grad_enabled(policy == "current"):
                    return self.model.velocity(batch.xt, sigma, cond)

            losses, _ = self.algorithm.loss(velocity, batch)
            losses.sum().backward()

        transformer = self.model.transformer
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        else:
            transformer.disable_gradient_checkpointing()
        return peak_bytes(work) / 1e9

    @torch.no_grad()
    def sampling(self, size: int) -> float:
        """GB of a forward pass of ``size`` samples with the old policy."""

        def work() -> None:
            with self.policy.use_adapter("old"):
                self.model.velocity(*self._inputs(size))

        return peak_bytes(work) / 1e9

    def decoding(self, size: int) -> float:
        """GB of decoding ``size`` latents together, in the decoder's precision."""
        x0, _, _ = self._inputs(size)
        self.model.vae_batch_size = size
        return peak_bytes(lambda: self.model.decode(x0)) / 1e9


def text_encoders_gb(dtype: torch.dtype) -> float:
    """GB of SD3's text encoders; in fp16, transformers keeps some T5 weights in float32."""
    size = sum(TEXT_ENCODERS.values()) * dtype.itemsize
    if dtype == torch.float16:
        size += T5_FLOAT32 * 2
    return size / 1e9


def estimate(config: ConfigDict, arch: str, sizes: Sequence[int]) -> dict[str, Any]:
    """Memory in GB by micro-batch size, ready for JSON."""
    model = MemoryEstimate(config, arch)
    # Random pipelines have no encoders.
    kept = {what: gb for what, gb in model.kept.items() if "encoders" not in what}
    encoders = {}
    if arch == WITH_TEXT_ENCODERS:
        encoders["text encoders"] = text_encoders_gb(model.model.precision.compute_dtype)
    return {
        "about": {
            "arch": arch,
            "resolution": config.resolution,
            "lora_rank": config.train.lora_rank,
            "mixed_precision": config.mixed_precision,
            "torch": torch.__version__,
        },
        "kept_gb": kept,
        "encoders_gb": encoders,
        "activations_gb": {
            size: {
                "training": model.training(size, checkpointing=False),
                "training, gradient checkpointing": model.training(size, checkpointing=True),
                "sampling": model.sampling(size),
                "decoding": model.decoding(size),
            }
            for size in sizes
        },
    }


def table(results: dict[str, Any]) -> str:
    """The results of ``estimate`` in Markdown."""
    about, by_size = results["about"], results["activations_gb"]
    kept = results["kept_gb"] | {"total": sum(results["kept_gb"].values())}
    kept |= {f"{what}, unless offloaded": gb for what, gb in results["encoders_gb"].items()}
    columns = list(next(iter(by_size.values())))
    rows = [[str(size), *(f"{gb:.2f}" for gb in row.values())] for size, row in by_size.items()]
    return "\n\n".join(
        (
            f"{about['arch']}, {about['resolution']} pixels, LoRA of rank {about['lora_rank']}, "
            f"{about['mixed_precision']}: estimated, not measured on a GPU",
            markdown_table(["constant", "GB"], [[what, f"{gb:.2f}"] for what, gb in kept.items()]),
            markdown_table(["micro-batch: additional GB", *columns], rows),
        )
    )
