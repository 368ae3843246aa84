"""Sixty cases that are tests, too: each kind of mixing, and what must keep its batches."""

from __future__ import annotations

from collections.abc import Iterator

from qa.cases.case import Case
from qa.cases.kinds import kinds
from qa.cases.node_cases import node_cases

MIXING = (
    "running sum of rows",
    "LSTM whose first axis is time",
    "causal network over ids['seq']",
    "network over ids['seq']",
    "MaxPool with indices",
    "lower triangle",
    "diagonal",
    "distinct values",
    "one scale for the whole tensor",
    "mixing_reduced",
    "mixing_normalised",
    "mixing_batch_statistics",
    "mixing_sorted",
    "mixing_shifted",
    "mixing_convolved",
    "mixing_product_of_all",
    "mixing_smeared",
    "mixing_indexed",
    "mixing_indexed_by_data",
    "mixing_compressed",
    "mixing_numbered",
    "mixing_random",
    "mixing_broadcast",
    "mixing_computed_axis",
    "mixing_by_attribute",
    "running sum behind numbers from 100 on",
    "mixing_faint",
    "mixing_secret",
    "mixing_while",
    "mixing_branch_on_data",
    "mixing_branch_on_number",
    "mixing_loop_on_data",
    "mixing_scanned",
    "test_softmax_axis_0",
    "test_reduce_mean_default_axes_keepdims_example, others constant",
    "test_cumsum_2d_axis_0, others constant",
)
"""Must never be batched."""
APART = (
    "perceptron",
    "GRU, batch first",
    "encoder with merged heads",
    "apart_unary",
    "apart_reduced",
    "apart_normalised",
    "apart_reshaped",
    "apart_transposed",
    "apart_class_token",
    "apart_positions",
    "apart_embedded",
    "apart_words",
    "apart_gemm",
    "apart_merged",
    "apart_attention",
    "apart_convolution",
    "apart_recurrent",
    "apart_told",
    "apart_loop_over_time",
    "apart_scan_over_time",
    "apart_trees",
    "test_softmax_axis_1",
    "test_cumsum_2d_axis_1, others constant",
    "test_basic_conv_with_padding, first alone",
)
"""Must be."""
_MODULES = ("softmax", "reducemean", "cumsum", "conv")


def sixty() -> Iterator[Case]:
    """The cases."""
    wanted = {*MIXING, *APART}
    for case in (*kinds(), *node_cases(_MODULES)):
        if case.name in wanted:
            wanted.remove(case.name)
            yield case
    assert not wanted, f"no such cases: {sorted(wanted)}"
