"""The demo's models: where each comes from, how it is served, and its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from clockwork_lab.demo import graphs, sights, sounds, texts, wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.graphs import read_safetensors, read_torch
from clockwork_lab.demo.judgement import Judgement, Send

Dims = dict[str, tuple[int, ...]]
Ask = Callable[[Files, Send], Judgement]

EXACT = 1e-5
RECURRENT = 5e-4
"""Relative error allowed against a plain session; recurrent models' fused kernels differ more."""


@dataclass(frozen=True, slots=True)
class DemoModel:
    """One model of the demo.

    ``build`` makes the ONNX file from the fetched ``needs``. ``dims`` are the shapes to declare (batch left
    out) where the file leaves them open. ``max_batch_size`` 0: the model has no batch axis, or not as its
    first. ``instances`` is how many models are registered: this one and copies with other weights.
    """

    name: str
    kind: str
    needs: tuple[str, ...]
    build: Callable[[Files], bytes]
    ask: Ask
    instances: int
    max_batch_size: int
    dims: Dims
    tolerance: float = EXACT


def _as_it_is(member: str) -> Callable[[Files], bytes]:
    return lambda files: files.read(member)


def _efficientnet(files: Files) -> bytes:
    return graphs.efficientnet_lite0(read_torch(files.read(wheels.EFFICIENTNET))).SerializeToString()


def _mobilenet(files: Files) -> bytes:
    return graphs.mobilenet_v2(read_torch(files.read(wheels.MOBILENET))).SerializeToString()


def _minilm(files: Files) -> bytes:
    return graphs.minilm_l6(read_safetensors(files.read(wheels.MINILM))).SerializeToString()


MODELS: tuple[DemoModel, ...] = (
    DemoModel(
        "ocr_detect", "text detection", (wheels.OCR_DETECT, wheels.PAGE), _as_it_is(wheels.OCR_DETECT),
        sights.find_text, 6, 2, {"x": (3, *sights.PAGE_SIZE)},
    ),
    DemoModel(
        "ocr_read", "text recognition", (wheels.OCR_READ, wheels.PAGE), _as_it_is(wheels.OCR_READ),
        sights.read_text, 4, 2, {"x": (3, *sights.LINE_SIZE)},
    ),
    DemoModel(
        "ocr_angle", "text orientation", (wheels.OCR_ANGLE, wheels.PAGE), _as_it_is(wheels.OCR_ANGLE),
        sights.text_angle, 28, 4, {"x": (3, *sights.ANGLE_SIZE)},
    ),
    DemoModel(
        "efficientnet", "image classification",
        (wheels.EFFICIENTNET, wheels.CHELSEA, wheels.COFFEE, wheels.ROCKET), _efficientnet,
        sights.classify, 6, 4, {},
    ),
    DemoModel(
        "mobilenet", "image embedding",
        (wheels.MOBILENET, wheels.MOTORCYCLE_LEFT, wheels.MOTORCYCLE_RIGHT, wheels.CHELSEA), _mobilenet,
        sights.compare, 10, 4, {},
    ),
    DemoModel(
        "magika", "file type",
        (
            wheels.MAGIKA, wheels.MAGIKA_LABELS, wheels.CHELSEA, wheels.ROCKET, wheels.READY,
            wheels.MINILM_TOKENS,
        ),
        _as_it_is(wheels.MAGIKA), texts.file_type, 24, 4, {"bytes": (2048,)},
    ),
    DemoModel(
        "minilm", "text embedding", (wheels.MINILM, wheels.MINILM_TOKENS), _minilm,
        texts.sentences, 1, 4, {"input_ids": (texts.TOKENS,), "attention_mask": (texts.TOKENS,)},
    ),
    DemoModel(
        "silero_vad", "voice activity", (wheels.SILERO, wheels.READY), _as_it_is(wheels.SILERO),
        sounds.voice_activity, 36, 0,
        {"input": (1, sounds.FRAME + sounds.CONTEXT), "state": (2, 1, 128), "sr": ()}, RECURRENT,
    ),
    DemoModel(
        "smart_turn", "end of turn", (wheels.SMART_TURN, wheels.READY), _as_it_is(wheels.SMART_TURN),
        sounds.end_of_turn, 4, 2, {},
    ),
    DemoModel(
        "dnsmos", "speech quality", (wheels.DNSMOS, wheels.READY), _as_it_is(wheels.DNSMOS),
        sounds.quality, 28, 4, {},
    ),
    DemoModel(
        "plcmos", "lost packets", (wheels.PLCMOS, wheels.READY), _as_it_is(wheels.PLCMOS),
        sounds.lost_packets, 36, 0, {"degraded_audio": (1, 1, 314, 257), "rater_embed": (1, 64)}, RECURRENT,
    ),
    DemoModel(
        "basic_pitch", "music to notes", (wheels.BASIC_PITCH,), _as_it_is(wheels.BASIC_PITCH),
        sounds.notes, 24, 2, {},
    ),
    DemoModel(
        "swift_f0", "pitch", (wheels.SWIFT_F0,), _as_it_is(wheels.SWIFT_F0),
        sounds.pitch, 24, 0, {"audio": (1, sounds.PITCH_SAMPLES), "fmin": (), "fmax": ()},
    ),
)  # fmt: skip
"""All models, in the order of the screen; ``instances`` add up to 231."""


def available(files: Files, models: tuple[DemoModel, ...] = MODELS) -> tuple[DemoModel, ...]:
    """The models all of whose files are present."""
    present = files.present()
    return tuple(model for model in models if present.issuperset(model.needs))
