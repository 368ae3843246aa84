"""Whether a request fits the model that it asks for, and what it asks for."""

from __future__ import annotations

from clockwork_serve.oip import Checked, InferCall, Known, Served, priority_of, requested_slo_ns
from clockwork_serve.serve.gateway_inquiry import Inquiry
from clockwork_serve.serve.gateway_regions import Regions, allowed
from clockwork_serve.serve.gateway_slots import Slots


def check(inquiry: Inquiry, call: InferCall, served: Served, regions: Regions | None, slots: Slots) -> Known:
    """What a request asks for, remembered for those like it. Raises :class:`InvalidRequest`."""
    if call.shared:
        rows, signature = _check_shared(inquiry, call, served, allowed(regions, local=inquiry.local), slots)
    else:
        rows, signature = served.check(call, binary_only_allowed=inquiry.every_output_binary)
    priority = priority_of(call.parameters, served.model.priority)
    slo_ns = requested_slo_ns(call.parameters)
    return served.headers.remember(call, served.wanted(call), rows, signature, slo_ns, priority)


def _check_shared(
    inquiry: Inquiry, call: InferCall, served: Served, regions: Regions, slots: Slots
) -> Checked:
    inquiry.body = regions.read_inputs(call, slots, inquiry.body)
    checked = served.check(call, binary_only_allowed=inquiry.every_output_binary)
    regions.check_outputs(call, served, checked.rows)
    return checked
