"""Named experiments, which ``scripts/experiments.py NAME`` runs and plots.

An experiment compares variants, each a preset with changes, over the same seeds.  To add one, add
an entry to ``EXPERIMENTS``.  Names of experiments and variants are used in file names.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEDS = (42, 43, 44, 45, 46)


@dataclass(frozen=True)
class Variant:
    """A preset of a configuration file, and changes by dotted key."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    file: str = "config/nft.py"


@dataclass(frozen=True)
class Experiment:
    """``baseline``: the variant that the others are tested against.  ``common``: changes of all
    variants, such as the frequency of evaluations, which a variant may override.  ``watched``:
    metrics plotted next to strict accuracy; by default reward, distance to the reference, stricter
    accuracy and diversity.
    """

    question: str
    variants: Mapping[str, Variant]
    baseline: str
    common: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    watched: tuple[str, ...] = ()

    def changes(self, variant: str) -> dict[str, Any]:
        """All changes of ``variant`` to its preset, by dotted key."""
        return {**self.common, **self.variants[variant].changes}


# Five evaluations in the 24 epochs of shapes_demo, without images.
DEMO_CURVE = {"eval_freq": 6, "log.num_images": 0}
# Epochs of shapes_demo's size for other algorithms; their number is chosen for the same cost.
DEMO_SIZE = {"sample.num_groups": 8, "train.lr_half_life": 0.0}
GRPO_FILE, BASELINES_FILE = "config/grpo.py", "config/baselines.py"

FAST = {
    "train.sigma_choice": "stratified",
    "train.timestep_fraction": 0.2,
    "train.filter_zero_std_groups": True,
}
CHEAP = {
    "sample.num_steps": 5,
    "train.timestep_fraction": 0.4,
    "train.sigma_choice": "stratified",
    "train.filter_zero_std_groups": True,
}


def dotted(changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` by dotted key, which their names write with a double underscore for the dot."""
    return {name.replace("__", "."): value for name, value in changes.items()}


def demo(**changes: Any) -> Variant:
    return Variant("shapes_demo", dotted(changes))


def grpo(**changes: Any) -> Variant:
    """Flow-GRPO without guidance, 14 epochs."""
    own = {**DEMO_SIZE, "num_epochs": 14}
    return Variant("shapes_grpo", {**own, **dotted(changes)}, GRPO_FILE)


def grpo_3_steps(**changes: Any) -> Variant:
    """Flow-GRPO without guidance, trained at 3 of its 10 steps, drawn per sample, as shapes_demo is
    at 3 of 10 sigmas; 28 epochs.
    """
    return grpo(
        train__timestep_fraction=0.3,
        train__sigma_choice="random",
        grpo__clip_range=1e-3,
        num_epochs=28,
        **changes,
    )


def grpo_cfg(**changes: Any) -> Variant:
    """Flow-GRPO with guidance 2 in rollout, training and evaluation: half of the epochs, as each
    step takes two forwards.
    """
    own = {**DEMO_SIZE, "num_epochs": 7, "eval_freq": 3}
    return Variant("shapes_grpo_cfg", {**own, **dotted(changes)}, GRPO_FILE)


def baseline(preset: str, **changes: Any) -> Variant:
    """A preset of weighted matching with the epochs and KL weight of shapes_demo."""
    own = {**DEMO_SIZE, "matching.kl_weight": 1e-4, "num_epochs": 24}
    return Variant(preset, {**own, **dotted(changes)}, BASELINES_FILE)


EXPERIMENTS = {
    "fast": Experiment(
        question="Which cheaper epochs gain as much as those of shapes_demo?",
        variants={
            "faithful": demo(),
            # As in the presets of SD3.5: all sigmas except one, drawn per sample.
            "9-sigmas": demo(train__timestep_fraction=0.99, num_epochs=12),
            "stratified": demo(train__sigma_choice="stratified"),
            "2-stratified": demo(train__sigma_choice="stratified", train__timestep_fraction=0.2),
            # The preset shapes_fast.
            "2-stratified-skip": Variant("shapes_demo", FAST),
            "1-sigma": demo(train__timestep_fraction=0.1),
            "shared-noise": demo(train__shared_noise=True),
            "skip-flat": demo(train__filter_zero_std_groups=True),
            # All savings, with more epochs for the same cost.
            "cheap": Variant("shapes_demo", {**CHEAP, "num_epochs": 42}),
        },
        baseline="faithful",
        common=DEMO_CURVE,
        seeds=(42, 43, 44),
    ),
    "grpo_tuning": Experiment(
        question="Which settings serve Flow-GRPO best on the built-in model?",
        variants={
            "published": grpo(train__learning_rate=3e-4),
            "lr-1e-3": grpo(),
            "lr-3e-3": grpo(train__learning_rate=3e-3),
            "lr-1e-2": grpo(train__learning_rate=1e-2),
            "lr-3e-3-clip-1e-3": grpo(train__learning_rate=3e-3, grpo__clip_range=1e-3),
            "clip-1e-3": grpo(grpo__clip_range=1e-3),
            "clip-1e-2": grpo(grpo__clip_range=1e-2),
            "clip-1e-2-no-kl": grpo(grpo__clip_range=1e-2, grpo__kl_weight=0.0),
            "lr-3e-3-clip-1e-2": grpo(train__learning_rate=3e-3, grpo__clip_range=1e-2),
            "lr-1e-2-clip-1e-3": grpo(train__learning_rate=1e-2, grpo__clip_range=1e-3),
            "lr-3e-3-clip-1e-3-no-kl": grpo(
                train__learning_rate=3e-3, grpo__clip_range=1e-3, grpo__kl_weight=0.0
            ),
            # More epochs for the same cost: without KL term, and with 3 of 10 steps trained.
            "lr-3e-3-clip-1e-3-no-kl-18": grpo(
                train__learning_rate=3e-3,
                grpo__clip_range=1e-3,
                grpo__kl_weight=0.0,
                num_epochs=18,
            ),
            "3-steps-lr-1e-3": grpo_3_steps(train__learning_rate=1e-3),
            "3-steps-lr-3e-3": grpo_3_steps(train__learning_rate=3e-3),
            "cfg-lr-1e-3": grpo_cfg(train__learning_rate=1e-3, grpo__clip_range=1e-3),
            "cfg-lr-3e-3": grpo_cfg(train__learning_rate=3e-3, grpo__clip_range=1e-3),
        },
        baseline="published",
        common={**DEMO_CURVE, "eval_freq": 7},
        seeds=(42,),
    ),
    "matching_tuning": Experiment(
        question="Which settings serve the weighted baselines best on the built-in model?",
        variants={
            "awm": baseline("shapes_awm"),
            "awm-lr-3e-4": baseline("shapes_awm", train__learning_rate=3e-4),
            "awm-kl-01": baseline("shapes_awm", matching__kl_weight=0.1),
            "awm-kl-003": baseline("shapes_awm", matching__kl_weight=0.03),
            "awm-kl-1": baseline("shapes_awm", matching__kl_weight=1.0),
            "awm-kl-01-lr-2e-3": baseline(
                "shapes_awm", matching__kl_weight=0.1, train__learning_rate=2e-3
            ),
            "rwr": baseline("shapes_rwr", num_epochs=28),
            "rwr-lr-3e-4": baseline("shapes_rwr", num_epochs=28, train__learning_rate=3e-4),
            "rwr-kl-01": baseline("shapes_rwr", num_epochs=28, matching__kl_weight=0.1),
            "rwr-kl-1": baseline("shapes_rwr", num_epochs=28, matching__kl_weight=1.0),
            "rwr-kl-10": baseline("shapes_rwr", num_epochs=28, matching__kl_weight=10.0),
            "best-of-n": baseline("shapes_best_of_n", num_epochs=46),
            "best-of-n-lr-3e-4": baseline(
                "shapes_best_of_n", num_epochs=46, train__learning_rate=3e-4
            ),
            "best-of-n-kl-01": baseline("shapes_best_of_n", num_epochs=46, matching__kl_weight=0.1),
            "best-of-n-kl-1": baseline("shapes_best_of_n", num_epochs=46, matching__kl_weight=1.0),
            "best-of-n-kl-10": baseline(
                "shapes_best_of_n", num_epochs=46, matching__kl_weight=10.0
            ),
        },
        baseline="awm",
        common=DEMO_CURVE,
        seeds=(42,),
    ),
    "algorithms": Experiment(
        question="Does NFT learn more from the same compute than Flow-GRPO?",
        variants={
            "nft": demo(),
            # The best of grpo_tuning with the KL term, without it, and with guidance.
            "flow-grpo": grpo(train__learning_rate=3e-3, grpo__clip_range=1e-3),
            "flow-grpo-no-kl": grpo(
                train__learning_rate=3e-3,
                grpo__clip_range=1e-3,
                grpo__kl_weight=0.0,
                num_epochs=18,
            ),
            "flow-grpo-cfg": grpo_cfg(train__learning_rate=3e-3, grpo__clip_range=1e-3),
        },
        baseline="nft",
        common=DEMO_CURVE,
    ),
    "matching": Experiment(
        question="Does NFT learn more from the same compute than weighted matching?",
        variants={
            "nft": demo(),
            # The best of matching_tuning.
            "awm": baseline("shapes_awm", matching__kl_weight=0.1),
            "rwr": baseline("shapes_rwr", num_epochs=28, matching__kl_weight=1.0),
            "best-of-n": baseline("shapes_best_of_n", num_epochs=46, matching__kl_weight=10.0),
        },
        baseline="nft",
        common=DEMO_CURVE,
    ),
    "negatives": Experiment(
        question="What does the negative branch do?",
        variants={
            "nft": demo(),
            "no-negative-branch": demo(nft__negative_branch=False),
            "positive-only": demo(train__adv_mode="positive_only"),
        },
        baseline="nft",
        common=DEMO_CURVE,
    ),
    "solvers": Experiment(
        question="Which solver should draw the training samples, in how many steps?",
        variants={
            "dpm2-10": demo(),
            "dpm1-10": demo(sample__solver="dpm1"),
            "sde-10": demo(sample__solver="flow"),
            "unipc-10": demo(sample__solver="UniPCMultistepScheduler"),
            "dpm2-5": demo(sample__num_steps=5, train__timestep_fraction=0.6),
            "dpm2-20": demo(sample__num_steps=20, train__timestep_fraction=0.15),
        },
        baseline="dpm2-10",
        common=DEMO_CURVE,
    ),
    "old_policy": Experiment(
        question="How fast should the sampling policy follow the trained one?",
        variants={
            "linear-to-half": demo(),
            "on-policy": demo(nft__old_policy_decay="on_policy"),
            "constant-09": demo(nft__old_policy_decay="constant_09"),
            # In these 48 optimizer steps linear_to_half and linear_to_095 reach 0.048, and
            # delayed_linear is on_policy.  The published schedules, ten times as fast:
            "linear-to-half-x10": demo(nft__old_policy_decay="linear:0.01:0:0.5"),
            # (at 0.999 from step 22: the policy that samples hardly changes in the second half)
            "delayed-x10": demo(nft__old_policy_decay="linear:0.075:7:0.999"),
            # Reaches its cap after 24 steps.
            "linear-to-095-x40": demo(nft__old_policy_decay="linear:0.04:0:0.95"),
        },
        baseline="linear-to-half",
        common=DEMO_CURVE,
    ),
    "beta_weighting": Experiment(
        question="How do the strength beta and the weighting of the loss matter?",
        variants={
            # The old policy nearly equals the trained one in these runs.  Where they are equal, as
            # at the first of an epoch's two steps, the gradient is that of advantage-weighted
            # matching for any beta.
            "beta-1": demo(),
            "beta-001": demo(nft__beta=0.01),
            "beta-01": demo(nft__beta=0.1),
            "beta-10": demo(nft__beta=10.0),
            # With an old policy that lags, beta matters at both steps.
            "lag-beta-1": demo(nft__old_policy_decay="linear:0.01:0:0.5"),
            "lag-beta-01": demo(nft__old_policy_decay="linear:0.01:0:0.5", nft__beta=0.1),
            "uniform": demo(nft__weighting="uniform"),
            "sigma": demo(nft__weighting="sigma"),
            "one-minus-sigma": demo(nft__weighting="one_minus_sigma"),
            # As advantage-weighted matching in the experiment `matching`.
            "uniform-kl-01": demo(nft__weighting="uniform", nft__kl_weight=0.1),
        },
        baseline="beta-1",
        common=DEMO_CURVE,
    ),
    "kl_groups": Experiment(
        question="What do KL weight, deviation of the advantage, group size and guidance do?",
        variants={
            # 8 groups of 24, the deviation of the epoch, no guidance.
            "kl-1e-4": demo(),
            # Without forwards of the reference: more epochs for the same cost.
            "kl-0": demo(nft__kl_weight=0.0, num_epochs=28),
            "kl-1e-2": demo(nft__kl_weight=1e-2),
            # The best weight for advantage-weighted matching (matching_tuning).
            "kl-01": demo(nft__kl_weight=0.1),
            "group-std": demo(sample__global_std=False),
            # The same 192 samples per epoch in more or larger groups.
            "24x8": demo(sample__num_groups=24, sample__num_image_per_prompt=8),
            "4x48": demo(sample__num_groups=4, sample__num_image_per_prompt=48),
            # The same training as kl-1e-4, all evaluations with guidance.
            "cfg-in-evaluation": demo(eval__guidance_scale=2.0),
            # Guidance in the rollout, not in evaluation; fewer epochs for the same cost.
            "cfg-in-rollout": demo(sample__guidance_scale=2.0, num_epochs=17),
        },
        baseline="kl-1e-4",
        common=DEMO_CURVE,
    ),
    "guided": Experiment(
        question="Evaluated with guidance, what do NFT without it and Flow-GRPO with it learn?",
        variants={
            "flow-grpo-cfg": grpo_cfg(train__learning_rate=3e-3, grpo__clip_range=1e-3),
            "nft": demo(eval__guidance_scale=2.0),
        },
        baseline="flow-grpo-cfg",
        common=DEMO_CURVE,
    ),
    "hacking": Experiment(
        question="What does training on a lenient verifier do to the images, and what shows it?",
        variants={
            "standard": demo(num_epochs=48),
            "lenient": demo(num_epochs=48, reward_options={"shapes": {"rule": "lenient"}}),
        },
        baseline="standard",
        common={**DEMO_CURVE, "monitor.image_statistics": True, "monitor.max_kl": 0.1},
        watched=(
            "reward/mean",
            "eval/shapes/strict",
            "eval/shapes/stricter",
            "eval/diversity",
            "eval/image_statistics",
            "eval/image_statistics/saturation",
            "eval/image_statistics/edges",
            "loss/kl",
        ),
    ),
}
