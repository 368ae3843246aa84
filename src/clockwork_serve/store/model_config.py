"""A served model's configuration as Triton's clients read it: snake_case JSON with every default shown."""

from __future__ import annotations

from typing import Any

import msgspec

from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.store.repository import FILE_OF_BACKEND
from clockwork_serve.store.settings import ModelSettings, VersionPolicy

PLATFORMS = {
    "onnx": "onnxruntime_onnx", "torch": "pytorch_libtorch", "python": "python", "emulated": "emulated",
}  # fmt: skip
"""What Triton's clients know our backends as."""
_BACKENDS = {"onnx": "onnxruntime", "torch": "pytorch", "python": "python", "emulated": "emulated"}


def model_config(name: str, settings: ModelSettings, code: Code, max_batch_size: int) -> bytes:
    """The configuration of a model as JSON."""
    config: dict[str, Any] = {
        "name": name,
        # Triton names its Python backend in the other field only.
        "platform": "" if code.backend == "python" else PLATFORMS[code.backend],
        "backend": _BACKENDS[code.backend],
        "runtime": "",
        "version_policy": _version_policy(settings.version_policy or VersionPolicy()),
        "max_batch_size": max_batch_size,
        "input": [_input(spec) for spec in code.inputs],
        "output": [_output(spec, settings) for spec in code.outputs],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "instance_group": [
            {
                "name": f"{name}_0", "kind": "KIND_CPU", "count": 1, "gpus": [], "secondary_devices": [],
                "profile": [], "passive": False, "host_policy": "",
            }
        ],
        "default_model_filename": settings.file_name or FILE_OF_BACKEND.get(code.backend, ""),
        "cc_model_filenames": {},
        "metric_tags": {},
        "parameters": {},
        "model_warmup": [],
    }  # fmt: skip
    if max_batch_size:
        config["dynamic_batching"] = {
            "preferred_batch_size": [max_batch_size],
            "max_queue_delay_microseconds": 0,
            "preserve_ordering": False,
            "priority_levels": 0,
            "default_priority_level": 0,
            "priority_queue_policy": {},
        }
    return msgspec.json.encode(config)


def _version_policy(policy: VersionPolicy) -> dict[str, Any]:
    if policy.specific:
        return {"specific": {"versions": list(policy.specific)}}
    if policy.latest is None:
        return {"all": {}}
    return {"latest": {"num_versions": policy.latest}}


def _data_type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _input(spec: TensorSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec),
        "format": "FORMAT_NONE",
        "dims": list(spec.shape),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": spec.optional,
        "is_non_linear_format_io": False,
    }


def _output(spec: TensorSpec, settings: ModelSettings) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec),
        "dims": list(spec.shape),
        "label_filename": settings.label_files.get(spec.name, ""),
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }
