"""Labelled grids of images, for people to look at."""

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusion_nft.images import Images, save_png
from diffusion_nft.utils.files import naming, write_atomically

# Images smaller than this many pixels on their short side are enlarged by a whole factor.
READABLE_SIDE = 144
MARGIN = 12
LINE_SPACING = 1.3
MAX_CAPTION_LINES = 4
# Characters of a caption that are laid out: more than its lines can hold.
MAX_CAPTION = 2000

# Pillow's bundled font has ASCII and little else; these are spelt out.
ASCII_SPELLINGS = str.maketrans(
    {"→": "->", "·": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}
)

# Stands for characters that the font does not have; it draws an empty box.
BOX = "\ufffd"

# Where a grid, in its ``Image.info``, keeps the captions that it does not show in full.
CAPTIONS = "captions"

WHITE, INK, GREY, FRAME = (255, 255, 255), (32, 33, 36), (110, 113, 118), (205, 208, 212)
GAIN, LOSS = (24, 128, 56), (190, 40, 35)

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(grid: Image.Image, path: Path) -> None:
    """Writes ``path`` as ``save_png``, and ``full_captions`` to a ``.txt`` file of the same name,
    which does not exist where the image shows them all.
    """
    beside, captions = path.with_suffix(".txt"), full_captions(grid)
    with naming(beside):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.unlink(missing_ok=True)
    if captions:
        write_atomically(beside, f"{captions}\n".encode())
    save_png(grid, path)


def full_captions(grid: Image.Image) -> str:
    """The captions of ``grid``, numbered, one a line; empty if the image shows each in full."""
    return grid.info.get(CAPTIONS, "")


@dataclass(frozen=True)
class TextLine:
    """One line of text under an image."""

    text: str
    color: Color = INK


def _enlarged(images: Images) -> list[Image.Image]:
    """Images, enlarged by a whole factor until they are readable: a tiny one's pixels are
    repeated, so that it shows what the reward saw.
    """
    if len(images) == 0:
        raise ValueError("a grid needs at least one image")
    pil_images = images.to_pil()
    width, height = pil_images[0].size
    factor = math.ceil(READABLE_SIDE / min(width, height))
    size = (width * factor, height * factor)
    return [image.resize(size, Image.Resampling.NEAREST) for image in pil_images]


def _font(cell_width: int) -> Font:
    """The font that Pillow brings, in a size that suits a cell of ``cell_width`` pixels."""
    return ImageFont.load_default(min(28, max(13, cell_width // 18)))


def _drawable(text: str) -> str:
    """``text`` as the font can draw it: accents dropped, BOX for each run of other characters."""
    plain = unicodedata.normalize("NFKD", text.translate(ASCII_SPELLINGS))
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    return re.sub(r"[^\s!-~]+(\s+[^\s!-~]+)*", BOX, plain)


def _line_height(font: Font) -> int:
    _, top, _, bottom = font.getbbox("Ay")
    return math.ceil((bottom - top) * LINE_SPACING)


def _break_word(word: str, width: float, font: Font) -> list[str]:
    """Pieces of ``word`` that fit ``width`` pixels each (at least one character)."""
    pieces = [""]
    for char in word:
        if pieces[-1] and font.getlength(pieces[-1] + char) > width:
            pieces.append("")
        pieces[-1] += char
    return pieces


def _wrapped(text: str, width: float, font: Font) -> list[str]:
    """Lines of ``text``, each at most ``width`` pixels; an ellipsis ends text that is cut off."""
    lines: list[str] = []
    for word in _drawable(text[:MAX_CAPTION]).split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines += _break_word(word, width, font)
    if len(lines) > MAX_CAPTION_LINES:
        lines = lines[:MAX_CAPTION_LINES]
        while lines[-1] and font.getlength(f"{lines[-1]}...") > width:
            lines[-1] = lines[-1][:-1]
        lines[-1] = f"{lines[-1].rstrip()}..."
    return lines


def _captions(texts: Sequence[str], width: float, font: Font) -> tuple[list[list[str]], str]:
    """Lines of each of ``texts``, and ``full_captions``: who sees a text that cannot be drawn, or
    not in full, finds it there by the number that it has in the image.
    """
    texts = [" ".join(text.split()) for text in texts]
    drawn, incomplete = [], False
    for number, text in enumerate(texts, start=1):
        lines = _wrapped(text, width, font)
        if "".join(lines).replace(" ", "") != text.translate(ASCII_SPELLINGS).replace(" ", ""):
            incomplete = True
            lines = _wrapped(f"{number}: {text}", width, font)
        drawn.append(lines)
    numbered = [f"{number}: {text}" for number, text in enumerate(texts, start=1)]
    return drawn, "\n".join(numbered) if incomplete else ""


@dataclass(frozen=True)
class _Cell:
    """Images side by side, each with lines of its own, and a caption below all of them."""

    images: list[Image.Image]
    under: list[list[TextLine]]
    caption: list[str]

    @property
    def width(self) -> int:
        return sum(p.width for p in self.images) + MARGIN // 2 * (len(self.images) - 1)

    def height(self, line: int) -> int:
        """Pixels from the top of the images to the end of the text; ``line``: pixels a line."""
        lines = max(len(lines) for lines in self.under) + len(self.caption)
        return self.images[0].height + (MARGIN // 2 + lines * line if lines else 0)

    def draw(self, sheet: Image.Image, x: int, y: int, font: Font) -> None:
        """Draws the cell with its top left corner at (x, y)."""
        pen, line = ImageDraw.Draw(sheet), _line_height(font)
        left, text_top = x, y + self.images[0].height + MARGIN // 2
        for image, lines in zip(self.images, self.under, strict=True):
            box = (left - 1, y - 1, left + image.width, y + image.height)
            pen.rectangle(box, outline=FRAME)
            sheet.paste(image, (left, y), image if image.mode == "RGBA" else None)
            for i, entry in enumerate(lines):
                middle = left + image.width // 2
                pen.text((middle, text_top + i * line), entry.text, entry.color, font, anchor="ma")
            left += image.width + MARGIN // 2
        below = text_top + max(len(lines) for lines in self.under) * line
        for i, text in enumerate(self.caption):
            middle = x + self.width // 2
            pen.text((middle, below + i * line), text, INK, font, anchor="ma")


def _sheet(cells: list[_Cell], columns: int, font: Font, captions: str) -> Image.Image:
    """All cells in rows of ``columns`` on white; each row is as high as its highest cell.

    ``captions``: the sheet's ``full_captions``.
    """
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    line, gap = _line_height(font), MARGIN * 3 // 2
    heights = [max(cell.height(line) for cell in row) for row in rows]
    width = 2 * MARGIN + len(rows[0]) * cells[0].width + (len(rows[0]) - 1) * gap
    sheet = Image.new("RGB", (width, 2 * MARGIN + sum(heights) + gap * (len(rows) - 1)), WHITE)
    y = MARGIN
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            cell.draw(sheet, MARGIN + i * (cell.width + gap), y, font)
        y += height + gap
    if captions:
        sheet.info[CAPTIONS] = captions
    return sheet


def image_grid(
    images: Images,
    captions: Sequence[str],
    *,
    columns: int,
    scores: Sequence[float] | None = None,
) -> Image.Image:
    """``images`` in rows of ``columns``, each with its caption below.

    ``scores: [B]`` adds a line with the number.  Small images are enlarged to at least 144 px.
    A caption that cannot be drawn in full has its number in ``full_captions`` before it.
    Raises ValueError if there is no image or a length differs.
    """
    pil_images = _enlarged(images)
    _check_lengths(len(pil_images), captions=captions, scores=scores)
    font = _font(pil_images[0].width)
    drawn, full = _captions(captions, pil_images[0].width, font)
    cells = [
        _Cell(
            images=[image],
            under=[[TextLine(_number(scores[i], 3), GREY)] if scores is not None else []],
            caption=drawn[i],
        )
        for i, image in enumerate(pil_images)
    ]
    return _sheet(cells, columns, font, full)


def side_by_side(
    before: Images,
    after: Images,
    captions: Sequence[str],
    before_scores: Sequence[float] | None = None,
    after_scores: Sequence[float] | None = None,
    *,
    columns: int = 2,
    labels: tuple[str, str] = ("before", "after"),
) -> Image.Image:
    """Pairs of images of the same prompts, ``columns`` pairs a row, labelled, captions below as
    in ``image_grid``.

    ``before_scores, after_scores: [B]`` follow the labels, the second in green where it is higher,
    in red where it is lower.  Raises ValueError if there is no image or a length does not fit.
    """
    left, right = _enlarged(before), _enlarged(after)
    _check_lengths(
        len(left),
        after=right,
        captions=captions,
        before_scores=before_scores,
        after_scores=after_scores,
    )
    font = _font(left[0].width)
    drawn, full = _captions(captions, 2 * left[0].width + MARGIN // 2, font)
    cells = []
    for i, pair in enumerate(zip(left, right, strict=True)):
        old = before_scores[i] if before_scores is not None else None
        new = after_scores[i] if after_scores is not None else None
        texts = (
            (_labelled(labels[0], old), GREY),
            (_labelled(labels[1], new), _change_color(old, new)),
        )
        cells.append(
            _Cell(
                images=list(pair),
                under=[
                    [TextLine(part, color) for part in _wrapped(text, pair[0].width, font)]
                    for text, color in texts
                ],
                caption=drawn[i],
            )
        )
    return _sheet(cells, columns, font, full)


def _labelled(label: str, score: float | None) -> str:
    return _drawable(label if score is None else f"{label} {_number(score, 2)}")


def _number(score: float, digits: int) -> str:
    return "no score" if math.isnan(score) else f"{score:.{digits}f}"


def _change_color(old: float | None, new: float | None) -> Color:
    """Green for a gain and red for a loss that two decimals show; grey otherwise."""
    if old is None or new is None or not abs(new - old) >= 0.005:
        return GREY
    return GAIN if new > old else LOSS


def _check_lengths(count: int, **sequences: Sequence | None) -> None:
    for name, sequence in sequences.items():
        if sequence is not None and len(sequence) != count:
            raise ValueError(f"{count} images but {len(sequence)} {name}")
