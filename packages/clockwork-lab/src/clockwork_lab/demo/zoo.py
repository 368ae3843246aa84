"""The demo's models: where each comes from, how it is served, and its requests."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from clockwork_lab.demo import graphs, sights, sounds, wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.graphs import read_safetensors, read_torch
from clockwork_lab.demo.judgement import Judgement, Send, Tensors, cosine

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


# ------------------------------------------------------------
# Requests to the models that read bytes and sentences, with the known results.


TOKENS = 32  # length to which sentences are padded

HEAD, BLOCK, PADDING = 1024, 4096, 256
"""Magika's input: the number of bytes of the first and last block, and the value for 'no byte'."""

SENTENCES = (
    "A man is eating food.",
    "A man is eating a piece of bread.",
    "A cheetah chases prey across a field.",
)


def file_type(files: Files, send: Send) -> Judgement:
    """The types of five real files, from their bytes alone."""
    labels = json.loads(files.read(wheels.MAGIKA_LABELS))["target_labels_space"]
    contents = (
        ("png", files.read(wheels.CHELSEA)),
        ("jpeg", files.read(wheels.ROCKET)),
        ("wav", files.read(wheels.READY)),
        ("python", Path(inspect.getfile(argparse)).read_bytes()),
        ("json", files.read(wheels.MINILM_TOKENS)),
    )
    results = [labels[int(send(magika_input(c))["target_label"][0].argmax())] for _, c in contents]
    return Judgement(", ".join(results), results == [name for name, _ in contents])


def magika_input(content: bytes) -> Tensors:
    """The beginning and the end of a file as Magika's input: ``bytes`` i32 [1, 2048]."""
    head = content[:BLOCK].lstrip()[:HEAD]
    tail = content[-BLOCK:].rstrip()[-HEAD:]
    values = np.full(2 * HEAD, PADDING, np.int32)
    values[: len(head)] = np.frombuffer(head, np.uint8)
    values[2 * HEAD - len(tail) :] = np.frombuffer(tail, np.uint8)
    return {"bytes": values[None]}


def sentences(files: Files, send: Send) -> Judgement:
    """Whether two sentences about eating are closer to each other than to one about a cheetah."""
    first, near, far = (send(sentence_input(files, text))["sentence_embedding"][0] for text in SENTENCES)
    alike, unlike = cosine(first, near), cosine(first, far)
    good = abs(alike - 0.755) < 0.005 and abs(unlike - 0.129) < 0.005
    return Judgement(f'"eating food": "eating bread" {alike:.3f}, "cheetah" {unlike:.3f}', good)


def sentence_input(files: Files, text: str) -> Tensors:
    """``input_ids`` and ``attention_mask``, i64 [1, TOKENS]."""
    encoded = _tokenizer(str(files.path(wheels.MINILM_TOKENS))).encode(text)
    return {
        "input_ids": np.array([encoded.ids], np.int64),
        "attention_mask": np.array([encoded.attention_mask], np.int64),
    }


@cache
def _tokenizer(path: str) -> Tokenizer:
    tokenizer = Tokenizer.from_file(path)
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS)
    return tokenizer


# ------------------------------------------------------------
# All models.


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
        _as_it_is(wheels.MAGIKA), file_type, 24, 4, {"bytes": (2048,)},
    ),
    DemoModel(
        "minilm", "text embedding", (wheels.MINILM, wheels.MINILM_TOKENS), _minilm,
        sentences, 1, 4, {"input_ids": (TOKENS,), "attention_mask": (TOKENS,)},
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


def available(files: Files) -> tuple[DemoModel, ...]:
    """The models all of whose files are present."""
    return tuple(model for model in MODELS if files.present().issuperset(model.needs))
