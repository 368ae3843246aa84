"""The fence between a process and controllers that do not lead any more.

Each controller that leads has an *epoch*, larger than those of all that led before it. Whatever keeps the
lease by which one is chosen, and however late it is noticed who lost it: whoever has joined a later
controller obeys no earlier one.
"""

from __future__ import annotations


class Fence:
    """Remembers the highest ``epoch`` of the controllers that a process has joined; 0 before the first.

    Also the epoch of a controller that leads without a lease.
    """

    __slots__ = ("epoch",)

    def __init__(self) -> None:
        self.epoch = 0

    def bars(self, epoch: int) -> bool:
        """Whether a controller of that epoch is deposed: nothing that it sends may be done or given out."""
        return epoch < self.epoch

    def join(self, epoch: int) -> None:
        """The process has joined a controller of that epoch, which is not barred."""
        assert not self.bars(epoch), f"joined epoch {epoch} after {self.epoch}"
        self.epoch = epoch
