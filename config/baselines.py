"""Baselines on the built-in model with a weighted flow-matching loss on the policy's own samples:
``--config config/baselines.py:NAME``.

They are config/nft.py:shapes with another algorithm (diffusion_nft/algorithms/matching.py) and the
KL weight that performed best in trials of shapes_demo's size (docs/experiments.md).  Cost and
results at full size: not measured.
"""

import runpy
from pathlib import Path

import ml_collections

# Loaded by path, as torchrun has no ``config`` package.
NFT = runpy.run_path(str(Path(__file__).with_name("nft.py")))


def _shapes(algorithm: str, name: str, *, kl_weight: float) -> ml_collections.ConfigDict:
    config = NFT["shapes"]()
    config.algorithm = algorithm
    config.save_dir = f"logs/baselines/shapes/{name}"
    config.matching.kl_weight = kl_weight
    return config


def shapes_rwr() -> ml_collections.ConfigDict:
    """Reward-weighted regression: each sample's weight is exp(advantage / temperature)."""
    return _shapes("reward_weighted", "rwr", kl_weight=1.0)


def shapes_awm() -> ml_collections.ConfigDict:
    """Advantage-weighted matching: towards good samples, away from bad ones."""
    return _shapes("advantage_weighted", "awm", kl_weight=0.1)


def shapes_best_of_n() -> ml_collections.ConfigDict:
    """Rejection fine-tuning on the best 4 of the 24 images per prompt."""
    config = _shapes("best_of_n", "best_of_n", kl_weight=10.0)
    config.matching.best_of = 4
    return config


PRESETS = {preset.__name__: preset for preset in (shapes_rwr, shapes_awm, shapes_best_of_n)}


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """The preset ``name``, locked.  Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
