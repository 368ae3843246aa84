"""Requests to the vision models, with their pictures and the known content."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import onnx
from PIL import Image

from clockwork_lab.demo import wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import Judgement, Send, cosine

Floats = npt.NDArray[np.float32]

LABELS = {
    285: "Egyptian cat",
    967: "espresso",
    657: "missile",
    281: "tabby",
    282: "tiger cat",
    504: "coffee mug",
}
"""Classes of ImageNet that may be the result for the demo's pictures."""

MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
DEVIATION = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
"""Mean and deviation of ImageNet's pictures, by colour."""

LINES = ((8, 12, 142, 34), (145, 10, 290, 34), (0, 114, 180, 132))
"""Where text is on the page: left, top, right, bottom in pixels."""

PAGE_SIZE = (192, 384)
LINE_SIZE = (48, 320)
ANGLE_SIZE = (48, 192)


def classify(files: Files, send: Send) -> Judgement:
    """Classify three photographs."""
    results = []
    for member in (wheels.CHELSEA, wheels.COFFEE, wheels.ROCKET):
        picture = (square(files.read(member)) - np.float32(127 / 255)) / np.float32(128 / 255)
        logits = send({"image": picture[None]})["logits"][0].astype(np.float64)
        best = int(logits.argmax())
        share = np.exp(logits[best] - logits.max()) / np.exp(logits - logits.max()).sum()
        results.append((best, f"{LABELS.get(best, f'class {best}')} {share:.0%}"))
    return Judgement(", ".join(text for _, text in results), [best for best, _ in results] == [285, 967, 657])


def compare(files: Files, send: Send) -> Judgement:
    """Whether two views of one motorcycle are more similar than a motorcycle and a cat."""

    def feature(member: str) -> Floats:
        picture = (square(files.read(member)) - MEAN) / DEVIATION
        return np.asarray(send({"image": picture[None]})["feature"][0])

    left, right = feature(wheels.MOTORCYCLE_LEFT), feature(wheels.MOTORCYCLE_RIGHT)
    same, other = cosine(left, right), cosine(left, feature(wheels.CHELSEA))
    return Judgement(
        f"motorcycle, two eyes: {same:.2f}; motorcycle, cat: {other:.2f}", same > 0.9 and other < 0.6
    )


def find_text(files: Files, send: Send) -> Judgement:
    """Count the lines of text on a photographed page (there are seven)."""
    height, width = PAGE_SIZE
    found = send({"x": page(files.read(wheels.PAGE), height, width)[None]})["fetch_name_0"][0, 0] > 0.3
    rows = found.mean(axis=1) > 0.02
    lines = int(np.count_nonzero(np.diff(rows.astype(np.int8), prepend=0) == 1))
    return Judgement(f"{lines} lines of text on a photographed page", lines == 7)


def read_text(files: Files, send: Send) -> Judgement:
    """Read three pieces of text of the page."""
    characters = _characters(files)
    content = files.read(wheels.PAGE)
    results = []
    for box in LINES:
        scores = send({"x": text_line(content, box, *LINE_SIZE)[None]})["fetch_name_0"][0]
        results.append(_decode(scores, characters))
    answer = " | ".join(results)
    return Judgement(answer, answer == "Region-based | segmentation | histogram of grey values:")


def _characters(files: Files) -> list[str]:
    """The alphabet in the model's metadata; index 0 is the blank between characters."""
    model = onnx.load(files.path(wheels.OCR_READ), load_external_data=False)
    listed = next(entry.value for entry in model.metadata_props if entry.key == "character")
    return ["", *listed.splitlines(), " "]


def _decode(scores: Floats, characters: list[str]) -> str:
    """The best class of each column, without repetitions and blanks."""
    best = scores.argmax(axis=1)
    fresh = best[np.diff(best, prepend=-1) != 0]
    return "".join(characters[index] if index < len(characters) else "?" for index in fresh)


def text_angle(files: Files, send: Send) -> Judgement:
    """Tell which of a line and the same line rotated by 180 degrees is upside down."""
    content = files.read(wheels.PAGE)
    angles = []
    for turned in (False, True):
        line = text_line(content, LINES[0], *ANGLE_SIZE, upside_down=turned)
        angles.append(180 * int(send({"x": line[None]})["save_infer_model/scale_0.tmp_1"][0].argmax()))
    return Judgement(f"as it is: {angles[0]}°, turned: {angles[1]}°", angles == [0, 180])


# ------------------------------------------------------------
# Pictures as inputs of the models, with Pillow.


SIDE = 224


def square(content: bytes) -> Floats:
    """The middle square of a picture, bicubic, RGB in 0..1, shape [3, SIDE, SIDE]."""
    with Image.open(io.BytesIO(content)) as opened:
        picture = opened.convert("RGB")
    edge = min(picture.size)
    left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
    middle = picture.crop((left, top, left + edge, top + edge))
    return _channels_first(middle.resize((SIDE, SIDE), Image.Resampling.BICUBIC))


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
