"""Micro-batch against memory of an SD3 model on a GPU, by arithmetic: needs no GPU and no weights.

    python scripts/benchmark_memory.py                                  # SD3.5-Medium, 512 pixels
    python scripts/benchmark_memory.py --resolution 1024 --precision bf16 --sizes 1 2 4

The trainer's own parts (policy, velocity, loss, backward, decoder) run on tensors that have shapes
and types but no storage, and after every operation the bytes of all live tensors are summed: the
largest sum is the peak.  Attention is the fused kind, and types are those of CUDA's autocast.  Not
in it: what the CUDA context, cuBLAS and cuDNN take, the allocator's fragmentation, and rewards.
Prints JSON and a table in Markdown.
"""

import argparse
import json
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from diffusion_nft.algorithms import Batch
from diffusion_nft.benchmarks.epochs import make_config
from diffusion_nft.benchmarks.models import ARCHITECTURES, CLIP_TOKENS, Setup
from diffusion_nft.command_line import command, positive, user_path
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.flow import add_noise
from diffusion_nft.models import image_size
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.tracking.plan import memory
from diffusion_nft.update import build_learner
from diffusion_nft.utils.files import write_atomically
from diffusion_nft.utils.paths import prepare_folder

META = torch.device("meta")
# The text encoders are SD3's own, whatever the transformer; others of ARCHITECTURES are toys.
WITH_TEXT_ENCODERS = "sd3.5-medium"
# Of what SD3 computes, the functions that CUDA's autocast has in its own dtype (None) or in another
# (pytorch.org/docs/stable/amp.html, op reference); attention is in its own, too.
AUTOCAST = (
    (F, "linear", None),
    (F, "conv2d", None),
    (torch, "addmm", None),
    (F, "layer_norm", torch.float32),
)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations made and that still live: ``now``, and at most
    ``peak``.
    """

    def __init__(self):
        super().__init__()
        self._sizes: dict[int, int] = {}
        self.now = 0
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Runs the operation, and adds what storages it made."""
        del types
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # What an operation in place or a view returns is older than it.
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


def _casting(function: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """``function`` of tensors of ``dtype``, to which others are cast first."""

    def cast(value: Any) -> Any:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if floating else value

    def call(*args: Any, **options: Any) -> Tensor:
        return function(*map(cast, args), **{key: cast(value) for key, value in options.items()})

    return call


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    assert not options.get("dropout_p") and not options.get("is_causal")
    assert options.get("attn_mask") is None
    return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]


@contextmanager
def as_on_cuda(dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors without storage get the types and the attention that they would have on a GPU.

    ``dtype``: of autocast, None for none.  Both of CUDA's fused attentions keep the inputs, the
    output and one number a row for the backward pass; what tensors without storage take otherwise
    keeps every pair of tokens.
    """
    attention = _attention
    with ExitStack() as patches:
        if dtype:
            attention = _casting(_attention, dtype)
            for module, name, to in AUTOCAST:
                cast = _casting(getattr(module, name), to or dtype)
                patches.enter_context(mock.patch.object(module, name, cast))
        patches.enter_context(mock.patch.object(F, "scaled_dot_product_attention", attention))
        yield


def peak_bytes(work: Callable[[], object], autocast: torch.dtype | None) -> int:
    """The most that tensors made in ``work()`` take at any time in it, on a GPU."""
    with as_on_cuda(autocast), LiveBytes() as live:
        work()
    return live.peak


class Shapes:
    """A model and its policy without storage, and what parts of an epoch need beside them."""

    def __init__(self, config: ConfigDict, arch: str):
        """Raises ValueError if the model cannot draw at the resolution."""
        setup = Setup.of(config, Distributed(0, 1, 0, META), arch)
        with META:
            self.model: Any = setup.load()
            learner = build_learner(config, setup.dist, self.model)
        self.policy, self.algorithm = learner.policy, learner.algorithm
        self.latent_shape = self.model.latent_shape(image_size(config))
        self.kept = dict(memory(self.model, self.policy, setup.num_samples, self.latent_shape))
        for weight in self.policy.parameters():
            weight.grad = torch.zeros_like(weight)
        precision = self.model.precision
        same = precision.compute_dtype == precision.trained_dtype
        self._autocast = None if same else precision.compute_dtype

    def _inputs(self, size: int) -> tuple[Tensor, Tensor, Conditioning]:
        """x, sigma and prompts of a micro-batch."""
        shape, precision = self.model.transformer.config, self.model.precision
        length = CLIP_TOKENS + self.model.max_sequence_length
        with META:
            prompt_embeds = torch.empty(size, length, shape.joint_attention_dim)
            pooled_prompt_embeds = torch.empty(size, shape.pooled_projection_dim)
            x = torch.empty(size, *self.latent_shape, dtype=precision.trained_dtype)
            sigma = torch.empty(size, dtype=precision.trained_dtype)
        dtype = precision.compute_dtype
        return x, sigma, Conditioning(prompt_embeds.to(dtype), pooled_prompt_embeds.to(dtype))

    def _peak_gb(self, work: Callable[[], object]) -> float:
        # Autocast of torch's own knows no tensors without storage.
        with mock.patch.object(self.model.precision, "autocast", nullcontext):
            return peak_bytes(work, self._autocast) / 1e9

    def training(self, size: int, *, checkpointing: bool) -> float:
        """GB of a micro-batch of ``size`` pairs, from its noise to the end of the backward pass."""

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
        return self._peak_gb(work)

    @torch.no_grad()
    def sampling(self, size: int) -> float:
        """GB of a forward of ``size`` samples with the old policy."""

        def work() -> None:
            with self.policy.use_adapter("old"):
                self.model.velocity(*self._inputs(size))

        return self._peak_gb(work)

    def decoding(self, size: int) -> float:
        """GB of decoding ``size`` latents at once, in the decoder's own precision."""
        x0, _, _ = self._inputs(size)
        self.model.vae_batch_size = size
        return peak_bytes(lambda: self.model.decode(x0), autocast=None) / 1e9


def text_encoders_gb(dtype: torch.dtype) -> float:
    """GB of SD3's three text encoders: CLIP-L/14, OpenCLIP-G/14 and the encoder of T5 v1.1 XXL, by
    their published configurations.
    """
    large = CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, projection_dim=768
    )
    giant = CLIPTextConfig(
        hidden_size=1280,
        intermediate_size=5120,
        num_attention_heads=20,
        num_hidden_layers=32,
        projection_dim=1280,
    )
    xxl = T5Config(
        d_model=4096, d_ff=10240, num_heads=64, num_layers=24, feed_forward_proj="gated-gelu"
    )
    with META:
        encoders: list[nn.Module] = [
            CLIPTextModelWithProjection(large),
            CLIPTextModelWithProjection(giant),
            T5EncoderModel(xxl),
        ]
    size = 0
    for encoder in encoders:
        for name, weight in encoder.named_parameters():
            # transformers keeps T5's second projections in float32 where fp16 is asked for.
            wide = dtype == torch.float16 and isinstance(encoder, T5EncoderModel) and ".wo." in name
            size += weight.numel() * (4 if wide else dtype.itemsize)
    return size / 1e9


def parse_flags() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--arch", choices=list(ARCHITECTURES), default=WITH_TEXT_ENCODERS)
    add("--resolution", type=int, default=512, help="pixels")
    add("--rank", type=int, default=32, help="of the LoRA")
    add("--precision", choices=("fp16", "bf16"), default="fp16", help="mixed_precision")
    add("--sizes", type=positive, nargs="+", default=[1, 2, 4, 8, 16], help="of micro-batches")
    add("--output", type=user_path, help="also write the JSON here")
    return parser.parse_args()


def count(args: argparse.Namespace, save_dir: str) -> dict[str, Any]:
    """Everything in GB, ready for JSON.  Raises ValueError for flags that no run could have."""
    changes = [
        ("resolution", args.resolution),
        ("train.lora_rank", args.rank),
        ("mixed_precision", args.precision),
    ]
    shapes = Shapes(make_config(args.arch, save_dir, changes=changes), args.arch)
    # Random pipelines have no encoders.
    kept = {what: gb for what, gb in shapes.kept.items() if "encoders" not in what}
    encoders = {}
    if args.arch == WITH_TEXT_ENCODERS:
        encoders["text encoders"] = text_encoders_gb(shapes.model.precision.compute_dtype)
    return {
        "about": {
            "arch": args.arch,
            "resolution": args.resolution,
            "lora_rank": args.rank,
            "mixed_precision": args.precision,
            "torch": torch.__version__,
        },
        "kept_gb": kept,
        "encoders_gb": encoders,
        "beside_gb": {
            size: {
                "training": shapes.training(size, checkpointing=False),
                "training, gradient checkpointing": shapes.training(size, checkpointing=True),
                "sampling": shapes.sampling(size),
                "decoding": shapes.decoding(size),
            }
            for size in args.sizes
        },
    }


def table(results: dict[str, Any]) -> str:
    """In Markdown."""
    about, rows = results["about"], results["beside_gb"]
    kept = results["kept_gb"] | {"in all": sum(results["kept_gb"].values())}
    kept |= {f"{what}, unless offloaded": gb for what, gb in results["encoders_gb"].items()}
    columns = list(next(iter(rows.values())))
    lines = [
        f"{about['arch']}, {about['resolution']} pixels, LoRA of rank {about['lora_rank']}, "
        f"{about['mixed_precision']}: by arithmetic, not measured on a GPU",
        "",
        "| always there | GB |",
        "|---|---|",
        *(f"| {what} | {gb:.2f} |" for what, gb in kept.items()),
        "",
        f"| samples at once: GB beside it | {' | '.join(columns)} |",
        f"|---|{'---|' * len(columns)}",
    ]
    for size, row in rows.items():
        lines.append(f"| {size} | {' | '.join(f'{row[name]:.2f}' for name in columns)} |")
    return "\n".join(lines)


def main() -> None:
    """Prints the JSON and the table."""
    args = parse_flags()
    if args.output:
        prepare_folder(args.output.parent)
    with tempfile.TemporaryDirectory() as folder:
        results = count(args, folder)
    text = json.dumps(results, indent=2)
    print(f"{text}\n\n{table(results)}")
    if args.output:
        write_atomically(args.output, f"{text}\n".encode())


if __name__ == "__main__":
    command(main)
