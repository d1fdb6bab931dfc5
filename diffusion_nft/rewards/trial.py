"""Test images for a reward, and the command that fixes a failure."""

from collections.abc import Sequence
from urllib.parse import urlsplit

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from diffusion_nft.images import Images
from diffusion_nft.rewards.unifiedreward import START_COMMAND
from diffusion_nft.rewards.weights import WEIGHT_FILES, weights_root
from diffusion_nft.shapes.captions import metadata_lines, sample_scene
from diffusion_nft.shapes.scene import render_batch

SIDE = 512
# Extra of setup.py with a reward's packages, where its name differs from the reward's.
EXTRAS = {"pickscore": "", "clipscore": "", "aesthetic": "", "imagereward": ""}


def trial_images(name: str) -> tuple[Images, list[str], list[dict]]:
    """Two images with prompts and metadata that the reward ``name`` can score."""
    if name == "shapes":
        metadata = metadata_lines("test")[:2]
        rng = np.random.default_rng(0)
        drawn = render_batch([sample_scene(line, rng) for line in metadata])
    else:
        metadata, posters = [], []
        for word in ("HELLO", "WORLD"):
            poster = Image.new("RGB", (SIDE, SIDE), "white")
            font = ImageFont.load_default(size=96)
            ImageDraw.Draw(poster).text((SIDE / 2, SIDE / 2), word, "black", font, anchor="mm")
            posters.append(np.asarray(poster, dtype=np.float32).transpose(2, 0, 1) / 255)
            prompt, include = f'a white poster that says "{word}"', [{"class": "bench", "count": 1}]
            metadata.append({"tag": "single_object", "include": include, "prompt": prompt})
        drawn = np.stack(posters)
    images = Images.from_float(torch.from_numpy(drawn))
    return images, [line["prompt"] for line in metadata], metadata


def remedy(name: str, error: Exception, remote: Sequence[str]) -> str:
    """The command that fixes ``error``; empty if there is no single one."""
    if remote:
        if not isinstance(error, ConnectionError):
            return ""
        return f"python scripts/reward_server.py --reward {name} --port {urlsplit(remote[0]).port}"
    if isinstance(error, ImportError):
        extra = EXTRAS.get(name, name)
        return f'pip install -e ".[{extra}]"' if extra else "pip install -e ."
    if isinstance(error, ConnectionError) and name == "unifiedreward":
        return START_COMMAND
    if isinstance(error, ValueError) and name in WEIGHT_FILES:
        path = weights_root() / WEIGHT_FILES[name].file_name
        if str(path) in str(error):
            return f"rm {path} && python scripts/download.py {name}"
    return f"python scripts/download.py {name}" if isinstance(error, OSError) else ""
