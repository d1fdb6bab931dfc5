"""Baselines on the built-in model that weight the flow-matching loss of the policy's own samples:
``--config config/baselines.py:NAME``.

They are config/nft.py:shapes under another algorithm (diffusion_nft/algorithms/matching.py), with
its prompts, batch of an epoch, solver and learning rate, and each with the KL weight that did best
in trials of shapes_demo's size (docs/experiments.md).  Cost and results at full size: not measured.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import ml_collections


def _load_nft() -> ModuleType:
    """config/nft.py, loaded from beside this file (torchrun has no ``config`` package)."""
    spec = importlib.util.spec_from_file_location("_nft", Path(__file__).with_name("nft.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NFT = _load_nft()


def _shapes(algorithm: str, name: str, *, kl_weight: float) -> ml_collections.ConfigDict:
    config = NFT.shapes()
    config.algorithm = algorithm
    config.save_dir = f"logs/baselines/shapes/{name}"
    config.matching.kl_weight = kl_weight
    return config


def shapes_rwr() -> ml_collections.ConfigDict:
    """Reward-weighted regression: each sample's weight is exp(advantage / temperature).

    ``torchrun --nproc_per_node=1 scripts/train_nft_sd3.py --config config/baselines.py:shapes_rwr``
    """
    return _shapes("reward_weighted", "rwr", kl_weight=1.0)


def shapes_awm() -> ml_collections.ConfigDict:
    """Advantage-weighted matching: towards good samples, away from bad ones.

    ``torchrun --nproc_per_node=1 scripts/train_nft_sd3.py --config config/baselines.py:shapes_awm``
    """
    return _shapes("advantage_weighted", "awm", kl_weight=0.1)


def shapes_best_of_n() -> ml_collections.ConfigDict:
    """Rejection fine-tuning: the best 4 of the 24 images of a prompt.

    ``torchrun --nproc_per_node=1 scripts/train_nft_sd3.py --config
    config/baselines.py:shapes_best_of_n``
    """
    config = _shapes("best_of_n", "best_of_n", kl_weight=10.0)
    config.matching.best_of = 4
    return config


PRESETS = {preset.__name__: preset for preset in (shapes_rwr, shapes_awm, shapes_best_of_n)}


def get_config(name: str = "") -> ml_collections.ConfigDict:
    """The preset ``name``, locked.  Raises ValueError for an unknown name."""
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; choose from {', '.join(PRESETS)}")
    return PRESETS[name]()
