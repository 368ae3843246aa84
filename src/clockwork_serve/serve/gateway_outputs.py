"""Outputs that would hold the loop for long to be made JSON or classes of: left to the process beside it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import msgspec

from clockwork_serve.oip import OutputTensor, OutputWish
from clockwork_serve.oip.records import Buffer
from clockwork_serve.serve.codec_process import Output, Write
from clockwork_serve.serve.gateway_codec import Codec
from clockwork_serve.serve.gateway_inquiry import Ending
from clockwork_serve.units import KIB

JSON_BYTES: Final = 32 * KIB
"""Of an output that is made JSON of at once: 8,000 numbers take 1 ms."""
RANKED_BYTES: Final = 64 * KIB
CLASSES: Final = 1024
"""Of an output, in all its rows: a microsecond each."""


def is_heavy(ending: Ending) -> bool:
    """Whether one of the outputs is for that process."""
    call, served = ending.call, ending.served
    if call is None or served is None:
        return False
    if all(len(tensor.data) <= JSON_BYTES for tensor in ending.outputs):
        # The common case; so few numbers have few classes.
        return any(wish.classes > CLASSES // 8 for wish in call.outputs or ())
    sizes = {tensor.name: (len(tensor.data), tensor.shape) for tensor in ending.outputs}
    return any(
        _is_heavy(wish, *sizes[wish.name], batched=served.code.batched) for wish in served.wanted(call)
    )


def _is_heavy(wish: OutputWish, nbytes: int, shape: tuple[int, ...], *, batched: bool) -> bool:
    if wish.classes:
        rows = shape[0] if batched and shape else 1
        return nbytes > RANKED_BYTES or rows * min(wish.classes, math.prod(shape)) > CLASSES
    return wish.shared is None and not wish.binary and nbytes > JSON_BYTES


class Heavy:
    """What of an ending is for that process: copies, for the outputs' memory is given back.

    To be made before :meth:`Inquiry.end` returns.
    """

    def __init__(self, ending: Ending) -> None:
        call, served = ending.call, ending.served
        assert call is not None
        assert served is not None
        self.original = ending
        ending.outputs = [
            OutputTensor(tensor.name, tensor.datatype, tensor.shape, bytes(tensor.data))
            for tensor in ending.outputs
        ]
        self._wishes = served.wanted(call)
        self._tensors = {tensor.name: tensor for tensor in ending.outputs}

    async def ending(self, codec: Codec, wanted: Callable[[], bool]) -> Ending:
        """The same ending with classes as tensors, and ``texts`` of what is to be JSON.

        Raises :class:`InvalidRequest`, and :class:`CodecFailed`. Nobody waits for it unless ``wanted()``.
        """
        ending = self.original
        assert ending.call is not None
        assert ending.served is not None
        outputs, data = [], []
        for wish in self._wishes:
            tensor = self._tensors[wish.name]
            if wish.shared is None and (wish.classes or not wish.binary):
                outputs.append(
                    Output(
                        tensor.name, tensor.datatype, tensor.shape, len(tensor.data), wish.classes,
                        not wish.binary,
                    )
                )  # fmt: skip
                data.append(tensor.data)
        names = {output.name for output in outputs if output.classes}
        labels = {name: found for name, found in ending.served.model.labels.items() if name in names}
        job = Write(outputs, labels, ending.served.code.batched)
        texts: dict[str, Buffer] = {}
        for output, content in await codec.write(job, data, wanted):
            if output.json:
                texts[output.name] = content
                content = b""  # type: ignore[assignment] # noqa: PLW2901
            self._tensors[output.name] = OutputTensor(output.name, output.datatype, output.shape, content)
        wishes = [msgspec.structs.replace(wish, classes=0) for wish in self._wishes]
        call = msgspec.structs.replace(ending.call, outputs=wishes)
        return msgspec.structs.replace(ending, call=call, outputs=[*self._tensors.values()], texts=texts)
