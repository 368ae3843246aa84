"""Settings, commands and options of earlier versions, and what to use now. Each is an error that says it."""

from __future__ import annotations

from typing import Final

_PATIENCE: Final = "set patience, a factor of all times that clients have: 2 doubles them"
_WATCHDOG: Final = (
    "set watchdog_s, which moves three times together: an action may be late for as long, a hung worker then "
    "has 5 times as long to respond, and any other process 1.5 times (1 s at least)"
)
_TRITON: Final = "set triton, one switch for Triton's codes and its names of metrics"
_SCALING: Final = "set scaling_devices, the fewest and the most, such as 2..16"

FORMER_SETTINGS: Final[dict[str, str]] = {
    "body_s": _PATIENCE,
    "compile_s": "leave it out: a compilation may be without progress for 900 s",
    "cuda_graphs": "leave it out: 256 graphs are kept",
    "hang_grace_s": _WATCHDOG,
    "hang_s": _WATCHDOG,
    "head_s": _PATIENCE,
    "idle_s": _PATIENCE,
    "io_memory": "set scratch_memory, of which a fifth is for inputs and outputs",
    "jitter": "write it with the device, in quotes: --device 'emulated:v100?jitter=0.1'",
    "largest_batch": "set max_batch, which now limits all models: those that declare none have at most 16",
    "listen_workers": "set listen_machines, which means the same",
    "look_ahead_ms": "leave it out: lanes are filled 5 ms ahead",
    "max_calls": "leave it out: a gRPC connection may have 1000 open calls",
    "max_head": "leave it out: the head of a request may have 32KiB",
    "max_headers": "leave it out: a request may have 100 headers",
    "max_json": "leave it out: a request may have 16MiB of JSON, and tensors may be binary",
    "max_message": "set max_body, which now limits messages over gRPC, too",
    "max_requests": "leave it out: a gateway may have 20000 open requests",
    "max_unsent": "leave it out: a client may leave 256MiB unread",
    "page_size": "leave it out: pages have 256KiB, and 16MiB on GPUs",
    "pin": "set isolate: cores is what pin was, off (the default) is without",
    "queue_limit": "set queue_limit in a model's own clockwork.toml; a model that sets none has 1000",
    "realtime": "set isolate: realtime is what it was, both is with cores, off (the default) is without",
    "reject": "leave it out: a request is refused once no schedule can meet its deadline",
    "retries": "leave it out: a request on a lost worker is tried once more",
    "scaling_least": _SCALING,
    "scaling_most": _SCALING,
    "seed": "write it with the device, in quotes: --device 'emulated:v100?jitter=0.1&seed=7'",
    "send_s": _PATIENCE,
    "silence_s": "leave it out: links end after 2 s of silence, 0.75 s with controllers on several hosts",
    "stream_s": _PATIENCE,
    "stuck_s": _WATCHDOG,
    "triton_codes": _TRITON,
    "triton_metrics": _TRITON,
    "worker_name": "set machine_name, which means the same",
    "workspace": "set scratch_memory, of which four fifths are scratch memory",
}
"""By name, the remedy of the error."""

FORMER_COMMANDS: Final[dict[str, str]] = {
    "compile": "clockwork profile --no-measure REPO does the same",
    "timeline": "clockwork live JOURNAL shows the lanes of a journal in a browser",
    "traces": "a server sends traces as it serves: clockwork serve --otlp-endpoint URL",
    "what-if": "play its traffic anew: clockwork workload from JOURNAL, then clockwork simulate",
}
"""By name, what does the work now."""

FORMER_OPTIONS: Final[dict[str, str]] = {
    "bench --html": "--json FILE has the same numbers",
    "plan --check": "clockwork bench SCENARIO --url URL plays it on a server, for the same columns",
    "plan --html": "--json FILE has the same numbers",
}
"""By command and option, what does the work now."""
