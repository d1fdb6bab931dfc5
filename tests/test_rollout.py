"""The rollout: variety by hand, failing rewards on every rank, what the log holds."""

import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from diffusion_nft.data.prompts import load_prompts
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.models.embeddings import Conditioning
from diffusion_nft.models.sampling import guided_velocity
from diffusion_nft.rewards.combine import RewardError, RewardSet, Scores, build_rewards
from diffusion_nft.rewards.worker import QUEUE_LENGTH, ScoringWorker
from diffusion_nft.rollout import (
    diversity,
    gather_scores,
    generate_rollouts,
    rollout_metrics,
    shown_samples,
    thumbnails,
)
from tests.launch import smoke
from tests.test_update import make_rollout

CPU = torch.device("cpu")


def test_diversity_is_the_rms_distance_of_pairs_averaged_over_groups():
    g = np.random.default_rng(1)
    thumbs = g.random((7, 5))
    groups = ["a", "b", "a", "b", "a", "c", "b"]
    expected = []
    for key in "ab":
        rows = [thumbs[i] for i in range(7) if groups[i] == key]
        squares = [np.mean((x - y) ** 2) for x, y in itertools.combinations(rows, 2)]
        expected.append(np.sqrt(np.mean(squares)))
    assert diversity(torch.from_numpy(thumbs), groups) == pytest.approx(np.mean(expected))
    assert diversity(torch.ones(4, 3), [0, 0, 1, 1]) == 0
    assert math.isnan(diversity(torch.ones(2, 3), ["x", "y"]))


def test_thumbnails_are_area_averages():
    images = torch.randint(256, (2, 3, 48, 48)) / 255
    expected = images.numpy().reshape(2, 3, 8, 6, 8, 6).mean((3, 5)).reshape(2, -1)
    np.testing.assert_allclose(thumbnails(Images.from_float(images)).numpy(), expected, rtol=1e-5)


@dataclass(frozen=True)
class Peer(Distributed):
    """Rank 0 of two; ``other`` is what rank 1 sends."""

    other: tuple = ()

    def gather_objects(self, value):
        return [value, self.other]


def scores(*values: float) -> Scores:
    total = torch.tensor(values, dtype=torch.float64)
    return Scores(total, {"x": total})


def failing() -> list[Scores]:
    raise RewardError("reward 'x' failed: OSError: disk")


def test_scores_of_all_ranks_come_in_rank_order():
    dist = Peer(0, 2, 0, CPU, other=(scores(3.0), torch.full((1, 4), 3.0), None))
    ours, thumbs = gather_scores(dist, lambda: [scores(1.0), scores(2.0)], torch.zeros(2, 4))
    assert ours.total.tolist() == ours.parts["x"].tolist() == [1, 2, 3]
    assert thumbs[:, 0].tolist() == [0, 0, 3]


def test_a_reward_that_fails_here_or_there_fails_everywhere():
    fine = Peer(0, 2, 0, CPU, other=(scores(3.0), torch.zeros(1, 4), None))
    with pytest.raises(RewardError, match=r"disk \(on rank 0\)") as caught:
        gather_scores(fine, failing, torch.zeros(1, 4))
    assert isinstance(caught.value.__cause__, RewardError)
    broken = Peer(
        0, 2, 0, CPU, other=(Scores.concatenate([]), torch.zeros(1, 4), RewardError("there"))
    )
    with pytest.raises(RewardError, match=r"there \(on rank 1\)"):
        gather_scores(broken, lambda: [scores(1.0)], torch.zeros(1, 4))


class Keeping(RewardSet):
    """Rewards that keep what they were asked."""

    def __init__(self):
        super().__init__({"shapes": 1.0}, build_rewards(["shapes"], CPU))
        self.asked: list[tuple[str, dict]] = []

    def __call__(self, images, prompts, metadata, names=None):
        self.asked += zip(prompts, metadata, strict=True)
        return super().__call__(images, prompts, metadata, names)


def test_every_sample_is_scored_against_its_own_prompt(shapes_model, tmp_path):
    config = smoke(tmp_path, {"sample.batch_size": 5})
    prompts = load_prompts("shapes", "train")[:3]
    rewards = Keeping()
    rollout = generate_rollouts(
        shapes_model,
        prompts,
        rewards,
        config,
        epoch=0,
        dist=Distributed(0, 1, 0, CPU),
        num_images=7,
    )
    expected = [(p.text, p.metadata) for p in prompts for _ in range(4)]
    assert rewards.asked == expected
    # The conditioning of each sample is that of its prompt, each prompt's there once.
    alone = shapes_model.encode([p.text for p in prompts])
    assert torch.equal(rollout.cond.prompt.prompt_embeds, alone.prompt_embeds)
    assert rollout.cond_rows == [i // 4 for i in range(12)]
    assert len(rollout.images) == 7
    images = shapes_model.decode(rollout.x0)
    # Two lines of four, as near as three prompts come to it.
    assert rollout.shown == [*range(4), *range(4, 7)]
    assert torch.equal(rollout.images.pixels, images[rollout.shown].pixels)
    assert rollout.x0_rms == pytest.approx(float(rollout.x0.square().mean().sqrt()), rel=1e-5)
    again = rewards(images, [t for t, _ in expected], [m for _, m in expected])
    assert torch.equal(rollout.scores.total, again.total)
    # Distinct, non-zero, from the scheduler (shift 3): s = 3u / (1 + 2u).
    assert rollout.sigmas[0] == 1 and float(rollout.sigmas.min()) > 0
    assert len(rollout.sigmas) == 4


def test_guidance_mixes_two_velocities(shapes_model):
    texts = ["a red circle", "two blue squares"]
    cond, empty = shapes_model.encode(texts), shapes_model.encode(["", ""])
    x = torch.randn(2, *shapes_model.latent_shape((48, 48)))
    sigma = torch.tensor([0.7, 0.3])
    guided = guided_velocity(shapes_model, Conditioning(cond, empty), 3.0)
    plain = guided_velocity(shapes_model, Conditioning(cond), 1.0)
    with torch.no_grad():
        with_prompt = shapes_model.velocity(x, sigma, cond)
        without = shapes_model.velocity(x, sigma, empty)
        torch.testing.assert_close(plain(x, sigma), with_prompt)
        expected = 3 * with_prompt - 2 * without
        torch.testing.assert_close(guided(x, sigma), expected, rtol=1e-3, atol=1e-4)


def test_images_to_show_are_of_many_prompts():
    def groups(indices: range, number: int) -> list[int]:
        shown = shown_samples(indices, 24, number)
        assert len(shown) == len(set(shown)) and set(shown) <= set(indices)
        return [i // 24 for i in shown]

    assert groups(range(48, 192), 16) == [2] * 4 + [3] * 4 + [4] * 4 + [5] * 4
    assert groups(range(72), 16) == [0] * 8 + [1] * 4 + [2] * 4
    assert groups(range(48), 6) == [0] * 4 + [1] * 2
    # A share that ends in the midst of a group.
    assert groups(range(22, 30), 8) == [0] * 2 + [1] * 4
    assert groups(range(48), 0) == groups(range(0), 16) == []


def test_the_summary_by_hand():
    total = torch.tensor([0.0, 1.0, 2.0, 2.0], dtype=torch.float64)
    part = torch.tensor([1.0, math.nan, 3.0, math.nan], dtype=torch.float64)
    rollout = replace(make_rollout(), scores=Scores(total, {"a": total, "a/part": part}))
    r = torch.tensor([0.0, 0.55, 0.58, 1.0])
    values = rollout_metrics(rollout, r, 2)
    assert values["reward/mean"] == values["reward/a"] == 1.25
    assert values["reward/std"] == pytest.approx(np.std([0, 1, 2, 2]))
    assert values["reward/frac_zero_std"] == 0.5
    assert values["reward/a/part"] == 2
    assert values["reward/optimality"] is r


def test_more_work_is_refused_once_a_call_has_failed():
    def fail(images):
        raise OSError("gone")

    with ScoringWorker(torch.device("cpu")) as worker:
        worker.submit(fail, Images.concatenate([]))
        # Each waits for the fourth before it, so the failure is seen within one queue's length.
        answers = [
            worker.submit(lambda images: 1, Images.concatenate([])) for _ in range(2 * QUEUE_LENGTH)
        ]
        assert not answers[-1] and not any(answers[QUEUE_LENGTH:])
        with pytest.raises(OSError, match="gone"):
            worker.results()


def test_sampling_ends_soon_after_a_reward_has_failed(shapes_model, tmp_path):
    class Fails:
        def __call__(self, images, prompts, metadata):
            raise OSError("gone")

    drawn = []

    class Counting:
        def __getattr__(self, name):
            return getattr(shapes_model, name)

        def decode(self, x0):
            drawn.append(len(x0))
            return shapes_model.decode(x0)

    config = smoke(tmp_path, {"sample.batch_size": 1, "sample.num_image_per_prompt": 10})
    prompts = load_prompts("shapes", "train")[:3]
    dist = Distributed(0, 1, 0, torch.device("cpu"))
    rewards = RewardSet({"fails": 1.0}, {"fails": Fails()})
    with pytest.raises(RewardError, match="gone"):
        generate_rollouts(Counting(), prompts, rewards, config, epoch=0, dist=dist, num_images=0)
    assert len(drawn) <= QUEUE_LENGTH + 1 < 30
