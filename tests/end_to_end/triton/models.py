"""The models that both servers read from one and the same folder."""

from __future__ import annotations

from dataclasses import replace

from comparison.triton import SOURCE, PythonModel, identity

DATATYPES = (
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP64", "BYTES",
)  # fmt: skip
"""Of which there is ``ident_<datatype>``, as of BF16; FP32 is ``ident``."""

SLOW_S = 0.3
_QUEUE = (
    "dynamic_batching {{ default_queue_policy {{ timeout_action: REJECT allow_timeout_override: true "
    "max_queue_size: 2 {} }} }}"
)

ADD_SUB = '''"""Sum and difference."""


class TritonPythonModel:
    def execute(self, requests):
        import triton_python_backend_utils as utils

        answers = []
        for one in requests:
            a, b = (utils.get_input_tensor_by_name(one, name).as_numpy() for name in ("A", "B"))
            answers.append(
                utils.InferenceResponse([utils.Tensor("SUM", a + b), utils.Tensor("DIFFERENCE", a - b)])
            )
        return answers


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        return {"SUM": inputs["A"] + inputs["B"], "DIFFERENCE": inputs["A"] - inputs["B"]}

    def unload(self):
        pass
'''

RAISES = '''"""Fails, always."""


class TritonPythonModel:
    def execute(self, requests):
        raise ValueError("never")


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        raise ValueError("never")

    def unload(self):
        pass
'''


def _tensor(name: str, kind: str, dims: str, more: str = "") -> str:
    return f'{{ name: "{name}" data_type: TYPE_{kind} dims: [{dims}] {more} }}'


def _add_sub() -> PythonModel:
    inputs = ", ".join(_tensor(name, "INT32", "4") for name in ("A", "B"))
    outputs = ", ".join(_tensor(name, "INT32", "4") for name in ("SUM", "DIFFERENCE"))
    config = f"max_batch_size: 8\ninput [{inputs}]\noutput [{outputs}]\ninstance_group [{{ kind: KIND_CPU }}]"
    return PythonModel("add_sub", config, ADD_SUB)


def _bfloat() -> PythonModel:
    """Numpy has no such numbers: Triton's Python passes them on unseen."""
    plain = identity("ident_BF16", datatype="BF16")
    numpy = "utils.Tensor(y, utils.get_input_tensor_by_name(one, x).as_numpy())"
    assert numpy in plain.source
    dlpack = "utils.Tensor.from_dlpack(y, utils.get_input_tensor_by_name(one, x).to_dlpack())"
    return replace(plain, source=plain.source.replace(numpy, dlpack))


def _optional() -> PythonModel:
    inputs = f"{_tensor('X', 'FP32', '2')}, {_tensor('Z', 'FP32', '2', 'optional: true')}"
    config = (
        f"max_batch_size: 8\ninput [{inputs}]\noutput [{_tensor('Y', 'FP32', '2')}]\n"
        "instance_group [{ kind: KIND_CPU }]"
    )
    return PythonModel("optional", config, SOURCE.format(pairs=[("X", "Y")], sleep_s=0.0))


def _labelled() -> PythonModel:
    plain = identity("labelled", dims=(3,))
    config = plain.config.replace("output [{", 'output [{ label_filename: "labels.txt"')
    return replace(plain, config=config, files={"labels.txt": "cat\ndog\nowl\n"})


def _image() -> PythonModel:
    """What only clients read of a configuration, and what Triton schedules by."""
    tensor = "data_type: TYPE_FP32 dims: [3, 2, 2]"
    config = (
        f'max_batch_size: 8\ninput [{{ name: "X" format: FORMAT_NCHW {tensor} }}]\n'
        f'output [{{ name: "Y" {tensor} }}]\ninstance_group [{{ kind: KIND_CPU }}]\n'
        'parameters { key: "scaling" value { string_value: "NONE" } }\n'
        'metric_tags { key: "team" value: "vision" }\nmodel_transaction_policy { decoupled: false }\n'
        "dynamic_batching { preferred_batch_size: [4, 8] max_queue_delay_microseconds: 100 }"
    )
    return PythonModel("image", config, SOURCE.format(pairs=[("X", "Y")], sleep_s=0.0))


def _reshaped() -> PythonModel:
    """Clients see six elements in a row, the model two rows of three."""
    plain = identity("reshaped", dims=(6,))
    return replace(plain, config=plain.config.replace("dims: [6]", "dims: [6] reshape { shape: [2, 3] }"))


MODELS = (
    identity("ident"),
    *(identity(f"ident_{datatype}", datatype=datatype) for datatype in DATATYPES),
    _bfloat(),
    identity("flat", dims=(2, 3), max_batch_size=0, more=""),
    identity("open", dims=(-1, -1), max_batch_size=8),
    identity("spare"),
    identity("gone"),
    identity("idle"),
    identity("counted"),
    identity("slow", dims=(1,), max_batch_size=2, sleep_s=SLOW_S, more=_QUEUE.format("")),
    identity(
        "patient", dims=(1,), max_batch_size=2, sleep_s=SLOW_S,
        more=_QUEUE.format("default_timeout_microseconds: 30000000"),
    ),
    replace(identity("versions", more="version_policy { all {} }"), versions=(1, 2)),
    _add_sub(),
    _optional(),
    _labelled(),
    _image(),
    _reshaped(),
    replace(identity("raises"), source=RAISES),
)  # fmt: skip
LATER = replace(identity("later"), source="this is no Python\n")
"""Put there once both run, and loaded in vain; ``gone`` is unloaded then."""
