"""Named experiments: what ``scripts/experiments.py NAME`` runs, and what its plots compare.

An experiment asks one question of several arms, each a preset with changes, over the same seeds.
To add one: an entry in ``EXPERIMENTS``.  Names of experiments and arms become names of files.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SEEDS = (42, 43, 44, 45, 46)


@dataclass(frozen=True)
class Arm:
    """The preset of a configuration file, and what is changed in it by dotted key."""

    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    file: str = "config/nft.py"


@dataclass(frozen=True)
class Experiment:
    """``baseline``: the arm that the others are tested against.  ``common``: changes of every arm,
    such as how often it is evaluated, which must be the same for curves to compare.
    """

    question: str
    arms: Mapping[str, Arm]
    baseline: str
    common: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS

    def changes(self, arm: str) -> dict[str, Any]:
        """What ``arm`` changes in its preset, by dotted key."""
        return {**self.common, **self.arms[arm].changes}


# Five points a curve in the 24 epochs of shapes_demo; pictures are for looking, not for counting.
DEMO_CURVE = {"eval_freq": 6, "log.num_images": 0}

FAST = {
    "train.sigma_choice": "stratified",
    "train.timestep_fraction": 0.2,
    "train.skip_flat_groups": True,
}
CHEAP = {
    "sample.num_steps": 5,
    "train.timestep_fraction": 0.4,
    "train.sigma_choice": "stratified",
    "train.skip_flat_groups": True,
}

EXPERIMENTS = {
    "demo_seeds": Experiment(
        question="How much does shapes_demo gain on held-out prompts, over seeds?",
        arms={"faithful": Arm("shapes_demo")},
        baseline="faithful",
        common=DEMO_CURVE,
    ),
    "fast": Experiment(
        question="Which cheaper epochs gain as much as those of shapes_demo?",
        arms={
            "faithful": Arm("shapes_demo"),
            # As the presets of SD3.5: all sigmas but one, drawn anew for each sample.
            "9-sigmas": Arm("shapes_demo", {"train.timestep_fraction": 0.99, "num_epochs": 12}),
            # Half the sampling; 3 sigmas a sample are trained on, as in shapes_demo.
            "5-steps": Arm("shapes_demo", {"sample.num_steps": 5, "train.timestep_fraction": 0.6}),
            "stratified": Arm("shapes_demo", {"train.sigma_choice": "stratified"}),
            "2-stratified": Arm(
                "shapes_demo",
                {"train.sigma_choice": "stratified", "train.timestep_fraction": 0.2},
            ),
            "2-stratified-skip": Arm("shapes_demo", FAST),
            "1-sigma": Arm("shapes_demo", {"train.timestep_fraction": 0.1}),
            "shared-noise": Arm("shapes_demo", {"train.shared_noise": True}),
            "skip-flat": Arm("shapes_demo", {"train.skip_flat_groups": True}),
            # All that makes an epoch cheaper, and as many epochs more.
            "cheap": Arm("shapes_demo", {**CHEAP, "num_epochs": 42}),
            "cheap-shared": Arm(
                "shapes_demo", {**CHEAP, "train.shared_noise": True, "num_epochs": 42}
            ),
        },
        baseline="faithful",
        common=DEMO_CURVE,
    ),
}
