"""GenEval (arXiv 2310.11513): are the objects of the prompt there, in number, colour and place?

A detector finds objects (detector.py, mask2former_weights.py), CLIP names their colours
(colors.py), and pure functions compare both with the prompt's metadata (verdict.py).  The
benchmark's checkpoints run without mmcv and mmdet; where these are installed, mmdet_detector.py
can run the detector by them.  Needs the extra packages ``open_clip_torch`` and OpenCV.
"""

from diffusion_nft.rewards.geneval.scorer import GenEvalReward, GenEvalScorer

__all__ = ["GenEvalReward", "GenEvalScorer"]
