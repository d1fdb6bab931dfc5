"""Pretraining in a few steps: a pipeline that plain diffusers loads and draws with."""

import torch
from diffusers import StableDiffusion3Pipeline

from diffusion_nft.shapes import pretraining
from diffusion_nft.shapes.model import PIPELINE_DIR
from diffusion_nft.utils.files import read_object
from tests.scripts.in_process import call, script


def test_a_short_pretraining_saves_a_pipeline_like_the_shipped_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pretraining, "NUM_IMAGES", 64)
    command = script("pretrain_shapes")
    monkeypatch.setattr(command, "DATASET_DIR", tmp_path / "dataset")
    steps = ("--vae_steps", 2, "--transformer_steps", 2)
    call(command, *steps, "--output_dir", tmp_path / "made")
    made = {path.relative_to(tmp_path / "made") for path in (tmp_path / "made").rglob("*.*")}
    assert made >= {path.relative_to(PIPELINE_DIR) for path in PIPELINE_DIR.rglob("*.[js]*")}
    config = read_object(tmp_path / "made" / "vae" / "config.json")
    assert config["shift_factor"] != 0 and config["scaling_factor"] != 1
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "made", dtype=torch.float32)
    size = {"height": 48, "width": 48, "max_sequence_length": 8, "num_inference_steps": 1}
    assert pipe("a red circle", **size).images[0].size == (48, 48)
