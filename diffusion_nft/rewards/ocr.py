"""OCR reward: does the picture show the text that the prompt puts in double quotes?"""

import importlib.metadata
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.pictures import to_pil
from diffusion_nft.rewards import RewardOutput

if TYPE_CHECKING:
    from rapidocr.utils.output import RapidOCROutput

# Characters of a prompt that an error quotes.
MAX_QUOTED = 200
# A picture -> the lines of text in it, in reading order.
Reader = Callable[[Image.Image], list[str]]


def _normalized(text: str) -> str:
    return text.replace(" ", "").lower()


def target_text(prompt: str) -> str:
    """The text that ``prompt`` asks for: between its first two double quotes, as the prompt has it.

    Raises ValueError if there is none, or nothing but spaces.
    """
    parts = prompt.split('"', 2)
    if len(parts) < 3 or not _normalized(parts[1]):
        quoted = prompt[:MAX_QUOTED]
        raise ValueError(f'the ocr reward needs a prompt with a text in "double quotes": {quoted}')
    return parts[1]


def check_prompts(prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]) -> None:
    """Raises ValueError that names the prompts without a quoted text, by line number from 1."""
    del metadata
    wrong = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            target_text(prompt)
        except ValueError:
            wrong.append(f"line {number}: {prompt[:MAX_QUOTED]}")
    if wrong:
        more = f"\n... and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        listing = "\n".join(wrong[:5])
        raise ValueError(
            f'the ocr reward needs prompts with a text in "double quotes", but\n{listing}{more}'
        )


def levenshtein(a: str, b: str) -> int:
    """The least number of insertions, deletions and substitutions that turn ``a`` into ``b``."""
    row = list(range(len(b) + 1))
    for i, char in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (char != other))
    return row[-1]


def text_score(found: str, target: str) -> float:
    """1 - min(dist, n) / n in [0, 1], with n characters in ``target``.

    dist = 0 if ``found`` contains ``target``, else the Levenshtein distance of the two; spaces and
    case do not count.  Source: Flow-GRPO, arXiv 2505.05470.
    """
    found, target = _normalized(found), _normalized(target)
    if target in found:
        return 1.0
    return 1 - min(levenshtein(found, target), len(target)) / len(target)


class OcrReward:
    """``text_score`` of what an OCR engine reads and what the prompt quotes.

    ``backend``: ``rapidocr`` (PP-OCR models inside its package, no downloads) or ``paddleocr`` (the
    published one, 2.x or 3.x; fetches models at its first use).  Both run on the CPU.  ``threads``
    a process; None: this machine's cores shared among its ranks.  Scores of different backends, or
    of different versions of one, do not compare.  Raises ImportError without the backend.
    """

    def __init__(
        self, device: torch.device, *, backend: str = "rapidocr", threads: int | None = None
    ):
        del device
        if backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"OCR backend {backend!r} is unknown; choose from {known}")
        if threads is not None and threads < 1:
            raise ValueError(f"the threads of the ocr reward must be at least 1, not {threads}")
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.read = BACKENDS[backend](threads or max(1, (os.cpu_count() or 1) // ranks))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` in [0, 1] of ``images: [B, 3, H, W]`` in [0, 1].

        Raises ValueError for a prompt without a quoted text or another number of prompts than B.
        """
        del metadata
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures but {len(prompts)} prompts")
        targets = [target_text(prompt) for prompt in prompts]
        scores = [
            text_score("".join(self.read(picture)), target)
            for picture, target in zip(to_pil(images), targets, strict=True)
        ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))


def _rapidocr(threads: int) -> Reader:
    """RapidOCR's defaults without the angle classifier; lines below confidence 0.5 are dropped."""
    try:
        import onnxruntime  # noqa: F401  (RapidOCR imports it only when it reads its first picture)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError('the ocr reward needs: pip install -e ".[ocr]"') from error
    engine = RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
    )

    def read(picture: Image.Image) -> list[str]:
        return list(cast("RapidOCROutput", engine(picture)).txts or ())

    return read


def _paddleocr(threads: int) -> Reader:
    """PaddleOCR, English, no angle classifier, as published.

    It is given RGB arrays, as published, although it takes arrays for BGR.
    """
    try:
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the paddleocr backend needs, in an environment of its own: "
            "pip install paddlepaddle==2.6.2 paddleocr==2.9.1"
        ) from error
    if int(importlib.metadata.version("paddleocr").split(".")[0]) < 3:
        engine = PaddleOCR(
            use_angle_cls=False, lang="en", use_gpu=False, show_log=False, cpu_threads=threads
        )

        def read(picture: Image.Image) -> list[str]:
            (lines,) = engine.ocr(np.array(picture), cls=False)
            return [text for _, (text, confidence) in lines or () if confidence > 0]

    else:
        engine = PaddleOCR(
            lang="en",
            device="cpu",
            cpu_threads=threads,
            use_doc_orientation_classify=False,
            use_doc_unwarping=False,
            use_textline_orientation=False,
        )

        def read(picture: Image.Image) -> list[str]:
            (page,) = engine.predict(np.array(picture))
            found = zip(page["rec_texts"], page["rec_scores"], strict=True)
            return [text for text, confidence in found if confidence > 0]

    return read


# backend -> what builds its reader, given a number of threads.
BACKENDS: dict[str, Callable[[int], Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
