"""Installs DiffusionNFT and the built-in model."""

from setuptools import find_packages, setup

CORE = [
    "torch>=2.6",
    "torchvision",
    "diffusers>=0.42",
    "transformers>=5.17",
    "peft>=0.21",
    "accelerate>=1.0",
    "ml_collections>=1.0",
    "absl-py",
    "httpx",
    "huggingface_hub>=1.3",
    "jinja2",
    "numpy",
    "pillow>=10.1",
    "psutil",
    "pydantic>=2.8",
    "safetensors",
    "sentencepiece",
    "protobuf",
    "tabulate",
    "tenacity",
    "wandb",
    "tqdm",
]
# Optional rewards; each is imported only when it is used.
HPSV2 = ["open_clip_torch>=3.3"]
GENEVAL = ["open_clip_torch>=3.3", "opencv-python-headless"]
OCR = ["rapidocr>=3.10", "onnxruntime"]
UNIFIEDREWARD = ["openai>=1.109"]
REWARDS = [*GENEVAL, *HPSV2, *OCR, *UNIFIEDREWARD]
# Serving rewards to runs elsewhere.
SERVER = ["fastapi", "uvicorn"]
# The figures of scripts/benchmark_scaling.py and scripts/experiments_plot.py, and its statistics.
PLOTS = ["matplotlib", "scipy"]
TEST = [
    *REWARDS,
    *SERVER,
    *PLOTS,
    "pytest>=8",
    "pytest-timeout",
    "pytest-xdist",
    "scipy",  # transformers' own Mask2Former, which the detector is compared with
    "hypothesis",
    "ruff",
    "pyright",
    "tensorboard",
]

setup(
    name="diffusion-nft",
    version="0.1.0",
    description="DiffusionNFT: online RL of text-to-image diffusion models on the forward process",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["diffusion_nft", "diffusion_nft.*"]),
    package_data={
        "diffusion_nft.shapes": ["pipeline/**/*"],
        "diffusion_nft.reports": ["*.html", "*.css", "*.js", "*.md"],
    },
    install_requires=CORE,
    extras_require={
        "geneval": GENEVAL,
        "hpsv2": HPSV2,
        "ocr": OCR,
        "plots": PLOTS,
        "rewards": REWARDS,
        "server": SERVER,
        "tensorboard": ["tensorboard"],
        "test": TEST,
        "unifiedreward": UNIFIEDREWARD,
    },
)
