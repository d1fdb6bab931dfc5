"""The built-in world: images of shapes, their captions, a verifier and a tiny SD3 pipeline, which
trains in minutes on a CPU, with the code of Stable Diffusion 3.5 and without downloads.
"""

# Name (``pretrained.model``), pixels per side, and T5 tokens of the built-in model.
BUILT_IN_MODEL, BUILT_IN_RESOLUTION, BUILT_IN_LENGTH = "shapes", 48, 8
