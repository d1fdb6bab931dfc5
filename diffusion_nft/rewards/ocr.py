"""OCR reward: does the image show the text that the prompt puts in double quotes?"""

import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Set
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusion_nft.images import to_pil
from diffusion_nft.rewards import RewardOutput
from diffusion_nft.utils.devices import usable_cpus

if TYPE_CHECKING:
    from rapidocr import RapidOCR
    from rapidocr.utils.output import RapidOCROutput

# Characters of a prompt, and letters in it, that an error quotes.
MAX_QUOTED = 200
DEFAULT_BACKEND = "rapidocr"
# An image -> the lines of text in it, in reading order.
Reader = Callable[[Image.Image], list[str]]

# The text asked for: in straight quotes, as published, or else in typographic ones.
QUOTED_PATTERNS = (re.compile(r'"(.*?)"', re.DOTALL), re.compile("[“”„](.*?)[“”]", re.DOTALL))
# Signs that look alike, of which an engine reads the one for the other; variation selectors, which
# are invisible.
LOOKALIKES = str.maketrans(
    dict.fromkeys("‘’‚‛′", "'")
    | dict.fromkeys("“”„‟", '"')
    | dict.fromkeys("‐‒–—―−", "-")
    | {"⁄": "/", "İ": "I"}
    | dict.fromkeys("\ufe0e\ufe0f", "")
)
# Control and format characters (zero-width spaces and joiners, soft hyphens, marks of direction).
INVISIBLE_CATEGORIES = ("Cc", "Cf")


def normalized(text: str) -> str:
    """``text`` as it is compared: lower case, without spaces and invisible characters, and with one
    form of what looks alike.

    NFKC makes one of composed and decomposed letters, of full-width ones, of … and three dots, of ½
    and 1/2; LOOKALIKES of quotes and dashes.  ASCII loses its spaces and its case only.
    """
    text = unicodedata.normalize("NFKC", text).translate(LOOKALIKES)
    seen = (
        c for c in text if not c.isspace() and unicodedata.category(c) not in INVISIBLE_CATEGORIES
    )
    return unicodedata.normalize("NFKC", "".join(seen).lower().replace("ς", "σ"))


def target_text(prompt: str, letters: Set[str] | None = None) -> str:
    """The text that ``prompt`` asks for: in its first pair of double quotes, as the prompt has it.

    ``letters``: those that the engine can read, normalised; None: unknown.  Raises ValueError if
    there is no text, or one with other letters, which no image could ever match.
    """
    quoted = repr(prompt[:MAX_QUOTED])  # shows what is invisible
    found = QUOTED_PATTERNS[0].search(prompt) or QUOTED_PATTERNS[1].search(prompt)
    if found is None or not (text := normalized(found[1])):
        raise ValueError(f'no text in "double quotes": {quoted}')
    if letters is not None and (unknown := [c for c in dict.fromkeys(text) if c not in letters]):
        listed = " ".join(unknown[:MAX_QUOTED])
        raise ValueError(f"letters that the OCR engine cannot read ({listed}): {quoted}")
    return found[1]


def check_prompt(
    prompt: str, metadata: Mapping[str, Any], options: Mapping[str, Any] | None
) -> None:
    """Raises ValueError as ``target_text``, with the letters of the engine that ``options`` choose;
    None: a server's, which are unknown here.
    """
    del metadata
    letters = None
    if options is not None:
        letters = engine_letters(options.get("backend", DEFAULT_BACKEND))
    target_text(prompt, letters)


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

    dist = 0 if ``found`` contains ``target``, else the Levenshtein distance of the two, both
    ``normalized``: spaces and case do not count.  Source: Flow-GRPO, arXiv 2505.05470.
    """
    found, target = normalized(found), normalized(target)
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
        self, device: torch.device, *, backend: str = DEFAULT_BACKEND, threads: int | None = None
    ):
        del device
        if backend not in BACKENDS:
            known = ", ".join(BACKENDS)
            raise ValueError(f"OCR backend {backend!r} is unknown; choose from {known}")
        if threads is not None and threads < 1:
            raise ValueError(f"the threads of the ocr reward must be at least 1, not {threads}")
        self.letters = engine_letters(backend)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.read = BACKENDS[backend](threads or max(1, usable_cpus() // ranks))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Scores ``[B]`` in [0, 1] of ``images: [B, 3, H, W]`` in [0, 1].

        Raises ValueError for a prompt without a quoted text, a text with letters that the engine
        lacks, or another number of prompts than B.
        """
        del metadata
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        targets = [target_text(prompt, self.letters) for prompt in prompts]
        scores = [
            text_score("".join(self.read(image)), target)
            for image, target in zip(to_pil(images), targets, strict=True)
        ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))


def engine_letters(backend: str) -> Set[str] | None:
    """The letters that ``backend`` can read, ``normalized``; None: unknown.

    Raises ImportError without its package.
    """
    return LETTERS[backend]() if backend in LETTERS else None


def _rapidocr_engine(threads: int) -> "RapidOCR":
    """RapidOCR's defaults without the angle classifier; lines below confidence 0.5 are dropped."""
    try:
        import onnxruntime  # noqa: F401  (RapidOCR imports it only when it reads its first image)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError('the ocr reward needs: pip install -e ".[ocr]"') from error
    return RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
    )


def _rapidocr(threads: int) -> Reader:
    engine = _rapidocr_engine(threads)

    def read(image: Image.Image) -> list[str]:
        return list(cast("RapidOCROutput", engine(image)).txts or ())

    return read


@cache
def _rapidocr_letters() -> Set[str]:
    engine = _rapidocr_engine(threads=1)
    # The model that knows them loads when it is first used.
    engine(Image.new("RGB", (48, 48)), use_det=False)
    assert engine.text_rec is not None
    return frozenset("".join(map(normalized, engine.text_rec.session.get_character_list())))


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

        def read(image: Image.Image) -> list[str]:
            (lines,) = engine.ocr(np.array(image), cls=False)
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

        def read(image: Image.Image) -> list[str]:
            (page,) = engine.predict(np.array(image))
            found = zip(page["rec_texts"], page["rec_scores"], strict=True)
            return [text for text, confidence in found if confidence > 0]

    return read


# backend -> what builds its reader, given a number of threads.
BACKENDS: dict[str, Callable[[int], Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
# backend -> what tells the letters that it can read, normalised.
LETTERS: dict[str, Callable[[], Set[str]]] = {"rapidocr": _rapidocr_letters}
