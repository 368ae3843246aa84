"""Graphs as texts for tests of the rule by which a model is batched undeclared."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from clockwork_serve.store.onnx.graph import interface_of
from clockwork_serve.store.onnx.row_rule import objection


def model_of(text: str, *, opset: int = 17) -> onnx.ModelProto:
    """A model from the text of its graph (and of functions after it); weights without values are ones."""
    imports = f'["" : {opset}, "ai.onnx.ml" : 3, "com.microsoft" : 1, "own" : 1]'
    model = onnx.parser.parse_model(f"<ir_version: 8, opset_import: {imports}>\n{text}")
    made = {name for node in model.graph.node for name in node.output}
    for value in model.graph.value_info:
        if value.name not in made:
            tensor = value.type.tensor_type
            dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
            ones = np.ones([dim.dim_value for dim in tensor.shape.dim], dtype)
            model.graph.initializer.append(numpy_helper.from_array(ones, value.name))
    return model


def verdict(text: str, *, opset: int = 17) -> str:
    """What the rule objects to in a graph."""
    model = model_of(text, opset=opset)
    return objection(model, interface_of(model))
