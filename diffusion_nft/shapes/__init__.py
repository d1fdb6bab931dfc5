"""The built-in world: images of shapes, their captions, a verifier and a tiny SD3 pipeline.

Everything that runs on Stable Diffusion 3.5 runs here unchanged, in minutes on a CPU and with
nothing to download.
"""

# ``pretrained.model``, the model's pixels a side and its T5 tokens.
BUILT_IN_MODEL, BUILT_IN_RESOLUTION, BUILT_IN_LENGTH = "shapes", 48, 8
