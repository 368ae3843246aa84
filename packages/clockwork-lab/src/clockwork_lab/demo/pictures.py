"""Converts pictures to inputs of the demo's models, with Pillow."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

Floats = npt.NDArray[np.float32]


def square(content: bytes, side: int = 224, *, mirrored: bool = False) -> Floats:
    """The middle square of a picture, bicubic to ``side``, RGB in 0..1, shape [3, side, side]."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    if mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    middle = picture.crop((left, top, left + edge, top + edge))
    return _channels_first(middle.resize((side, side), Image.Resampling.BICUBIC))


def page(content: bytes, height: int, width: int) -> Floats:
    """A whole picture, bilinear to [3, height, width], scaled to -1..1 as the text models want it."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB").resize((width, height), Image.Resampling.BILINEAR)
    return (_channels_first(picture) - 0.5) / np.float32(0.5)


def text_line(
    content: bytes, box: tuple[int, int, int, int], height: int, width: int, *, upside_down: bool = False
) -> Floats:
    """The line of text in ``box`` (left, top, right, bottom), ``height`` high, zeros to its right.

    Shape [3, height, width], scaled to -1..1; a line too long for ``width`` is narrowed.
    """
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB").crop(box)
    if upside_down:
        picture = picture.transpose(Image.Transpose.ROTATE_180)
    used = min(width, max(1, round(picture.width * height / picture.height)))
    line = np.zeros((3, height, width), np.float32)
    scaled = picture.resize((used, height), Image.Resampling.BILINEAR)
    line[:, :, :used] = (_channels_first(scaled) - 0.5) / np.float32(0.5)
    return line


def _channels_first(picture: Image.Image) -> Floats:
    values = np.asarray(picture, np.float32) / np.float32(255)
    return np.ascontiguousarray(values.transpose(2, 0, 1))
