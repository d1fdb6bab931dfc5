"""OCR reward: similarity of the text in the image and the quoted text in the prompt."""

import importlib.metadata
import os
import re
import unicodedata
from collections.abc import Callable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, cast

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

# Maximum number of characters of a prompt, and of unknown letters, in an error.
MAX_QUOTED = 200
DEFAULT_BACKEND = "rapidocr"
# Images -> the lines of text in each, in reading order.
Reader = Callable[[list[Image.Image]], list[list[str]]]

# The requested text: in straight quotes, as published, or else in typographic ones.
QUOTED_PATTERNS = (re.compile(r'"(.*?)"', re.DOTALL), re.compile("[“”„](.*?)[“”]", re.DOTALL))
# Characters that an engine cannot tell apart, mapped to one of them; variation selectors, removed.
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
    """``text`` for comparison: lower case, without spaces, invisible and lookalike characters.

    NFKC unifies composed, decomposed and full-width letters, … and three dots, ½ and 1/2;
    LOOKALIKES unifies quotes and dashes.  ASCII text only loses spaces and case.
    """
    text = unicodedata.normalize("NFKC", text).translate(LOOKALIKES)
    seen = (
        c for c in text if not c.isspace() and unicodedata.category(c) not in INVISIBLE_CATEGORIES
    )
    return unicodedata.normalize("NFKC", "".join(seen).lower().replace("ς", "σ"))


def target_text(prompt: str, letters: Set[str] | None = None) -> str:
    """The text in the first pair of double quotes of ``prompt``, not normalised.

    ``letters``: the letters that the engine can read, normalised; None: unknown.  Raises ValueError
    if there is no text, or if it has other letters, which no image could match.
    """
    quoted = repr(prompt[:MAX_QUOTED])  # repr shows invisible characters
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
    """Raises ValueError for a prompt that ``target_text`` refuses.

    The letters are those of the engine in ``options``; None: a server's engine, unknown here.
    """
    letters = None
    if options is not None:
        letters = engine_letters(options.get("backend", DEFAULT_BACKEND))
    target_text(prompt, letters)


def levenshtein(a: str, b: str) -> int:
    """Edit distance: the minimum number of insertions, deletions and substitutions."""
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
    """``text_score`` of the text that an OCR engine reads and the text that the prompt quotes.

    ``backend``: ``rapidocr`` (its package contains the PP-OCR models) or ``paddleocr`` (as
    published; 2.x or 3.x, downloads models at its first use).  Both run on the CPU.  ``threads``:
    CPU threads per process (default: the usable cores divided by the machine's ranks), each of
    which reads an image with an engine of its own (rapidocr).  Scores of
    different backends or versions are not comparable.  Raises ImportError without the backend.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        backend: Literal["rapidocr", "paddleocr"] = DEFAULT_BACKEND,
        threads: int | None = None,
    ):
        if threads is not None and threads < 1:
            raise ValueError(f"the threads of ocr must be at least 1, not {threads}")
        self.letters = engine_letters(backend)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.read = BACKENDS[backend](threads or max(1, usable_cpus() // ranks))

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> RewardOutput:
        """Raises ValueError for a prompt that ``target_text`` refuses, or for another number of
        prompts than images.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images but {len(prompts)} prompts")
        targets = [target_text(prompt, self.letters) for prompt in prompts]
        scores = [
            text_score("".join(lines), target)
            for lines, target in zip(self.read(to_pil(images)), targets, strict=True)
        ]
        return RewardOutput(torch.tensor(scores, dtype=torch.float64))


def engine_letters(backend: str) -> Set[str] | None:
    """Letters that ``backend`` can read, ``normalized``, or None if unknown."""
    return LETTERS[backend]() if backend in LETTERS else None


def _rapidocr_engine() -> "RapidOCR":
    """RapidOCR without the angle classifier; its default drops lines below confidence 0.5."""
    try:
        import onnxruntime  # noqa: F401  (RapidOCR imports it with the first image)
        from rapidocr import RapidOCR
    except ImportError as error:
        raise ImportError('the ocr reward needs: pip install -e ".[ocr]"') from error
    return RapidOCR(
        params={
            "Global.use_cls": False,
            "Global.log_level": "error",
            "EngineConfig.onnxruntime.intra_op_num_threads": 1,
        }
    )


def _rapidocr(threads: int) -> Reader:
    idle: SimpleQueue[RapidOCR] = SimpleQueue()  # an engine serves one thread at a time
    idle.put(_rapidocr_engine())

    def read(image: Image.Image) -> list[str]:
        try:
            engine = idle.get_nowait()
        except Empty:
            engine = _rapidocr_engine()
        try:
            return list(cast("RapidOCROutput", engine(image)).txts or ())
        finally:
            idle.put(engine)

    pool = ThreadPoolExecutor(threads, thread_name_prefix="ocr")
    return lambda images: list(pool.map(read, images))


@cache
def _rapidocr_letters() -> Set[str]:
    engine = _rapidocr_engine()
    # The recognition model, which has the list, loads at its first use.
    engine(Image.new("RGB", (48, 48)), use_det=False)
    assert engine.text_rec is not None
    return frozenset("".join(map(normalized, engine.text_rec.session.get_character_list())))


def _paddleocr(threads: int) -> Reader:
    """PaddleOCR as published: English, no angle classifier, RGB arrays although it expects BGR."""
    try:
        from paddleocr import PaddleOCR  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError(
            "the paddleocr backend needs, in a separate environment: "
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

    return lambda images: [read(image) for image in images]


# backend -> builder of its reader, given a number of threads.
BACKENDS: dict[str, Callable[[int], Reader]] = {"rapidocr": _rapidocr, "paddleocr": _paddleocr}
# backend -> its letters, normalised.
LETTERS: dict[str, Callable[[], Set[str]]] = {"rapidocr": _rapidocr_letters}
