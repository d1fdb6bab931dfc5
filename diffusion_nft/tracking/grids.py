"""Labelled grids of images."""

import math
import re
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from diffusion_nft.images import Images, save_png
from diffusion_nft.utils.files import naming, write_atomically

# Images with a shorter side than this, in pixels, are enlarged by an integer factor.
READABLE_SIDE = 144
MARGIN, PAIR_GAP, CELL_GAP = 11, 6, 16
LINE_SPACING = 1.3
MAX_CAPTION_LINES = 4
# Longest part of a caption that is laid out, in characters.
MAX_CAPTION = 2000

# Pillow's bundled font covers little more than ASCII.  These characters are replaced, accents are
# removed, and a run of other characters becomes BOX, which is drawn as an empty box.
REPLACEMENTS = str.maketrans(
    {"→": "->", "·": "-", "–": "-", "—": "-", "“": '"', "”": '"', "‘": "'", "’": "'"}
)
BOX = "\ufffd"

# Key of ``Image.info`` for the captions of a grid that shortens some of them.
CAPTIONS = "captions"

WHITE, INK, GREY, FRAME = (255, 255, 255), (32, 33, 36), (110, 113, 118), (205, 208, 212)
GAIN, LOSS = (24, 128, 56), (190, 40, 35)

Color = tuple[int, int, int]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def save_grid(grid: Image.Image, path: Path) -> None:
    """Writes ``path``, and ``full_captions``, if any, to a ``.txt`` file of the same name."""
    text_file, captions = path.with_suffix(".txt"), full_captions(grid)
    with naming(text_file):
        path.parent.mkdir(parents=True, exist_ok=True)
        text_file.unlink(missing_ok=True)
    if captions:
        write_atomically(text_file, f"{captions}\n".encode())
    save_png(grid, path)


def full_captions(grid: Image.Image) -> str:
    """The numbered captions of ``grid``, one per line; empty if none is shortened."""
    return grid.info.get(CAPTIONS, "")


def _enlarged(images: Images) -> list[Image.Image]:
    """Images with sides of at least READABLE_SIDE, by repeating pixels."""
    if len(images) == 0:
        raise ValueError("a grid needs at least one image")
    pil_images = images.to_pil()
    width, height = pil_images[0].size
    factor = math.ceil(READABLE_SIDE / min(width, height))
    size = (width * factor, height * factor)
    return [image.resize(size, Image.Resampling.NEAREST) for image in pil_images]


def _font(cell_width: int) -> Font:
    """Pillow's bundled font in a size for images ``cell_width`` pixels wide."""
    return ImageFont.load_default(min(28, max(13, cell_width // 18)))


def _wrapped(text: str, width: float, font: Font) -> list[str]:
    """Lines of ``text``, each at most ``width`` pixels; shortened text ends in an ellipsis."""
    plain = unicodedata.normalize("NFKD", text[:MAX_CAPTION].translate(REPLACEMENTS))
    plain = "".join(char for char in plain if not unicodedata.combining(char))
    plain = re.sub(r"[^\s!-~]+(\s+[^\s!-~]+)*", BOX, plain)
    # As many characters per line as fit in the widest line.
    count = int(2 * len(plain) * width / (font.getlength(plain) or 1.0))
    while True:
        lines = textwrap.wrap(plain, max(count, 4), max_lines=MAX_CAPTION_LINES, placeholder="...")
        if count <= 4 or all(font.getlength(line) <= width for line in lines):
            return lines
        count -= 1


def _captions(texts: Sequence[str], width: float, font: Font) -> tuple[list[list[str]], str]:
    """Lines of each of ``texts``, and ``full_captions``.  A text that is not drawn in full starts
    with its number there.
    """
    drawn, incomplete = [], False
    numbered = [f"{number}: {' '.join(text.split())}" for number, text in enumerate(texts, start=1)]
    for text, with_number in zip(texts, numbered, strict=True):
        lines = _wrapped(text, width, font)
        if "".join("".join(lines).split()) != "".join(text.translate(REPLACEMENTS).split()):
            incomplete = True
            lines = _wrapped(with_number, width, font)
        drawn.append(lines)
    return drawn, "\n".join(numbered) if incomplete else ""


def _cell(
    images: Sequence[Image.Image],
    labels: Sequence[tuple[list[str], Color]],
    caption: list[str],
    font: Font,
) -> Image.Image:
    """Framed images side by side, each with coloured label lines below, above a caption."""
    _, top, _, bottom = font.getbbox("Ay")
    line = math.ceil((bottom - top) * LINE_SPACING)
    label_lines = max(len(lines) for lines, _ in labels)
    width = sum(image.width + PAIR_GAP for image in images) - PAIR_GAP + 2
    text_top = images[0].height + 2 + MARGIN // 2
    height = text_top + (label_lines + len(caption)) * line
    cell = Image.new("RGB", (width, height), WHITE)
    pen, x = ImageDraw.Draw(cell), 0

    def write(lines: list[str], middle: int, y: int, color: Color) -> None:
        for i, text in enumerate(lines):
            pen.text((middle, y + i * line), text, color, font, anchor="ma")

    for image, (lines, color) in zip(images, labels, strict=True):
        pen.rectangle((x, 0, x + image.width + 1, image.height + 1), outline=FRAME)
        cell.paste(image, (x + 1, 1), image if image.mode == "RGBA" else None)
        write(lines, x + 1 + image.width // 2, text_top, color)
        x += image.width + PAIR_GAP
    write(caption, width // 2, text_top + label_lines * line, INK)
    return cell


def _sheet(cells: list[Image.Image], columns: int, captions: str) -> Image.Image:
    """Rows of ``columns`` cells on white; ``captions`` are the sheet's ``full_captions``."""
    rows = [cells[i : i + columns] for i in range(0, len(cells), columns)]
    heights = [max(cell.height for cell in row) + CELL_GAP for row in rows]
    width = len(rows[0]) * (cells[0].width + CELL_GAP) - CELL_GAP
    size = (width + 2 * MARGIN, sum(heights) - CELL_GAP + 2 * MARGIN)
    sheet, y = Image.new("RGB", size, WHITE), MARGIN
    for row, height in zip(rows, heights, strict=True):
        for i, cell in enumerate(row):
            sheet.paste(cell, (MARGIN + i * (cell.width + CELL_GAP), y))
        y += height
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

    ``scores: [B]`` adds a line with the score.  Small images are enlarged to at least 144 px.
    A caption that is not drawn in full starts with its number in ``full_captions``.
    Raises ValueError without images or if lengths differ.
    """
    pil_images = _enlarged(images)
    width = pil_images[0].width
    font = _font(width)
    drawn, full = _captions(captions, width, font)
    labels = [[]] * len(images) if scores is None else [[_number(s, 3)] for s in scores]
    cells = [
        _cell([image], [(label, GREY)], caption, font)
        for image, label, caption in zip(pil_images, labels, drawn, strict=True)
    ]
    return _sheet(cells, columns, full)


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
    """Labelled pairs of images of the same prompts, ``columns`` pairs per row, with captions as in
    ``image_grid``.

    ``before_scores, after_scores: [B]`` follow the labels, the second in green if higher and in red
    if lower.  Raises ValueError without images or if lengths differ.
    """
    pairs = list(zip(_enlarged(before), _enlarged(after), strict=True))
    width = pairs[0][0].width
    font = _font(width)
    drawn, full = _captions(captions, 2 * width + PAIR_GAP, font)
    old, new = (
        [None] * len(pairs) if scores is None else scores
        for scores in (before_scores, after_scores)
    )
    cells = [
        _cell(
            pair,
            [
                (_wrapped(_labelled(labels[0], a), width, font), GREY),
                (_wrapped(_labelled(labels[1], b), width, font), _change_color(a, b)),
            ],
            caption,
            font,
        )
        for pair, a, b, caption in zip(pairs, old, new, drawn, strict=True)
    ]
    return _sheet(cells, columns, full)


def _labelled(label: str, score: float | None) -> str:
    return label if score is None else f"{label} {_number(score, 2)}"


def _number(score: float, digits: int) -> str:
    return "no score" if math.isnan(score) else f"{score:.{digits}f}"


def _change_color(old: float | None, new: float | None) -> Color:
    """Green for a gain and red for a loss of at least 0.005; grey otherwise."""
    if old is None or new is None or not abs(new - old) >= 0.005:
        return GREY
    return GAIN if new > old else LOSS
