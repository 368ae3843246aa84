"""Settings, commands and options of earlier versions, and what to use now. Each is an error that says it."""

from __future__ import annotations

from typing import Final

_PATIENCE: Final = "set patience, a factor of all times that clients have: 2 doubles them"
_FIXED: Final = "it is no setting any more"

FORMER_SETTINGS: Final[dict[str, str]] = {
    "body_s": _PATIENCE,
    "compile_s": f"{_FIXED}: a compilation may be without progress for 900 s; leave it out",
    "cuda_graphs": f"{_FIXED}: 256 graphs are kept; leave it out",
    "hang_grace_s": "set watchdog_s: a hung worker has 5 times as long to respond",
    "hang_s": "set watchdog_s, from which all processes' times now follow",
    "head_s": _PATIENCE,
    "idle_s": _PATIENCE,
    "io_memory": "set scratch_memory, of which a fifth is for inputs and outputs",
    "jitter": "write it with the device: emulated:v100?jitter=0.1",
    "largest_batch": "set max_batch, which now limits every model",
    "listen_workers": "set listen_machines, which means the same",
    "look_ahead_ms": f"{_FIXED}: lanes are filled 5 ms ahead; leave it out",
    "max_calls": f"{_FIXED}: a gRPC connection may have 1000 open calls; leave it out",
    "max_head": f"{_FIXED}: the head of a request may have 32KiB; leave it out",
    "max_headers": f"{_FIXED}: a request may have 100 headers; leave it out",
    "max_json": f"{_FIXED}: a request may have 16MiB of JSON, and tensors may be binary; leave it out",
    "max_message": "set max_body, which now limits messages over gRPC, too",
    "max_requests": f"{_FIXED}: a gateway may have 20000 open requests; leave it out",
    "max_unsent": f"{_FIXED}: a client may leave 256MiB unread; leave it out",
    "page_size": f"{_FIXED}: pages have 256KiB, and 16MiB on GPUs; leave it out",
    "pin": "set isolate to cores",
    "queue_limit": "set queue_limit in a model's own clockwork.toml; a model that sets none has 1000",
    "realtime": "set isolate to realtime, or to both with cores",
    "reject": f"{_FIXED}: a request is refused once no schedule can meet its deadline; leave it out",
    "retries": f"{_FIXED}: a request on a lost worker is tried once more; leave it out",
    "scaling_least": "set scaling_devices, the fewest and the most, such as 2..16",
    "scaling_most": "set scaling_devices, the fewest and the most, such as 2..16",
    "seed": "write it with the device: emulated:v100?jitter=0.1&seed=7",
    "send_s": _PATIENCE,
    "silence_s": f"{_FIXED}: links are lost after 2 s of silence, 0.75 s with a standby; leave it out",
    "stream_s": _PATIENCE,
    "stuck_s": "set watchdog_s: processes other than workers have 1.5 times as long",
    "triton_codes": "set triton, which turns on Triton's codes and its metrics",
    "triton_metrics": "set triton, which turns on Triton's codes and its metrics",
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
