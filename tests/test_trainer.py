"""The loop on the built-in model: what a run leaves behind, and failing rewards."""

import shutil

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image

from diffusion_nft.distributed.ranks import Distributed
from diffusion_nft.models.lora import Lora, export_lora, load_lora
from diffusion_nft.rewards import REWARDS, RewardOutput
from diffusion_nft.rewards.combine import RewardError
from diffusion_nft.runs.checkpoint import Checkpointer
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.tracking.metrics import read_metrics
from tests.launch import make_trainer, one_thread, smoke, train_here

CPU = Distributed(0, 1, 0, torch.device("cpu"))
# A smaller epoch than the smoke preset's, where nothing but the course of events counts.
TINY = {
    "sample.num_groups": 1,
    "sample.num_image_per_prompt": 2,
    "train.gradient_step_per_epoch": 1,
    "eval.num_prompts": 2,
    "eval.num_steps": 2,
}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    train_here(folder, {"log.num_images": 4, "eval_freq": 1, "checkpoint.keep": 0})
    return folder


def test_the_run_directory_holds_everything(run_dir):
    for name in ("config.json", "environments.jsonl", "metrics.jsonl", "before_after.png"):
        assert (run_dir / name).stat().st_size > 0
    with Image.open(run_dir / "images" / "train-000001.png") as grid:
        assert grid.width > 48
    steps = sorted(path.name for path in (run_dir / "checkpoints").glob("checkpoint-*"))
    assert steps == ["checkpoint-2", "checkpoint-4"]


def test_the_log_names_every_promised_metric(run_dir):
    rows = read_metrics(run_dir / "metrics.jsonl")
    trained = [row for row in rows if "loss/total" in row]
    assert [(row["step"], row["epoch"]) for row in trained] == [(2, 1), (4, 2)]
    promised = {
        "reward/mean", "reward/std", "reward/frac_zero_std", "reward/diversity",
        "reward/optimality_q50", "reward/x0_rms", "reward/shapes",
        "reward/shapes/strict", "loss/policy", "loss/kl", "loss/old_distance",
        "optim/grad_norm", "optim/learning_rate", "optim/old_policy_decay",
        "optim/skipped_steps", "optim/nonfinite_losses",
        "time/sample", "time/train", "time/images_per_second",
    }  # fmt: skip
    for row in trained:
        assert promised <= row.keys()
        quartiles = [row[f"reward/optimality_{name}"] for name in ("q25", "q50", "q75")]
        assert 0 <= quartiles[0] <= quartiles[1] <= quartiles[2] <= 1
        # The rewards' total is the one reward, of weight 1.
        assert row["reward/mean"] == pytest.approx(row["reward/shapes"])
    evaluated = [row for row in rows if "eval/total" in row]
    assert [row["epoch"] for row in evaluated] == [0, 1, 2]


def test_the_exported_lora_is_the_ema_in_diffusers(run_dir, shapes_model):
    """Ours with EMA weights = plain diffusers with ``load_lora_weights``."""
    folder = run_dir / "checkpoints" / "checkpoint-4"
    pipe = StableDiffusion3Pipeline.from_pretrained(PIPELINE_DIR, dtype=torch.float32)
    pipe.load_lora_weights(str(folder))
    x = torch.randn(
        1, *shapes_model.latent_shape((48, 48)), generator=torch.Generator().manual_seed(0)
    )
    cond = shapes_model.encode(["a red circle"])

    def predict(transformer):
        with torch.no_grad():
            return transformer(
                hidden_states=x,
                timestep=torch.tensor([500.0]),
                encoder_hidden_states=cond.prompt_embeds,
                pooled_projections=cond.pooled,
                return_dict=False,
            )[0]

    trainer = make_trainer(smoke(run_dir, {"log.num_images": 4, "checkpoint.keep": 0}), CPU)
    with trainer.policy.use_adapter("ema"):
        ours = predict(trainer.model.transformer)
    with trainer.policy.use_adapter("current"):
        current = predict(trainer.model.transformer)
    theirs, base = predict(pipe.transformer), predict(shapes_model.transformer)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert float((ours - base).abs().max()) > 1e-4
    assert float((ours - current).abs().max()) > 1e-5


class Fails:
    """Scores, until told to fail."""

    failing = False
    calls = 0

    def __init__(self, device):
        del device

    def __call__(self, images, prompts, metadata):
        Fails.calls += 1
        if Fails.failing:
            raise OSError("the reward's server went away")
        return RewardOutput(images.mean((1, 2, 3)))


@pytest.fixture
def fails(monkeypatch):
    monkeypatch.setitem(REWARDS, "fails", f"{__name__}:Fails")
    monkeypatch.setattr(Fails, "failing", False)
    return Fails


def with_reward(run_dir, overrides):
    config = smoke(run_dir, TINY | overrides)
    with config.unlocked(), config.reward_fn.unlocked():
        config.reward_fn.fails = 1.0
    return config


@pytest.mark.parametrize("where", ["sampling", "evaluation"])
def test_a_failing_reward_ends_the_run_and_its_state_is_saved(fails, tmp_path, monkeypatch, where):
    overrides = {"num_epochs": 4, "save_freq": 0, "eval_freq": 0 if where == "sampling" else 2}
    config = with_reward(tmp_path, overrides | {"eval.at_start": False})
    trainer = make_trainer(config, CPU)
    owner = trainer if where == "sampling" else trainer.evaluator
    target = "_sample" if where == "sampling" else "evaluate"
    real = getattr(owner, target)

    def then_fail(*args):
        if trainer.state.epoch == 2:
            Fails.failing = True
        return real(*args)

    monkeypatch.setattr(owner, target, then_fail)
    with one_thread(), pytest.raises(RewardError, match="server went away") as caught:
        trainer.run()
    causes, error = [], caught.value
    while error is not None:
        causes.append(type(error))
        error = error.__cause__
    assert causes[-1] is OSError, "the reward's own traceback is there"
    saved = Checkpointer(tmp_path).load_latest()
    assert saved is not None and saved.state["epoch"] == 2
    assert saved.state["updater"]["step"] == 2
    # The same command then continues from there, and ends as an uninterrupted run.
    Fails.failing = False
    with one_thread():
        make_trainer(config, CPU).run()
        sound = with_reward(tmp_path / "sound", overrides | {"eval.at_start": False})
        make_trainer(sound, CPU).run()
    ours, theirs = (Checkpointer(f).load_latest() for f in (tmp_path, tmp_path / "sound"))
    assert ours is not None and theirs is not None and ours.path.name == theirs.path.name
    for key, value in theirs.tensors["current"].items():
        assert torch.equal(ours.tensors["current"][key], value)
    # No evaluation is lost or made twice.
    epochs = [
        [row["epoch"] for row in read_metrics(f / "metrics.jsonl") if "eval/total" in row]
        for f in (tmp_path, tmp_path / "sound")
    ]
    assert epochs[0] == epochs[1]


def test_a_reward_that_fails_in_the_first_epoch_leaves_one_first_evaluation(
    fails, tmp_path, monkeypatch
):
    config = with_reward(tmp_path, {"num_epochs": 1})
    trainer = make_trainer(config, CPU)
    real = trainer._sample

    def then_fail():
        Fails.failing = True
        return real()

    monkeypatch.setattr(trainer, "_sample", then_fail)
    with pytest.raises(RewardError):
        trainer.run()
    Fails.failing = False
    make_trainer(config, CPU).run()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["epoch"] for row in rows if "eval/total" in row] == [0, 1]


def test_training_from_a_lora_starts_all_adapters_there_and_keeps_the_reference(
    tmp_path, shapes_model
):
    base = make_trainer(smoke(tmp_path / "a", TINY), CPU)
    state = {key: torch.full_like(v, 0.01) for key, v in base.policy.state("current").items()}
    base.policy.load("ema", state)
    base.state._export(tmp_path)
    lora = str(tmp_path / "lora")
    trainer = make_trainer(smoke(tmp_path / "b", TINY | {"train.lora_path": lora}), CPU)
    for name in ("current", "old", "ema"):
        for key, value in trainer.policy.state(name).items():
            assert torch.equal(value, state[key])
    with trainer.policy.use_adapter("reference"), torch.no_grad():
        x, sigma = torch.ones(1, *shapes_model.latent_shape((48, 48))), torch.tensor([0.5])
        cond = shapes_model.encode(["a red circle"])
        ours = trainer.model.velocity(x, sigma, cond)
        assert torch.equal(ours, shapes_model.velocity(x, sigma, cond))
    # Another alpha changes how B is stored, not the policy.
    other = make_trainer(
        smoke(tmp_path / "c", TINY | {"train.lora_path": lora, "train.lora_alpha": 1}), CPU
    )
    factor = base.config.train.lora_alpha
    for key, value in other.policy.state("current").items():
        assert torch.equal(value, state[key] * (factor if ".lora_B." in key else 1))
    wrong = smoke(tmp_path / "d", TINY | {"train.lora_path": lora, "train.lora_rank": 4})
    with pytest.raises(ValueError, match=r"rank 32; use --config\.train\.lora_rank=32"):
        make_trainer(wrong, CPU)


def test_a_run_trains_the_layers_of_the_lora_it_starts_from_also_when_that_is_gone(
    tmp_path, capsys, shapes_model
):
    linear = {
        name: module.weight.shape
        for name, module in shapes_model.transformer.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    g = torch.Generator().manual_seed(0)
    state = {}
    for name in ("transformer_blocks.0.ff.net.0.proj", "transformer_blocks.1.attn.to_q"):
        rows, columns = linear[name]
        state[f"{name}.lora_A.weight"] = torch.randn(2, columns, generator=g)
        state[f"{name}.lora_B.weight"] = torch.randn(rows, 2, generator=g) / 100
    export_lora(tmp_path, Lora(state, "owner/other"))
    start = {"train.lora_path": str(tmp_path), "train.lora_rank": 2, "train.lora_alpha": 4}
    options = TINY | start | {"eval.at_start": False}
    train_here(tmp_path / "once", options | {"num_epochs": 2})
    said = capsys.readouterr().err
    assert (
        "train.lora_path: the LoRA names owner/other as its base model; it is used on shapes"
        in said
    )
    assert "on other layers than usual: 1 more (transformer_blocks.0.ff.net.0.proj), " in said
    train_here(tmp_path / "twice", options | {"num_epochs": 1})
    for path in (tmp_path / "lora", tmp_path / "pytorch_lora_weights.safetensors"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    # What a run continues from holds the layers.
    train_here(tmp_path / "twice", options | {"num_epochs": 2, "train.lora_path": ""})
    once, twice = (Checkpointer(tmp_path / name).load_latest() for name in ("once", "twice"))
    assert once is not None and twice is not None
    trained = load_lora(once.path)
    assert trained.modules == Lora(state).modules
    assert all(torch.equal(v, twice.tensors["ema"][k]) for k, v in once.tensors["ema"].items())
    key = min(state)
    assert not torch.equal(once.tensors["current"][key], state[key])
    train_here(tmp_path / "next", TINY | {"resume_from": str(once.path), "num_epochs": 1,
               "train.lora_rank": 2, "train.lora_alpha": 4, "eval.at_start": False})  # fmt: skip
    assert load_lora(Checkpointer(tmp_path / "next").latest()).modules == trained.modules


def test_a_held_out_reward_is_evaluated_and_never_trained_on(tmp_path):
    # An alarm needs an error, and that two prompts.
    overrides = TINY | {"num_epochs": 1, "eval.num_prompts": 3}
    train_here(tmp_path / "without", overrides)
    train_here(tmp_path / "with", overrides | {"eval.held_out_rewards": ("jpeg_compressibility",)})
    ours, theirs = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("with", "without"))
    for mine, expected in zip(ours, theirs, strict=True):
        new = mine.keys() - expected.keys()
        names = ("eval/jpeg_compressibility", "monitor/alarm/eval/jpeg_compressibility")
        judged = set(names) if "eval/total" in mine else set()
        assert {key for key in new if not key.startswith("eval/tag/")} == judged
        for key in expected.keys() - {k for k in expected if k.startswith("time/")}:
            assert mine[key] == expected[key], key


def test_standardized_rewards_count_deviations_of_their_group(tmp_path, monkeypatch):
    config = smoke(tmp_path, {"sample.standardize_rewards": True, "num_epochs": 1})
    config.eval.at_start = False
    with config.unlocked(), config.reward_fn.unlocked():
        config.reward_fn.jpeg_compressibility = 2.0
    trainer = make_trainer(config, CPU)
    seen = {}
    real_sample, real_update = trainer._sample, trainer.learner.train_epoch
    monkeypatch.setattr(trainer, "_sample", lambda: seen.setdefault("samples", real_sample()))

    def update(samples, r, *, epoch):
        seen["r"] = r
        return real_update(samples, r, epoch=epoch)

    monkeypatch.setattr(trainer.learner, "train_epoch", update)
    trainer.run()

    def z(scores):
        groups = scores.numpy().reshape(-1, config.sample.num_image_per_prompt)
        return (groups - groups.mean(1, keepdims=True)) / (groups.std(1, keepdims=True) + 1e-4)

    parts = seen["samples"].scores.parts
    total = z(parts["shapes"]) + 2 * z(parts["jpeg_compressibility"])
    advantage = (total - total.mean(1, keepdims=True)) / (total.std() + 1e-4)
    expected = advantage.clip(-5, 5) / 10 + 0.5
    torch.testing.assert_close(seen["r"], torch.from_numpy(expected.reshape(-1)))
