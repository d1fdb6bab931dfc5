"""The plan of a run: forwards counted by hand, memory by counting parameters."""

import pytest
import torch

from diffusion_nft.policy import Policy
from diffusion_nft.tracking.plan import forwards_per_sample, memory
from tests.launch import LORA_TARGETS, build_shapes_model, smoke

# Forward and backward of the current policy.
TRAINED = 2.14


def test_forwards_per_sample(tmp_path):
    config = smoke(
        tmp_path,
        {"sample.num_steps": 10, "train.timestep_fraction": 0.99, "nft.kl_weight": 0.1},
    )
    # 10 for sampling; at 9 sigmas: old, reference, and current with its backward.
    assert forwards_per_sample(config) == pytest.approx(10 + 9 * (2 + TRAINED))
    config.nft.kl_weight = 0.0
    config.sample.guidance_scale = 2.0
    assert forwards_per_sample(config) == pytest.approx(20 + 9 * (1 + TRAINED))
    config.perf.gradient_checkpointing = True
    assert forwards_per_sample(config) == pytest.approx(20 + 9 * (2 + TRAINED))
    config.perf.gradient_checkpointing = False
    # Heun's method takes two velocities per step, one in the last.
    config.sample.solver = "heun"
    assert forwards_per_sample(config) == pytest.approx(2 * 19 + 9 * (1 + TRAINED))
    config.sample.solver = "FlowMatchEulerDiscreteScheduler"
    assert forwards_per_sample(config) == pytest.approx(20 + 9 * (1 + TRAINED))


def test_forwards_of_other_algorithms(tmp_path):
    config = smoke(tmp_path, {"sample.num_steps": 10, "train.timestep_fraction": 0.99})
    # At 9 sigmas: current with its backward, and the reference; advantage_weighted needs old, too.
    for name, each in (("reward_weighted", 1), ("best_of_n", 1), ("advantage_weighted", 2)):
        config.algorithm = name
        assert forwards_per_sample(config) == pytest.approx(10 + 9 * (each + TRAINED))
    # Flow-GRPO has old's log-probabilities from the rollout, and guidance in every forward.
    config.update({"algorithm": "flow_grpo", "sample": {"solver": "flow", "guidance_scale": 4.5}})
    assert forwards_per_sample(config) == pytest.approx(2 * (10 + 9 * (1 + TRAINED)))
    config.grpo.kl_weight = 0.0
    assert forwards_per_sample(config) == pytest.approx(2 * (10 + 9 * TRAINED))


def test_memory_is_the_bytes_of_the_parameters():
    model = build_shapes_model()
    # The position embeddings are a buffer.
    state = model.transformer.state_dict()
    assert "pos_embed.pos_embed" in state
    frozen = sum(tensor.numel() * 4 for tensor in state.values())
    policy = Policy(
        model.transformer, targets=LORA_TARGETS, rank=4, alpha=4, seed=0, dtype=torch.float32
    )
    one = sum(p.numel() * 4 for p in policy.parameters())
    c, h, w = model.latent_shape((48, 48))
    plan = dict(memory(model, policy, 10, (c, h, w)))
    assert plan["frozen transformer"] * 1e9 == pytest.approx(frozen)
    (lora,) = (value for what, value in plan.items() if what.startswith("LoRA"))
    assert lora * 1e9 == pytest.approx(6 * one)
    assert plan["an epoch's latents"] * 1e9 == pytest.approx(10 * c * h * w * 4)
