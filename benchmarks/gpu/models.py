"""Networks for the GPU benchmark, made on the spot with random weights, and written as ``model.pt2``.

They are the published architectures (parameter for parameter in their long forms), so that nothing has to be
fetched; the small forms have the same layers, narrower and fewer. Needs torch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn
from torch.nn import functional

Tensor = Any
FOLDER: Final = "1"
FILE: Final = "model.pt2"


@dataclass(frozen=True, slots=True)
class Kind:
    """A network: ``rows`` makes so many rows of input from a seed. ``error`` is the most allowed.

    Errors are max|a-b| / max|b| against double precision. Float32 makes 2e-5 of it at most; TF32, which
    torch uses for convolutions unless told not to, about 1e-3.
    """

    name: str
    build: Callable[[], Any]
    shape: tuple[int, ...]
    error: float = 1e-4

    def rows(self, count: int, seed: int) -> Tensor:
        """Inputs, the same for the same seed."""
        return torch.randn(count, *self.shape, generator=torch.Generator().manual_seed(seed))


def kinds(*, short: bool) -> dict[str, Kind]:
    """The four networks, by name; ``short``: small ones."""
    if short:
        made = (
            Kind("resnet50", lambda: ResNet(width=8, depths=(1, 1), classes=24), (3, 32, 32)),
            Kind("mobilenet_v3", lambda: MobileNetV3(SMALL_BLOCKS[:3], last=64, classes=16), (3, 32, 32)),
            Kind("encoder", lambda: Encoder(width=32, heads=4, depth=2, classes=8), (16, 32)),
            Kind("lstm", lambda: Lstm(width=16, depth=1, classes=8), (8, 16), error=5e-4),
        )
    else:
        made = (
            Kind("resnet50", ResNet, (3, 224, 224)),
            Kind("mobilenet_v3", MobileNetV3, (3, 224, 224)),
            Kind("encoder", Encoder, (128, 512)),
            Kind("lstm", Lstm, (32, 256), error=5e-4),
        )
    return {kind.name: kind for kind in made}


def built(kind: Kind, seed: int) -> Any:
    """A network whose tensors all differ, in the state in which it is served."""
    torch.manual_seed(seed)
    model = kind.build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.normal_(module.bias, std=0.1)
            module.momentum = None  # so that statistics become those of the next pass
    with torch.no_grad():
        model.train()(kind.rows(2, seed))
    return model.eval()


def exported(kind: Kind, model: Any, largest: int) -> Any:
    """Its program for batches of 1 to ``largest``."""
    batch = torch.export.Dim("batch", min=1, max=max(2, largest))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch complains about its own LSTM
        return torch.export.export(model, (kind.rows(2, 0),), dynamic_shapes=({0: batch},))


def write(root: Path, name: str, program: Any, largest: int) -> None:
    """Put a program into a model repository, unless one is there."""
    path = root / name / FOLDER / FILE
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    (root / name / "clockwork.toml").write_text(f"max_batch_size = {largest}\n")
    draft = path.with_suffix(".part")
    with open(draft, "wb") as file:
        torch.export.save(program, file)
    draft.rename(path)


def restated(program: Any, model: Any) -> Any:
    """The same program with the weights of another model of its kind: exporting again would take seconds.

    A program shares memory with the model that it was exported from, which is overwritten, too.
    """
    for name, tensor in model.state_dict().items():
        if name in program.state_dict:
            program.state_dict[name].data.copy_(tensor)
    return program


def _convolution(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1) -> Any:
    padding = (size - 1) // 2
    return nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)


class Bottleneck(nn.Module):
    """ResNet's block (v1.5: the stride is in the 3x3 convolution)."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.body = nn.Sequential(
            _convolution(inputs, width, 1), nn.BatchNorm2d(width), nn.ReLU(),
            _convolution(width, width, 3, stride), nn.BatchNorm2d(width), nn.ReLU(),
            _convolution(width, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(_convolution(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        return functional.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet50 (He et al. 2016): 25,557,032 parameters."""

    def __init__(self, width: int = 64, depths: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> None:
        super().__init__()
        layers: list[Any] = [
            _convolution(3, width, 7, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        ]  # fmt: skip
        inputs = width
        for stage, depth in enumerate(depths):
            for block in range(depth):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(inputs, width << stage, stride))
                inputs = 4 * (width << stage)
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(x).mean((2, 3)))


Block = tuple[int, int, int, int, bool, bool]
"""Kernel, expanded channels, channels out, stride, squeeze-and-excitation, hard swish."""

LARGE_BLOCKS: Final[tuple[Block, ...]] = (
    (3, 16, 16, 1, False, False), (3, 64, 24, 2, False, False), (3, 72, 24, 1, False, False),
    (5, 72, 40, 2, True, False), (5, 120, 40, 1, True, False), (5, 120, 40, 1, True, False),
    (3, 240, 80, 2, False, True), (3, 200, 80, 1, False, True), (3, 184, 80, 1, False, True),
    (3, 184, 80, 1, False, True), (3, 480, 112, 1, True, True), (3, 672, 112, 1, True, True),
    (5, 672, 160, 2, True, True), (5, 960, 160, 1, True, True), (5, 960, 160, 1, True, True),
)  # fmt: skip
SMALL_BLOCKS: Final[tuple[Block, ...]] = (
    (3, 16, 16, 2, True, False), (3, 72, 24, 2, False, False), (5, 96, 40, 2, True, True),
)  # fmt: skip


def _multiple_of_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


class Squeeze(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        narrow = _multiple_of_8(channels / 4)
        self.down, self.up = nn.Conv2d(channels, narrow, 1), nn.Conv2d(narrow, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Channels, weighed."""
        weights = self.up(functional.relu(self.down(x.mean((2, 3), keepdim=True))))
        return x * functional.hardsigmoid(weights)


class Inverted(nn.Module):
    """MobileNet's inverted residual."""

    def __init__(self, inputs: int, block: Block) -> None:
        super().__init__()
        size, wide, outputs, stride, squeezes, swishes = block
        swish = nn.Hardswish if swishes else nn.ReLU
        layers: list[Any] = []
        if wide != inputs:
            layers += [_convolution(inputs, wide, 1), nn.BatchNorm2d(wide, 1e-3), swish()]
        layers += [_convolution(wide, wide, size, stride, wide), nn.BatchNorm2d(wide, 1e-3), swish()]
        layers += [Squeeze(wide)] if squeezes else []
        layers += [_convolution(wide, outputs, 1), nn.BatchNorm2d(outputs, 1e-3)]
        self.body = nn.Sequential(*layers)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        return x + self.body(x) if self.adds else self.body(x)


class MobileNetV3(nn.Module):
    """MobileNetV3-Large (Howard et al. 2019): 5,483,032 parameters."""

    def __init__(self, blocks: Sequence[Block] = LARGE_BLOCKS, last: int = 1280, classes: int = 1000) -> None:
        super().__init__()
        layers: list[Any] = [_convolution(3, 16, 3, 2), nn.BatchNorm2d(16, 1e-3), nn.Hardswish()]
        inputs = 16
        for block in blocks:
            layers.append(Inverted(inputs, block))
            inputs = block[2]
        wide = 6 * inputs
        layers += [_convolution(inputs, wide, 1), nn.BatchNorm2d(wide, 1e-3), nn.Hardswish()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Linear(wide, last), nn.Hardswish(), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(x).mean((2, 3)))


class Layer(nn.Module):
    """A transformer's encoder layer, normalising first."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.all, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """One layer."""
        parts = self.all(self.first(x)).unflatten(-1, (3, self.heads, -1)).transpose(1, 3)
        q, k, v = parts.unbind(2)
        found = functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(found.transpose(1, 2).flatten(2))
        return x + self.narrow(functional.gelu(self.wide(self.second(x))))


class Encoder(nn.Module):
    """A transformer's encoder on vectors, with a mean and a classifier at its end."""

    def __init__(self, width: int = 512, heads: int = 8, depth: int = 6, classes: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(*[Layer(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.head(self.body(x).mean(1))


class Lstm(nn.Module):
    """A recurrent network with a classifier on its last state."""

    def __init__(self, width: int = 256, depth: int = 2, classes: int = 64) -> None:
        super().__init__()
        self.body = nn.LSTM(width, width, depth, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        found, _ = self.body(x)
        return self.head(found[:, -1])
