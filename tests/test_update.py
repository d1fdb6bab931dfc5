"""The update on a linear model whose gradient autograd gives in one batch, and its failures."""

import itertools
import json
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch

from diffusion_nft.algorithms.nft import NFT
from diffusion_nft.batches import EpochBatches, choose_sigma_indices
from diffusion_nft.data.prompts import shard
from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.images import Images
from diffusion_nft.models.embeddings import Conditioning, PromptEmbeds, stack
from diffusion_nft.models.precision import FIRST_LOSS_SCALE, Precision
from diffusion_nft.rewards.combine import Scores
from diffusion_nft.rollout import Rollout
from diffusion_nft.runs.state import flatten_optimizer, unflatten_optimizer
from diffusion_nft.update import Learner
from tests.launch import smoke

CPU = torch.device("cpu")
SHAPE = (2, 3, 3)
GROUPS, SIZE = 3, 4
NUM = GROUPS * SIZE


class LinearPolicy:
    """v = theta * xt + sigma * phi, with the three sets of weights of a Policy."""

    def __init__(self):
        g = torch.Generator().manual_seed(0)
        self.weights = {
            name: [torch.randn(SHAPE, generator=g, dtype=torch.float64) for _ in range(2)]
            for name in ("current", "old", "ema", "reference")
        }
        for weight in self.weights["current"]:
            weight.requires_grad_()
        self.active = "current"
        self.ema_updates: list[tuple[str, float]] = []

    def parameters(self, name: str = "current") -> list[torch.Tensor]:
        return self.weights[name]

    @contextmanager
    def use_adapter(self, name: str):
        before, self.active = self.active, name
        try:
            yield
        finally:
            self.active = before

    @torch.no_grad()
    def ema_update(self, name: str, decay: float) -> None:
        self.ema_updates.append((name, decay))
        for own, current in zip(self.weights[name], self.weights["current"], strict=True):
            own.copy_(decay * own + (1 - decay) * current)


@dataclass(frozen=True)
class Counted(Distributed):
    """A rank that counts its collectives and keeps what it would have reduced."""

    reduced: list = field(default_factory=list)

    def all_reduce_sum(self, tensors):
        self.reduced.append([t.clone() for t in tensors[:-1]])  # without the request to stop

    def gather_objects(self, value):
        return [value, {"pairs": 1.0}] if not value else [value]


class Recording(NFT):
    """NFT that keeps the batches it saw."""

    def __init__(self, config):
        super().__init__(config)
        self.batches = []

    def loss(self, velocity, batch):
        self.batches.append(batch)
        return super().loss(velocity, batch)


ROW = PromptEmbeds.of_text(torch.zeros(1, 1, 1), torch.zeros(1, 1))


def make_rollout(rank: int = 0, world_size: int = 1) -> Rollout:
    g = torch.Generator().manual_seed(5)
    x0 = torch.randn(NUM, *SHAPE, generator=g, dtype=torch.float64)
    indices = shard(NUM, rank, world_size)
    n = len(indices)
    return Rollout(
        scores=Scores(torch.zeros(NUM), {}),
        diversity=0.0,
        x0_rms=1.0,
        indices=indices,
        x0=x0[indices.start : indices.stop],
        cond=Conditioning(stack([ROW] * max(n, 1))),
        cond_rows=list(range(n)),
        sigmas=torch.tensor([1.0, 0.8, 0.5, 0.2], dtype=torch.float64) if n else torch.zeros(0),
        images=Images.concatenate([]),
        shown=[],
    )


def make_learner(tmp_path, rank: int = 0, world_size: int = 1, **overrides) -> Learner:
    settings = {
        "train.gradient_step_per_epoch": 1,
        "train.batch_size": 5,
        "train.learning_rate": 3e-4,
        "nft.beta": 0.5,
        "nft.kl_weight": 0.1,
        "nft.old_policy_decay": "linear_to_half",
    }
    config = smoke(tmp_path, settings | {k.replace("__", "."): v for k, v in overrides.items()})
    policy = LinearPolicy()

    def velocity(xt, sigma, cond):
        theta, phi = policy.weights[policy.active]
        return theta * xt + sigma.reshape(-1, 1, 1, 1) * phi

    return Learner(
        config,
        dist=Counted(rank, world_size, rank, CPU),
        model=SimpleNamespace(
            precision=Precision("fp64", CPU), velocity=velocity, uncounted=nullcontext
        ),
        policy=policy,
        algorithm=Recording(config),
    )


def copies(learner: Learner) -> dict[str, list[torch.Tensor]]:
    return {
        name: [weight.detach().clone() for weight in weights]
        for name, weights in learner.policy.weights.items()
    }


R = torch.linspace(0.05, 0.95, NUM, dtype=torch.float64)


def expected_gradient(learner: Learner, weights, batches) -> list[torch.Tensor]:
    """Autograd of the mean over all pairs, from the formulas."""
    joined = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("x0", "noise", "xt", "sigma", "weight")
    }
    s = joined["sigma"].reshape(-1, 1, 1, 1)
    theta = [w.requires_grad_() for w in weights["current"]]

    def v(pair):
        return pair[0] * joined["xt"] + s * pair[1]

    v_now, v_old = v(theta), v(weights["old"])
    v_ref = v(weights["reference"])
    beta, clip = learner.config.nft.beta, learner.config.train.adv_clip_max

    def branch(velocity):
        error = joined["xt"] - s * velocity - joined["x0"]
        mean_abs = error.detach().abs().mean((1, 2, 3)).clamp(min=1e-5)
        return error.square().mean((1, 2, 3)) / mean_abs

    positive = branch((1 - beta) * v_old + beta * v_now)
    negative = branch((1 + beta) * v_old - beta * v_now)
    r = joined["weight"]
    kl = (v_now - v_ref).square().mean((1, 2, 3))
    loss = (clip * (r * positive + (1 - r) * negative) / beta + 0.1 * kl).mean()
    loss.backward()
    return [w.grad for w in theta]


@pytest.mark.parametrize("fraction", [0.5, 0.99, 1.0])
def test_the_gradient_is_autograds_of_the_mean_over_all_pairs(tmp_path, fraction):
    learner = make_learner(tmp_path, train__timestep_fraction=fraction)
    before = copies(learner)
    learner.train_epoch(make_rollout(), R, epoch=0)
    expected = expected_gradient(learner, before, learner.algorithm.batches)
    torch.testing.assert_close(learner.dist.reduced, [expected], rtol=1e-10, atol=1e-12)


def test_samples_without_a_score_are_not_part_of_the_mean(tmp_path):
    learner = make_learner(tmp_path)
    before, rollout, weights = copies(learner), make_rollout(), R.clone()
    weights[[1, 6]] = torch.nan
    rollout.x0[[1, 6]] = torch.nan
    values = learner.train_epoch(rollout, weights, epoch=0)
    batches = learner.algorithm.batches
    assert sum(len(batch.x0) for batch in batches) == (NUM - 2) * 2
    expected = expected_gradient(learner, before, batches)
    torch.testing.assert_close(learner.dist.reduced, [expected], rtol=1e-10, atol=1e-12)
    assert values["optim/skipped_steps"] == 0 and values["loss/total"] > 0


def test_only_the_noisiest_sigmas_of_the_range_are_trained_on(tmp_path):
    learner = make_learner(tmp_path, train__timestep_fraction=0.7, train__sigma_range=0.8)
    learner.train_epoch(make_rollout(), R, epoch=0)
    # Of 1, .8, .5 and .2 the first int(4 * .8) = 3, and int(3 * .7) = 2 of these per sample.
    sigmas = torch.cat([batch.sigma for batch in learner.algorithm.batches])
    assert len(sigmas) == 2 * NUM and set(sigmas.tolist()) == {1.0, 0.8, 0.5}


def test_every_sample_counts_once_at_distinct_sigmas_of_the_sampler(tmp_path):
    learner = make_learner(tmp_path, train__timestep_fraction=0.99)
    rollout = make_rollout()
    learner.train_epoch(rollout, R, epoch=0)
    seen: dict[int, list[float]] = {}
    for batch in learner.algorithm.batches:
        torch.testing.assert_close(
            batch.xt,
            (1 - batch.sigma.reshape(-1, 1, 1, 1)) * batch.x0
            + batch.sigma.reshape(-1, 1, 1, 1) * batch.noise,
        )
        for x0, sigma, r in zip(batch.x0, batch.sigma, batch.weight, strict=True):
            index = next(i for i in range(NUM) if torch.equal(rollout.x0[i], x0))
            assert r == R[index]
            seen.setdefault(index, []).append(float(sigma))
    # int(4 * 0.99) = 3 of the four sigmas, another one dropped from sample to sample.
    assert sorted(seen) == list(range(NUM))
    assert all(len(sigmas) == len(set(sigmas)) == 3 for sigmas in seen.values())
    assert len({frozenset(sigmas) for sigmas in seen.values()}) > 1
    noise = torch.cat([batch.noise for batch in learner.algorithm.batches]).flatten(1)
    assert len({tuple(row.tolist()) for row in noise}) == NUM * 3


def test_optimizer_steps_share_every_group_and_reduce_once_each(tmp_path):
    learner = make_learner(
        tmp_path,
        train__gradient_step_per_epoch=2,
        train__num_inner_epochs=2,
        train__timestep_fraction=1.0,
        train__batch_size=1,
    )
    rollout = make_rollout()
    learner.train_epoch(rollout, R, epoch=0)
    assert len(learner.dist.reduced) == learner.step == 4
    batches = EpochBatches(
        learner.config, learner.algorithm, rollout, R, epoch=0, dtype=torch.float64
    )
    split = batches._split((0, 0)).reshape(GROUPS, SIZE)
    assert (split == 0).sum(1).tolist() == [2, 2, 2]
    batches = learner.algorithm.batches
    assert len(batches) == 2 * NUM * 4
    # Fresh noise in the second pass.
    first, second = batches[: NUM * 4], batches[NUM * 4 :]
    assert not {tuple(b.noise.flatten().tolist()) for b in first} & {
        tuple(b.noise.flatten().tolist()) for b in second
    }


@pytest.mark.parametrize(("world_size", "batch_size"), [(2, 7), (5, 1), (13, 7)])
def test_the_ranks_gradients_sum_to_the_one_process_gradient(tmp_path, world_size, batch_size):
    one = make_learner(tmp_path)
    one.train_epoch(make_rollout(), R, epoch=3)
    parts = []
    for rank in range(world_size):
        learner = make_learner(tmp_path, rank, world_size, train__batch_size=batch_size)
        learner.train_epoch(make_rollout(rank, world_size), R, epoch=3)
        parts += learner.dist.reduced
    sums = [sum(gradients) for gradients in zip(*parts, strict=True)]
    torch.testing.assert_close(sums, one.dist.reduced[0], rtol=1e-12, atol=1e-13)


def test_adamw_ema_and_old_policy_by_hand(tmp_path):
    learner = make_learner(tmp_path, train__max_grad_norm=1e9)
    start = copies(learner)
    values = learner.train_epoch(make_rollout(), R, epoch=0)
    gradients = learner.dist.reduced[0]
    lr, decay = 3e-4, 1e-4
    for i, gradient in enumerate(gradients):
        # After the first step both of Adam's corrected moments are the gradient's own.
        expected = start["current"][i] * (1 - lr * decay)
        expected = expected - lr * gradient / (gradient.abs() + 1e-8)
        now = learner.policy.weights["current"][i].detach()
        torch.testing.assert_close(now, expected, rtol=1e-9, atol=1e-12)
        ema = 2 / 11 * start["ema"][i] + 9 / 11 * now
        torch.testing.assert_close(learner.policy.weights["ema"][i], ema)
        old = 0.001 * start["old"][i] + 0.999 * now
        torch.testing.assert_close(learner.policy.weights["old"][i], old)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    assert values["optim/grad_norm"] == pytest.approx(float(norm))
    assert values["optim/old_policy_decay"] == 0.001
    total = values["loss/policy"] + 0.1 * values["loss/kl"]
    assert values["loss/total"] == pytest.approx(total)


@pytest.mark.parametrize(
    ("half_life", "epoch", "expected"),
    [(0.0, 50, 3e-4), (10.0, 0, 3e-4), (10.0, 10, 1.5e-4), (10.0, 30, 3e-4 / 8), (0.5, 1, 7.5e-5)],
)
def test_the_learning_rate_halves_every_half_life(tmp_path, half_life, epoch, expected):
    learner = make_learner(tmp_path, train__lr_half_life=half_life)
    before = copies(learner)
    values = learner.train_epoch(make_rollout(), R, epoch=epoch)
    assert values["optim/learning_rate"] == pytest.approx(expected, rel=1e-12)
    # Adam's first step is the learning rate times the gradient's sign (and eps and decay).
    for old, new in zip(before["current"], learner.policy.weights["current"], strict=True):
        change = (new - old).detach().abs()
        torch.testing.assert_close(change, torch.full_like(change, expected), rtol=1e-3, atol=0)


def test_the_gradient_norm_is_clipped(tmp_path):
    learner = make_learner(tmp_path, train__max_grad_norm=1e-3, train__adam_beta1=0.0)
    learner.train_epoch(make_rollout(), R, epoch=0)
    moments = [entry["exp_avg"] for entry in learner.optimizer.state.values()]
    norm = torch.cat([m.flatten() for m in moments]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-4)


def poisoned() -> Rollout:
    rollout = make_rollout()
    rollout.x0[4, 0, 0, 0] = torch.nan
    return rollout


def test_a_nan_skips_the_update_and_is_counted(tmp_path):
    learner = make_learner(tmp_path)
    before = copies(learner)
    values = learner.train_epoch(poisoned(), R, epoch=0)
    assert learner.step == 0 and learner.policy.ema_updates == []
    assert values["optim/skipped_steps"] == 1
    for name, weights in learner.policy.weights.items():
        assert all(torch.equal(a, b) for a, b in zip(weights, before[name], strict=True))
    assert not learner.optimizer.state
    learner.train_epoch(make_rollout(), R, epoch=1)
    assert learner.step == 1 and learner.skipped == 1 and learner.skipped_in_row == 0
    assert [name for name, _ in learner.policy.ema_updates] == ["ema", "old"]


def test_one_skipped_step_of_two_advances_by_one(tmp_path):
    learner = make_learner(tmp_path, train__gradient_step_per_epoch=2)
    learner.train_epoch(poisoned(), R, epoch=0)
    assert (learner.step, learner.skipped) == (1, 1)
    assert sorted(name for name, _ in learner.policy.ema_updates) == ["ema", "old"]


def test_too_many_skipped_steps_in_a_row_stop_the_run(tmp_path):
    learner = make_learner(tmp_path, train__max_skipped_steps=2)
    learner.train_epoch(poisoned(), R, epoch=0)
    learner.train_epoch(make_rollout(), R, epoch=1)  # a good one: the count starts again
    learner.train_epoch(poisoned(), R, epoch=2)
    learner.train_epoch(poisoned(), R, epoch=3)
    with pytest.raises(FloatingPointError, match="max_skipped_steps = 2"):
        learner.train_epoch(poisoned(), R, epoch=4)


def make_fp16_learner(folder):
    """A learner of float32 weights whose loss is scaled, as for fp16."""
    learner = make_learner(folder)
    for name, weights in learner.policy.weights.items():
        learner.policy.weights[name] = [
            w.detach().float().requires_grad_(name == "current") for w in weights
        ]
    learner.precision = Precision("fp16", CPU)
    learner.optimizer = torch.optim.AdamW(learner.policy.parameters(), lr=1e-3)
    return learner


def test_the_fp16_scaler_skips_an_overflow_and_halves_its_scale(tmp_path):
    learner = make_fp16_learner(tmp_path)
    scale = learner.precision.scaler.get_scale()
    assert scale == FIRST_LOSS_SCALE
    fine = replace(make_rollout(), x0=make_rollout().x0.float())
    overflow = replace(fine, x0=fine.x0 * 1e36)
    learner.train_epoch(overflow, R, epoch=0)
    assert learner.step == 0 and learner.skipped == 1 and learner.policy.ema_updates == []
    assert learner.precision.scaler.get_scale() == scale / 2
    learner.train_epoch(fine, R, epoch=1)
    assert learner.step == 1
    # Unscaled before it is clipped: the norm is that of the plain gradient.
    plain = make_learner(tmp_path)
    plain_norm = plain.train_epoch(make_rollout(), R, epoch=1)["optim/grad_norm"]
    again = make_fp16_learner(tmp_path)
    assert again.train_epoch(fine, R, epoch=1)["optim/grad_norm"] == pytest.approx(
        plain_norm, rel=1e-4
    )


def test_state_returns_through_json(tmp_path):
    learner = make_learner(tmp_path)
    learner.train_epoch(make_rollout(), R, epoch=0)
    state = learner.state_dict()
    tensors, optimizer = flatten_optimizer(state["optimizer"])
    tensors = {key: value.clone() for key, value in tensors.items()}
    state = json.loads(json.dumps(state | {"optimizer": optimizer}))
    other = make_learner(tmp_path)
    other.load_state_dict(state | {"optimizer": unflatten_optimizer(tensors, state["optimizer"])})
    with torch.no_grad():
        for name, weights in learner.policy.weights.items():
            for mine, theirs in zip(other.policy.weights[name], weights, strict=True):
                mine.copy_(theirs)
    for each in (learner, other):
        each.train_epoch(make_rollout(), R, epoch=1)
    assert other.step == learner.step == 2
    for mine, theirs in zip(other.policy.parameters(), learner.policy.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_sigma_indices():
    def draw(choice, used, seed):
        return choose_sigma_indices(10, used, choice, torch.Generator().manual_seed(seed))

    assert draw("first", 9, 0) == list(range(9))
    counts = torch.zeros(10)
    for seed in range(2000):
        indices = draw("stratified", 3, seed)
        # Systematic sampling: at most the stretch of 10 / 3 rounded up or down apart.
        assert all(3 <= b - a <= 4 for a, b in itertools.pairwise(indices))
        counts[indices] += 1
    # Each of the ten is drawn in 3 of 10 cases; 4 standard errors are 0.041.
    assert ((counts / 2000 - 0.3).abs() < 0.041).all()
    assert draw("stratified", 10, 3) == list(range(10))
    assert sorted(draw("random", 10, 3)) == list(range(10)) != draw("random", 10, 3)


def test_images_of_a_prompt_can_share_noise_and_sigmas(tmp_path):
    learner = make_learner(tmp_path, train__shared_noise=True, train__timestep_fraction=0.5)
    learner.train_epoch(make_rollout(), R, epoch=0)
    size = learner.config.sample.num_image_per_prompt
    noise = torch.cat([batch.noise for batch in learner.algorithm.batches]).flatten(1)
    sigma = torch.cat([batch.sigma for batch in learner.algorithm.batches])
    pairs = {(s, *row) for s, row in zip(sigma.tolist(), noise.tolist(), strict=True)}
    assert len(noise) == NUM * 2 and len(pairs) == NUM // size * 2


def test_zero_std_groups_are_filtered_and_still_count_in_the_mean(tmp_path):
    size = smoke(tmp_path).sample.num_image_per_prompt
    weights, totals = R.clone(), R.clone()
    weights[size : 2 * size] = totals[size : 2 * size] = 0.5
    everything, skipping = (
        make_learner(tmp_path, train__filter_zero_std_groups=skip) for skip in (False, True)
    )
    rollout = replace(make_rollout(), scores=Scores(totals, {}))
    for learner in (everything, skipping):
        learner.train_epoch(rollout, weights, epoch=0)
    seen = torch.cat([batch.weight for batch in skipping.algorithm.batches])
    pairs = torch.cat([batch.weight for batch in everything.algorithm.batches])
    assert torch.equal(seen, pairs[pairs != 0.5])
    # The gradient is that of the remaining pairs, over the number of all.
    before = copies(make_learner(tmp_path))
    expected = expected_gradient(skipping, before, skipping.algorithm.batches)
    expected = [gradient * len(seen) / len(pairs) for gradient in expected]
    torch.testing.assert_close(skipping.dist.reduced, [expected], rtol=1e-10, atol=1e-12)
    # With nothing left to learn from, every rank still makes the step.
    flat = replace(rollout, scores=Scores(torch.full((NUM,), 0.5), {}))
    skipping.train_epoch(flat, torch.full((NUM,), 0.5), epoch=1)
    assert all(not gradient.any() for gradient in skipping.dist.reduced[1])
    # The scaler of fp16 has not scaled anything by then.
    half = make_learner(tmp_path, train__filter_zero_std_groups=True)
    half.precision.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    half.train_epoch(flat, torch.full((NUM,), 0.5), epoch=0)
    assert half.step == 1


def test_an_automatic_micro_batch_leaves_the_update_as_it_is(tmp_path, capsys):
    chosen, found = make_learner(tmp_path), make_learner(tmp_path, train__batch_size=0)
    for learner in (chosen, found):
        learner.train_epoch(make_rollout(), R, epoch=0)
    assert "train.batch_size = 0: micro-batches of 24 pairs" in capsys.readouterr().err
    torch.testing.assert_close(chosen.dist.reduced, found.dist.reduced, rtol=1e-10, atol=1e-12)
    # A rank without samples finds its size, too.
    idle = make_learner(tmp_path, rank=0, world_size=NUM + 1, train__batch_size=0)
    rollout = make_rollout(0, NUM + 1)
    assert not rollout.indices
    idle.train_epoch(rollout, R, epoch=0)


def test_weightless_samples_are_skipped_where_the_algorithm_says_so(tmp_path):
    learner = make_learner(tmp_path)
    learner.algorithm.skips_weightless = True
    weights = R.clone()
    weights[::2] = 0.0
    learner.train_epoch(make_rollout(), weights, epoch=0)
    seen = torch.cat([batch.weight for batch in learner.algorithm.batches])
    assert len(seen) == NUM // 2 * 2 and bool((seen > 0).all())
