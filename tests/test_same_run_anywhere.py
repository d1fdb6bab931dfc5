"""The number of processes and the micro-batch sizes change nothing but the order of summation.

The two epochs of the smoke preset, 12 samples each, which neither 5 nor 7 divides.
"""

import json
from pathlib import Path

import pytest
import torch

from diffusion_nft.data.prompts import load_prompts, shard
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.rewards.combine import RewardSet, Scores
from diffusion_nft.rollout import generate_rollouts
from diffusion_nft.runs.checkpoint import load_checkpoint
from diffusion_nft.tracking.metrics import read_metrics
from tests.launch import smoke, train_here, train_on_ranks

PRECISIONS = ("fp64", "no")
VARIANTS = ("two", "three", "micro")
MICRO = {"train.batch_size": 4, "sample.batch_size": 12, "perf.vae_batch_size": 3}


def settings(precision: str) -> dict[str, object]:
    return {
        "mixed_precision": precision,
        # One update an epoch: the first checkpoint holds the moments of the first gradient.
        "train.gradient_step_per_epoch": 1,
        "checkpoint.keep": 0,
        # 12 test lines in chunks of 5, 5 and 2.
        "eval.batch_size": 5,
        "eval.num_steps": 3,
        "eval_freq": 0,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """``runs / precision / variant`` is a run directory."""
    folder = tmp_path_factory.mktemp("runs")
    ranks = ((2, "two"), (3, "three"))
    train_on_ranks(
        [(nproc, folder / p / variant, settings(p)) for p in PRECISIONS for nproc, variant in ranks]
    )
    for p in PRECISIONS:
        train_here(folder / p / "one", settings(p))
        train_here(folder / p / "micro", settings(p) | MICRO)
    return folder


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together."""
    assert a.keys() == b.keys() and a
    difference = sum(float((a[key] - b[key]).double().square().sum()) for key in a)
    return (difference / sum(float(b[key].double().square().sum()) for key in b)) ** 0.5


def tensors(run_dir: Path, step: int, group: str) -> dict[str, torch.Tensor]:
    return load_checkpoint(run_dir / "checkpoints" / f"checkpoint-{step}").tensors[group]


@pytest.mark.multiproc
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", VARIANTS)
class TestAgreement:
    def test_of_the_first_accumulated_gradient(self, runs, precision, variant):
        # After one step Adam's first moment is (1 - beta1) times the gradient.
        moments = [
            {
                key: value
                for key, value in tensors(runs / precision / name, 1, "optimizer").items()
                if key.endswith(".exp_avg")
            }
            for name in (variant, "one")
        ]
        within = 1e-12 if precision == "fp64" else 1e-5
        assert relative_difference(*moments) <= within

    def test_of_the_weights_after_two_epochs(self, runs, precision, variant):
        within = 1e-9 if precision == "fp64" else 1e-3
        for adapter in ("current", "old", "ema"):
            ours, one = (tensors(runs / precision / name, 2, adapter) for name in (variant, "one"))
            assert ours["transformer_blocks.0.attn.to_q.lora_B.weight"].any()
            assert relative_difference(ours, one) <= within

    def test_of_the_log(self, runs, precision, variant):
        ours, one = (
            read_metrics(runs / precision / name / "metrics.jsonl") for name in (variant, "one")
        )
        assert [(row["step"], row["epoch"]) for row in ours] == [
            (row["step"], row["epoch"]) for row in one
        ]
        for mine, expected in zip(ours, one, strict=True):
            assert mine.keys() == expected.keys()
            first = expected["epoch"] <= 1
            for key, value in expected.items():
                if key.startswith("time/"):
                    continue
                # From the second epoch on, float32 weights differ.
                within = 1e-5 if precision == "fp64" or first else 1e-2
                assert mine[key] == pytest.approx(value, rel=within, abs=within), key
                if key.startswith("reward/shapes") and (precision == "fp64" or first):
                    assert mine[key] == value, key


@pytest.mark.multiproc
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("variant", ["two", "three"])
def test_evaluations_are_byte_identical_on_any_number_of_processes(runs, precision, variant):
    # The evaluation before the first update: the weights are equal to the last bit.
    folders = [runs / precision / name / "eval" / "epoch-000000" for name in (variant, "one")]
    for file in ("average_scores.json", "evaluation_results.jsonl"):
        ours, one = ((folder / file).read_bytes() for folder in folders)
        assert ours == one
    assert json.loads((folders[0] / "average_scores.json").read_text())["num_samples"] == 12


class Alone(Distributed):
    """A rank without its peers: from them come blank scores of the right number."""

    num_samples = 12

    def gather_objects(self, value):
        if not isinstance(value, tuple):
            return [value]
        scores, thumbs, failure = value

        def blank(rank: int):
            count = len(shard(self.num_samples, rank, self.world_size))
            zeros = torch.zeros(count, dtype=torch.float64)
            parts = {key: zeros for key in scores.parts}
            return Scores(zeros, parts), torch.zeros(count, thumbs.shape[1]), ""

        own = (scores, thumbs, failure)
        return [own if rank == self.rank else blank(rank) for rank in range(self.world_size)]


@pytest.mark.parametrize("solver", ["dpm2", "flow"])
def test_images_do_not_depend_on_ranks_and_micro_batches(solver, shapes_model, tmp_path):
    config = smoke(tmp_path, {"sample.solver": solver, "sample.noise_level": 0.7})
    prompts = load_prompts("shapes", "train")[:3]
    rewards = RewardSet.build({"shapes": 1.0}, torch.device("cpu"))

    def epoch(world_size: int, batch_size: int):
        config.sample.batch_size = batch_size
        parts = [
            generate_rollouts(
                shapes_model,
                prompts,
                rewards,
                config,
                epoch=1,
                dist=Alone(rank, world_size, rank, torch.device("cpu")),
                num_images=12,
            )
            for rank in range(world_size)
        ]
        assert [i for part in parts for i in part.indices] == list(range(12))
        scores = torch.cat(
            [part.scores.total[part.indices.start : part.indices.stop] for part in parts]
        )
        images = Images.concatenate([part.images for part in parts if len(part.images)])
        sigmas = {tuple(part.sigmas.tolist()) for part in parts if len(part.indices)}
        assert len(sigmas) == 1
        return torch.cat([part.x0 for part in parts]), images, scores

    x0, images, scores = epoch(1, 5)
    # Samples of one prompt are different images, and so are epochs.
    assert min(float((x0[i] - x0[j]).abs().max()) for i in range(12) for j in range(i)) > 0.01
    for world_size, batch_size in ((1, 12), (2, 5), (3, 4), (13, 1)):
        ours = epoch(world_size, batch_size)
        # Latents exceed 3, and the error of single values 1e-5, so their norm is compared.
        assert float((ours[0] - x0).norm() / x0.norm()) <= 1e-5
        assert int((ours[1].pixels.int() - images.pixels.int()).abs().max()) <= 1
        assert torch.equal(ours[2], scores)


def test_another_epoch_or_seed_draws_other_noise(shapes_model, tmp_path):
    config = smoke(tmp_path)
    prompts = load_prompts("shapes", "train")[:1]
    rewards = RewardSet.build({"shapes": 1.0}, torch.device("cpu"))
    config.sample.num_image_per_prompt = 2

    def x0(**changes):
        config.seed = changes.get("seed", 42)
        dist = Distributed(0, 1, 0, torch.device("cpu"))
        epoch = changes.get("epoch", 0)
        drawn = generate_rollouts(
            shapes_model, prompts, rewards, config, epoch=epoch, dist=dist, num_images=0
        )
        return drawn.x0

    base = x0()
    assert torch.equal(x0(), base)
    assert not torch.allclose(x0(epoch=1), base, atol=1e-2)
    assert not torch.allclose(x0(seed=43), base, atol=1e-2)
