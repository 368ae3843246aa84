"""Requests to the models that read bytes and sentences, with the known results."""

from __future__ import annotations

import argparse
import inspect
import json
from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from clockwork_lab.demo import wheels
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import Judgement, Send, Tensors, cosine

TOKENS = 32
"""Length to which sentences are padded."""

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
