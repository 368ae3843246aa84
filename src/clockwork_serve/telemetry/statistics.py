"""Triton's model statistics records, made from counters; it counts nothing itself."""

from __future__ import annotations

from typing import Any

from clockwork_serve.telemetry.counters import BatchCounters, Counters, Durations, ModelCounters
from clockwork_serve.units import NS_PER_MS

_NONE = Durations()


def model_statistics(counters: Counters, model: str | None, wall_offset_ns: int) -> dict[str, Any]:
    """``{"model_stats": [...]}`` for a model key (``name/version``), all versions of a name, or all (None).

    An unknown model gives an empty list. Times are ns, ``last_inference`` is ms since 1970;
    ``wall_offset_ns`` is wall clock less the controller's axis.
    """
    if model is None:
        chosen = list(counters.models.values())
    elif model in counters.models:
        chosen = [counters.models[model]]
    else:
        chosen = [known for known in counters.models.values() if known.name == model]
    return {"model_stats": [_record(known, wall_offset_ns) for known in chosen]}


def _record(model: ModelCounters, wall_offset_ns: int) -> dict[str, Any]:
    """One entry, in Triton's order of fields; requests that were refused count as failed there."""
    last_ms = (model.last_ns + wall_offset_ns) // NS_PER_MS if model.last_ns else 0
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": last_ms,
        "inference_count": model.rows,
        "execution_count": sum(batch.executions for batch in model.batches.values()),
        "inference_stats": {
            "success": _pair(model.success),
            "fail": _pair(model.fail),
            "queue": _pair(model.queue),
            "compute_input": _pair(model.compute_input),
            "compute_infer": _pair(model.compute_infer),
            "compute_output": _pair(model.compute_output),
            "cache_hit": _pair(_NONE),
            "cache_miss": _pair(_NONE),
        },
        "response_stats": {},
        "batch_stats": [_batch(size, model.batches[size]) for size in sorted(model.batches)],
        "memory_usage": [
            {"type": "CPU", "id": index, "byte_size": size}
            for index, (_, size) in enumerate(sorted(model.resident.items()))
        ],
    }


def _pair(durations: Durations) -> dict[str, int]:
    return {"count": durations.count, "ns": durations.ns}


def _batch(size: int, batch: BatchCounters) -> dict[str, Any]:
    return {
        "batch_size": size,
        "compute_input": {"count": batch.executions, "ns": batch.input_ns},
        "compute_infer": {"count": batch.executions, "ns": batch.run_ns},
        "compute_output": {"count": batch.executions, "ns": batch.output_ns},
    }
