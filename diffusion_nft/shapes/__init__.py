"""The embedded world: pictures of shapes, their captions, a verifier and a tiny SD3 pipeline.

Everything that runs on Stable Diffusion 3.5 runs here unchanged, in minutes on a CPU and with
nothing to download.
"""
