"""The fence: whoever joined a later controller obeys no earlier one."""

from __future__ import annotations

import pytest

from clockwork_serve.fence import Fence


def test_it_bars_all_controllers_before_the_last_that_was_joined():
    fence = Fence()
    assert not fence.bars(0)
    for epoch in (0, 1, 1, 7):
        fence.join(epoch)
        assert fence.epoch == epoch
        assert not fence.bars(epoch)
        assert not fence.bars(epoch + 1)
    assert [epoch for epoch in range(9) if fence.bars(epoch)] == list(range(7))


def test_who_is_barred_cannot_be_joined():
    fence = Fence()
    fence.join(2)
    with pytest.raises(AssertionError, match="joined epoch 1 after 2"):
        fence.join(1)
