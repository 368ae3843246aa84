"""Archives of torch programs, built piece by piece."""

from __future__ import annotations

import json
import pickle
import zipfile


class Archive:
    """A small program's file, as torch writes it, to be changed."""

    def __init__(self, folder):
        self.path = folder / "model.pt2"
        self.entries = {
            "m/archive_format": b"pt2",
            "m/models/model.json": json.dumps(PROGRAM).encode(),
            "m/data/weights/model_weights_config.json": json.dumps({"config": {"w": WEIGHT}}).encode(),
            "m/data/weights/weight_0": b"\0" * 8,
            "m/data/constants/model_constants_config.json": b'{"config": {}}',
            "m/data/sample_inputs/model.pt": pickle.dumps(Bomb()),
        }

    def change(self, name, old, new):
        data = self.entries[name]
        assert old in data
        self.entries[name] = data.replace(old, new)
        return self

    def write(self, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(self.path, "w", method) as file:
            for name, data in self.entries.items():
                file.writestr(name, data)
        return self.path


class Bomb:
    """A pickle of it would end the process that opens it."""

    def __reduce__(self):
        return (exit, (1,))


META = {
    "dtype": 7, "sizes": [{"as_int": 2}], "requires_grad": True, "device": {"type": "cuda", "index": 0},
    "strides": [{"as_int": 1}], "storage_offset": {"as_int": 0}, "layout": 7,
}  # fmt: skip


WEIGHT = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": META}
SIZE = {"as_expr": {"expr_str": "Symbol('s77', positive=True, integer=True)", "hint": {"as_int": 2}}}
PROGRAM = {
    "graph_module": {
        "graph": {
            "inputs": [{"as_tensor": {"name": "p_w"}}, {"as_tensor": {"name": "x"}}],
            "outputs": [{"as_tensor": {"name": "add"}}],
            "nodes": [
                {
                    "target": "torch.ops.aten.add.Tensor",
                    "inputs": [{"name": "self", "arg": {"as_tensor": {"name": "x"}}, "kind": 1}],
                    "outputs": [{"as_tensor": {"name": "add"}}],
                    "metadata": {"stack_trace": "secret/path.py"},
                }
            ],
            "tensor_values": {"p_w": META, "x": {**META, "sizes": [SIZE]}, "add": {**META, "sizes": [SIZE]}},
        },
        "signature": {
            "input_specs": [
                {"parameter": {"arg": {"name": "p_w"}, "parameter_name": "w"}},
                {"user_input": {"arg": {"as_tensor": {"name": "x"}}}},
            ],
            "output_specs": [{"user_output": {"arg": {"as_tensor": {"name": "add"}}}}],
        },
        "module_call_graph": [{"fqn": "", "signature": {"in_spec": "[1, {}]", "out_spec": "[1, {}]"}}],
        "metadata": {},
        "treespec_namedtuple_fields": {},
    },
    "range_constraints": {"s77": {"min_val": 1, "max_val": 64}},
    "guards_code": ["__import__('os')"],
}
