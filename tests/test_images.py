"""8-bit conversion and the grids that people look at."""

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_nft.images import Images, to_pil, to_uint8
from diffusion_nft.tracking.grids import full_captions, image_grid, save_grid, side_by_side

WHITE = (255, 255, 255)


def solid(count: int, value: float = 0.0, side: int = 48) -> Images:
    return Images.from_float(torch.full((count, 3, side, side), value))


def test_to_uint8_inverts_dividing_by_255_rounds_and_clamps():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert torch.equal(to_uint8(levels.double() / 255), levels)
    values = torch.tensor([-0.1, 0.0019, 0.0021, 0.9979, 1.7, -1e30])
    assert to_uint8(values).tolist() == [0, 0, 1, 254, 255, 0]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_values_that_8_bits_would_hide_are_refused_and_shown_as_blanks(value):
    images = torch.full((2, 3, 4, 6), 0.5)
    images[1, 2, 3, 5] = value
    with pytest.raises(ValueError, match="NaN or infinite"):
        to_pil(images)
    sound, blank = (rounded := Images.from_float(images)).to_pil()
    assert (sound.mode, blank.mode, blank.size) == ("RGB", "RGBA", (6, 4))
    assert blank.getextrema()[3] == (0, 0)
    grid = image_grid(rounded, ["", ""], columns=2, scores=[0.5, torch.nan])
    half = grid.width // 2
    colors = [
        grid.crop(box).getcolors(1 << 20) for box in ((0, 0, half, 150), (half, 0, 2 * half, 150))
    ]
    grey = [any(color == (128, 128, 128) for _, color in found) for found in colors]
    assert grey == [True, False]


def test_to_pil_keeps_orientation_and_channels():
    images = torch.zeros(2, 3, 4, 6)
    images[1, 0, 3, 5] = 1  # red, bottom right
    first, second = to_pil(images)
    assert first.size == (6, 4) and first.mode == "RGB"
    assert second.getpixel((5, 3)) == (255, 0, 0)
    assert np.asarray(first).max() == 0


def image_boxes(grid: Image.Image, color: tuple[int, int, int]) -> list[tuple[int, int, int]]:
    """(x, y, side) of every square of exactly ``color``, by scanning for their top left corners."""
    hit = (np.asarray(grid) == color).all(-1)
    padded = np.pad(hit, ((1, 0), (1, 0)))
    corners = np.argwhere(hit & ~padded[:-1, 1:] & ~padded[1:, :-1])
    boxes = []
    for y, x in corners:
        side = int(np.argmin(np.append(hit[y, x:], False)))
        if side > 100 and hit[y : y + side, x : x + side].all():
            boxes.append((int(x), int(y), side))
    return boxes


def test_grid_places_every_image_aligned_and_enlarged():
    grid = image_grid(solid(5), ["a red circle", "long " * 30, "x", "y", "z"], columns=3)
    boxes = image_boxes(grid, (0, 0, 0))
    assert [side for _, _, side in boxes] == [144] * 5
    assert len({y for _, y, _ in boxes}) == 2 and len({x for x, _, _ in boxes}) == 3
    assert grid.getpixel((0, 0)) == WHITE
    assert all(x + 144 < grid.width and y + 144 < grid.height for x, y, _ in boxes)


def test_enlarging_by_a_whole_factor_repeats_pixels():
    images = torch.zeros(1, 3, 48, 48)
    images[0, :, ::2, ::2] = 1
    grid = image_grid(Images.from_float(images), [""], columns=1)
    assert len(grid.getcolors(10_000)) == 3  # black, white and the frame: nothing interpolated


def test_captions_and_scores_take_room_and_ink():
    plain = image_grid(solid(1), [""], columns=1)
    caption = image_grid(solid(1), ["one two three four five six seven eight"], columns=1)
    both = image_grid(solid(1), ["one two three four five six seven eight"], columns=1, scores=[1])
    assert plain.height < caption.height < both.height
    below = np.asarray(caption)[12 + 144 + 2 :]
    columns_with_ink = np.argwhere((below < 128).all(-1).any(0)).ravel()
    assert columns_with_ink.min() >= 12 and columns_with_ink.max() < 12 + 144


FOREIGN = [
    "a red circle → here",
    "一只 戴帽子的猫",
    "قطة",
    "a cat \U0001f600",
    "café",
    "word " * 60,
]


@pytest.mark.parametrize(
    "grid",
    [
        image_grid(solid(6), FOREIGN, columns=2),
        side_by_side(solid(6), solid(6), FOREIGN, columns=2),
    ],
)
def test_captions_that_cannot_be_drawn_are_saved_next_to_the_grid_by_number(grid, tmp_path):
    """The bundled font has ASCII alone, and a caption has four lines."""
    path = tmp_path / "new" / "grid.png"
    save_grid(grid, path)
    texts = [f"{i}: {text.strip()}" for i, text in enumerate(FOREIGN, start=1)]
    assert (path.with_suffix(".txt")).read_text(encoding="utf-8").splitlines() == texts
    save_grid(image_grid(solid(1), ["a red circle"], columns=1), path)
    assert [file.name for file in path.parent.iterdir()] == ["grid.png"]


def test_a_caption_that_is_not_shown_in_full_has_its_number():
    def drawn(*captions: str) -> bytes:
        return image_grid(solid(len(captions)), captions, columns=9).tobytes()

    assert drawn("x", "一只猫 三") == drawn("x", "Ж")  # one box stands for all of them
    assert drawn("x", "Ж") != drawn("x", "2: ")
    assert drawn("x", "café") == drawn("x", "2: cafe")
    assert drawn("x", "cafe") != drawn("x", "2: cafe")
    assert full_captions(image_grid(solid(2), ["x", "“cafe” – here"], columns=2)) == ""


def test_large_images_stay_as_they_are():
    large = image_grid(solid(1, side=256), ["a"], columns=1)
    assert image_boxes(large, (0, 0, 0))[0][2] == 256


def test_side_by_side_shows_both_images_and_colours_the_change():
    green, red = (24, 128, 56), (190, 40, 35)

    def colors(before: float, after: float) -> set:
        sheet = side_by_side(solid(1), solid(1, 0.2), ["a"], [before], [after])
        assert len(image_boxes(sheet, (0, 0, 0))) == 1
        assert len(image_boxes(sheet, (51, 51, 51))) == 1
        return {color for _, color in sheet.getcolors(100_000)}

    up, down, same = colors(0.1, 0.9), colors(0.9, 0.1), colors(0.5, 0.501)
    assert green in up and red not in up
    assert red in down and green not in down
    assert not {red, green} & same
    assert not {red, green} & colors(0.5, float("nan"))


def test_wrong_lengths_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        image_grid(Images.concatenate([]), [], columns=2)
    for draw in (
        lambda: image_grid(solid(2), ["a"], columns=2),
        lambda: side_by_side(solid(2), solid(1), ["a", "b"]),
    ):
        with pytest.raises(ValueError, match="zip"):
            draw()
