"""Baseline: epochs run as in the published implementation, reimplemented.

Frozen weights are in float32 under autocast; adapters are never merged, also those of the old
policy; the prompt of each image is encoded separately; each (sample, sigma) pair takes three
forward passes, with one sigma per micro-batch; gradients are synchronised in each backward pass;
nothing is compiled.  Some slower parts of the published code, such as walking over all parameters
to switch adapters, are left out.  The loss is shared with the product.
"""

import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from diffusion_nft.algorithms import Batch
from diffusion_nft.algorithms.nft import NFT, nft_loss
from diffusion_nft.benchmarks.models import ARCHITECTURES, Setup
from diffusion_nft.data.prompts import shard
from diffusion_nft.flow import add_noise
from diffusion_nft.models.embeddings import Conditioning, PromptEmbeds, stack
from diffusion_nft.models.sampling import Sampler
from diffusion_nft.policy import lora_layers
from diffusion_nft.randomness import generator
from diffusion_nft.rewards.combine import Scores

# Threads that score images during sampling.
SCORERS = 8


@dataclass(frozen=True)
class Drawn:
    """Samples of this rank in an epoch."""

    first: int  # index of the first sample in the epoch
    x0: Tensor
    cond: PromptEmbeds
    sigmas: Tensor


class Published:
    """Runs epochs as in the published implementation."""

    name = "baseline"

    def __init__(self, setup: Setup):
        self.setup, config = setup, setup.config
        self.algorithm = NFT(config)
        self.model = model = setup.load(frozen_in_float32=True)
        # The published code decodes a batch in one call.
        model.vae_batch_size = config.sample.batch_size
        lora = LoraConfig(
            r=config.train.lora_rank,
            lora_alpha=config.train.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=lora_layers(model, "attention"),
        )
        torch.manual_seed(config.seed)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            for name in ("old", "current"):
                model.transformer.add_adapter(lora, adapter_name=name)
        self._layers = [m for m in model.transformer.modules() if isinstance(m, LoraLayer)]
        self.weights = {name: self._weights(name) for name in ("current", "old")}
        for name, weights in self.weights.items():
            for weight in weights:
                weight.data = weight.data.to(model.precision.trained_dtype)
                weight.requires_grad_(name == "current")
        self._blend(self.weights["old"], 0.0)
        self.ema = [weight.detach().clone() for weight in self.weights["current"]]
        self.step, self._active = 0, "current"
        # Patched by ``Observer``.
        self.encoder, self.switch = (self, "encode"), self
        self.waiting = (self, "totals")
        self.optimizer = torch.optim.AdamW(
            self.weights["current"],
            lr=config.train.learning_rate,
            betas=(config.train.adam_beta1, config.train.adam_beta2),
            weight_decay=config.train.adam_weight_decay,
            eps=config.train.adam_epsilon,
        )
        if setup.dist.world_size > 1:
            devices = [setup.dist.device] if setup.dist.device.type == "cuda" else None
            model.transformer = DistributedDataParallel(
                model.transformer, device_ids=devices, broadcast_buffers=False
            )

    def _weights(self, adapter: str) -> list[torch.nn.Parameter]:
        return [
            getattr(layer, matrix)[adapter].weight
            for layer in self._layers
            for matrix in ("lora_A", "lora_B")
        ]

    @contextmanager
    def use_adapter(self, name: str) -> Iterator[None]:
        """Activates ``old``, ``current`` or ``reference`` in the block."""
        before = self._active
        self._activate(name)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, name: str) -> None:
        self._active = name
        for layer in self._layers:
            layer._disable_adapters = name == "reference"
            if name != "reference":
                layer._active_adapter = [name]

    def encode(self, texts: list[str]) -> PromptEmbeds:
        """Embeddings of ``texts``, one row per text, without a cache."""
        model = self.model
        if self.setup.arch in ARCHITECTURES:  # without text encoders
            return model.encode(texts)
        with torch.no_grad():
            prompt_embeds, _, pooled, _ = model.pipe.encode_prompt(
                prompt=texts,
                prompt_2=texts,
                prompt_3=texts,
                device=model.device,
                do_classifier_free_guidance=False,
                max_sequence_length=model.max_sequence_length,
            )
        lengths = (prompt_embeds.shape[1],) * len(texts)
        return PromptEmbeds(prompt_embeds, lengths, pooled)

    def sample(self, epoch: int) -> tuple[Drawn, Tensor]:
        """Samples of ``epoch``, and their optimality r ``[N]``."""
        setup, config, dist = self.setup, self.setup.config, self.setup.dist
        prompts, size = setup.epoch_prompts(epoch), config.sample.num_image_per_prompt
        indices = shard(setup.num_samples, dist.rank, dist.world_size)
        sampler = Sampler.for_rollouts(config)
        latents, conds, futures, sigmas = [], [], [], torch.zeros(0)
        with ThreadPoolExecutor(SCORERS) as scorers, self.use_adapter("old"):
            for start in range(0, len(indices), config.sample.batch_size):
                rows = indices[start : start + config.sample.batch_size]
                batch = [prompts[i // size] for i in rows]
                texts = [prompt.text for prompt in batch]
                cond = self.encode(texts)
                noise = [generator(config.seed, epoch, i, "rollout") for i in rows]
                x0, sigmas = sampler(self.model, Conditioning(cond), noise)
                images = self.model.decode(x0)
                metadata = [prompt.metadata for prompt in batch]
                futures.append(scorers.submit(setup.rewards, images, texts, metadata))
                latents.append(x0)
                conds.append(cond)
            mine = self.totals(futures)
        total = torch.cat(dist.gather_objects(mine))
        return Drawn(indices.start, torch.cat(latents), stack(conds), sigmas), setup.optimality(
            total
        )

    def totals(self, futures: list[Future[Scores]]) -> Tensor:
        """Waits for the total rewards of this rank's samples."""
        return torch.cat([future.result().total for future in futures])

    def train(self, drawn: Drawn, r: Tensor, epoch: int) -> None:
        del epoch
        config, device = self.setup.config.train, self.setup.dist.device
        used = max(1, int(len(drawn.sigmas) * config.timestep_fraction))
        sigmas = drawn.sigmas.to(device, drawn.x0.dtype)
        mine = r[drawn.first : drawn.first + len(drawn.x0)].to(device)
        rows = torch.randperm(len(drawn.x0), device=device)
        sigma_indices = torch.rand(len(rows), len(sigmas), device=device).argsort(dim=1)
        for chosen in rows.chunk(config.gradient_step_per_epoch):
            self.optimizer.zero_grad()
            for part in chosen.split(config.batch_size):
                cond = drawn.cond.select(part.tolist())
                for column in range(used):
                    x0, sigma = drawn.x0[part], sigmas[sigma_indices[part, column]]
                    noise = torch.randn_like(x0)
                    xt = add_noise(x0, noise, sigma)
                    losses = self.losses(Batch(x0, noise, xt, sigma, mine[part]), cond)
                    loss = losses.sum() / (len(chosen) * used)
                    self.model.precision.scaler.scale(loss).backward()
            self._update()
        self._blend(self.weights["old"], self.algorithm.old_policy_decay(self.step))

    def losses(self, batch: Batch, cond: PromptEmbeds) -> Tensor:
        """The losses ``[B]`` of ``batch`` after three forwards."""

        def velocity(policy: str) -> Tensor:
            with self.use_adapter(policy), torch.set_grad_enabled(policy == "current"):
                return self.model.velocity(batch.xt, batch.sigma, cond)

        old, reference = velocity("old"), velocity("reference")
        losses, _ = nft_loss(
            velocity("current"),
            old,
            reference,
            batch,
            kl_weight=self.algorithm.kl_weight,
            **self.algorithm.options,
        )
        return losses

    def _update(self) -> None:
        config, scaler = self.setup.config.train, self.model.precision.scaler
        scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self.weights["current"], config.max_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.step += 1
        self._blend(self.ema, min((1 + self.step) / (10 + self.step), config.ema_decay))

    @torch.no_grad()
    def _blend(self, own: list[Any], decay: float) -> None:
        torch._foreach_lerp_(own, [w.detach() for w in self.weights["current"]], 1 - decay)
