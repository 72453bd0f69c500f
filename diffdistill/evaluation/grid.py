"""Pictures to look at: a plain grid of images, and a labelled sheet that compares rows of them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffdistill.evaluation.metrics import quantise

INK = (32, 32, 36)
PAPER = (255, 255, 255)


def _tiles(images: Tensor, scale: int) -> Tensor:
    """uint8 (N, H * scale, W * scale, 3) from images (N, 3, H, W) in [-1, 1], every pixel a square of scale x scale."""
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"images must be (N, 3, H, W) with N >= 1, got {tuple(images.shape)}")
    if scale < 1:
        raise ValueError(f"scale must be at least 1, got {scale}; it is the side of one pixel in the picture")
    levels = ((quantise(images.detach().cpu()) + 1) * 127.5).round().to(torch.uint8)
    return levels.movedim(1, -1).repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _paste(page: Image.Image, tiles: Tensor, columns: int, corner: tuple[int, int], pitch: tuple[int, int]):
    """Draws tiles (N, H, W, 3) row by row, the first at the corner (left, top), the next ones a pitch (x, y) apart."""
    for place, tile in enumerate(tiles):
        row, column = divmod(place, columns)
        page.paste(Image.fromarray(tile.numpy()), (corner[0] + column * pitch[0], corner[1] + row * pitch[1]))


def _wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Text broken at spaces, so that each line is at most width pixels where words allow it."""
    lines = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def image_grid(images: Tensor, columns: int, scale: int) -> Image.Image:
    """Images row by row on white, a hair's breadth apart.

    Args:
        images: float (N, 3, H, W) in [-1, 1]; the last row may stay short.
        columns: images in a row.
        scale: pixels of the picture per pixel of an image, along each side.
    Raises:
        ValueError: another shape, a pixel that is not finite, or columns or scale below 1.
    """
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    tiles, gap = _tiles(images, scale), scale
    num, height, width, _ = tiles.shape
    rows = ceil(num / columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), PAPER)
    _paste(page, tiles, columns, (0, 0), (width + gap, height + gap))
    return page


def comparison_sheet(rows: Sequence[tuple[str, Tensor]], titles: Sequence[str], scale: int) -> Image.Image:
    """Rows of images with their labels at the left and a title above each column, dark on white.

    Args:
        rows: (label, images (N, 3, H, W) in [-1, 1]) each. N is len(titles), or a multiple of it: then the images fill
            several lines beside the one label. Labels may have newlines.
        titles: one for each column; broken at spaces where they are wider than an image.
        scale: pixels of the picture per pixel of an image, along each side.
    Raises:
        ValueError: there is no row or no title, or a row's images do not fill its lines or differ in size.
    """
    if not rows or not titles:
        raise ValueError(f"a sheet needs at least one row and one title, got {len(rows)} and {len(titles)}")
    tiles = [(label, _tiles(images, scale)) for label, images in rows]
    _, height, width, _ = tiles[0][1].shape
    for label, each in tiles:
        if len(each) % len(titles) or each.shape[1:] != tiles[0][1].shape[1:]:
            raise ValueError(
                f"row {label!r} has {len(each)} images {tuple(each.shape[1:3])}, and the sheet {len(titles)} columns "
                f"of {(height, width)}; give a multiple of the columns, all of one size"
            )
    size = max(13, width // 6)
    font, gap = ImageFont.load_default(size=size), max(2, size // 6)
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    titles = [_wrapped(title, font, width) for title in titles]

    def extent(text: str) -> tuple[int, int]:
        box = measure.multiline_textbbox((0, 0), text, font=font, spacing=gap)
        return ceil(box[2]), ceil(box[3])

    margin = size
    column_width = max(width, *(extent(title)[0] for title in titles)) + gap
    left = margin + max(extent(label)[0] for label, _ in tiles) + margin
    top = margin + max(extent(title)[1] for title in titles) + gap * 2
    lines = [len(each) // len(titles) for _, each in tiles]
    blocks = [
        max(count * (height + gap) - gap, extent(label)[1]) for count, (label, _) in zip(lines, tiles, strict=True)
    ]
    page_height = top + sum(blocks) + size * (len(blocks) - 1) + margin
    page = Image.new("RGB", (left + len(titles) * column_width - gap + margin, page_height), PAPER)
    draw = ImageDraw.Draw(page)
    for column, title in enumerate(titles):
        middle = left + column * column_width + (column_width - gap) / 2
        draw.multiline_text((middle, top - 2 * gap), title, INK, font, anchor="md", spacing=gap, align="center")
    for (label, each), block in zip(tiles, blocks, strict=True):
        draw.multiline_text((left - margin, top + block / 2), label, INK, font, anchor="rm", spacing=gap, align="right")
        indent = (column_width - gap - width) // 2
        _paste(page, each, len(titles), (left + indent, top), (column_width, height + gap))
        top += block + size
    return page
