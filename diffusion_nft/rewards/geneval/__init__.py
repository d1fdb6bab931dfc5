"""GenEval (arXiv 2310.11513): objects of the prompt, their number, colour and position.

A detector finds objects (detector.py, mask2former_weights.py), CLIP classifies their colours
(colors.py), and pure functions compare both with the prompt's metadata (verdict.py).  The
benchmark's checkpoints run without mmcv and mmdet; mmdet_detector.py runs the detector with them.
Needs the packages ``open_clip_torch`` and OpenCV.
"""

from diffusion_nft.rewards.geneval.scorer import GenEvalReward, GenEvalScorer

__all__ = ["GenEvalReward", "GenEvalScorer"]
