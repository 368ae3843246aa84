"""Programs for tests of torch models: small, with random weights, statistics of normalisations too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (make test installs it where it can)")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)")

BATCH = torch.export.Dim("batch", min=1, max=64)


class Encoder(torch.nn.Module):
    """A transformer encoder over token ids, with attention written as one operator."""

    def __init__(self, words=50, width=32, depth=2):
        super().__init__()
        self.words = torch.nn.Embedding(words, width)
        self.places = torch.nn.Parameter(torch.randn(12, width) * 0.1)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = torch.nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = torch.nn.Linear(width, 5)

    def forward(self, ids, mask):
        seen = self.encoder(self.words(ids) + self.places, src_key_padding_mask=mask == 0)
        return {"logits": self.head(seen[:, 0]), "hidden": seen}


class Recurrent(torch.nn.Module):
    """An LSTM over frames, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.lstm = torch.nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = torch.nn.Linear(24, 7)

    def forward(self, frames):
        seen, _ = self.lstm(frames)
        return self.head(seen[:, -1])


class Small(torch.nn.Module):
    """A convolution with a normalisation, a linear layer, and a constant: compiles in seconds."""

    def __init__(self, width=4, scale=2.0):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, width, 3, bias=False)
        self.norm = torch.nn.BatchNorm2d(width)
        self.head = torch.nn.Linear(width, 5)
        self.scale = scale

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.conv(x))).mean((2, 3))) * self.scale


def shaken(model, seed=0):
    """The model for inference, its normalisations with random statistics."""
    torch.manual_seed(seed)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2)
            part.weight.data.uniform_(0.5, 1.5)
            part.bias.data.normal_()
    return model.eval()


def small(seed=0, **options):
    """A small model whose weights depend on ``seed``."""
    torch.manual_seed(seed)
    return shaken(Small(**options), seed)


def vision(name, seed=0):
    """A model of torchvision with random weights."""
    models = _vision()
    torch.manual_seed(seed)
    return shaken(getattr(models, name)(weights=None), seed)


def mobilenet(seed=0):
    """A MobileNetV3 of torchvision with one block of each kind, where the published ones repeat them."""
    found = _vision().mobilenetv3
    blocks = [
        found.InvertedResidualConfig(*block, 1, 1.0)
        for block in (
            (16, 3, 16, 16, True, "RE", 2),
            (16, 3, 72, 24, False, "RE", 2),
            (24, 5, 96, 24, True, "HS", 1),
        )
    ]
    torch.manual_seed(seed)
    return shaken(found.MobileNetV3(blocks, 64, num_classes=16), seed)


def _vision():
    return pytest.importorskip("torchvision", reason="torchvision is not installed").models


def exported(model, *inputs, dynamic=True):
    """The program of a model; ``dynamic``: axis 0 of every input is the batch."""
    shapes = tuple({0: BATCH} for _ in inputs) if dynamic is True else dynamic or None
    return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes)


def put(root: Path, name: str, program, *, toml: str | None = None, version=1) -> Path:
    """A program in a repository; its file."""
    folder = root / name / str(version)
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, folder / "model.pt2")
    if toml is not None:
        (folder.parent / "clockwork.toml").write_text(toml)
    return folder / "model.pt2"
