"""What fits a model, and what does not, by name."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import InferCall, InputTensor, OutputWish, Served, Unsupported
from clockwork_serve.oip.model import OutputTensor, missing, model_metadata
from clockwork_serve.store.repository import model_config
from clockwork_serve.store.settings import ModelSettings
from tests.oip.models import identity, served, spec


def x(*shape: int, datatype: str = "FP32", name: str = "X", size: int | None = None) -> InputTensor:
    count = 4
    for dim in shape:
        count *= dim
    return InputTensor(name, datatype, shape, bytes(count if size is None else size))


def call(*inputs: InputTensor, outputs: list[OutputWish] | None = None, **parameters: object) -> InferCall:
    return InferCall(list(inputs), outputs, parameters=parameters)  # type: ignore[arg-type]


def test_a_request_that_fits_tells_its_rows() -> None:
    assert identity().check(call(x(3, 2))) == (3, "")
    assert identity(batched=False).check(call(x(2))) == (1, "")


def test_shapes_that_a_request_chooses_are_its_signature() -> None:
    of = served((spec("b", "FP32", -1, 3), spec("a", "FP32")), (spec("Y", "FP32", 1),))
    assert of.check(call(x(2, 7, 3, name="b"), x(2, name="a"))) == (2, "a:;b:7x3")
    assert of.check(call(x(2, name="a"), x(2, 7, 3, name="b"))) == (2, "a:;b:7x3")


def test_an_optional_input_may_be_missing_and_marks_the_signature() -> None:
    of = served((spec("X", "FP32", 2), spec("O", "FP32", 1, optional=True)), (spec("Y", "FP32", 1),))
    assert of.check(call(x(1, 2))) == (1, "X:2")
    assert of.check(call(x(1, 2), x(1, 1, name="O"))) == (1, "O:1;X:2")


def test_a_model_without_inputs_takes_none() -> None:
    assert served((), (spec("Y", "FP32", 1),), batched=False).check(call()) == (1, "")


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([x(1, 2, datatype="INT32")], "input 'X' data-type is 'INT32', but model 'ident' expects 'FP32'"),
        ([x(1, 2, name="Z")], r"unexpected inference input 'Z' for model 'ident'; expected \['X'\]"),
        ([], r"expected 1 inputs but got 0 inputs.*missing required input\(s\) \['X'\]"),
        ([x(1, 2), x(1, 2)], "'X': expected once, found 2 times"),
        ([x(9, 2)], "batch-size must be <= 8 for 'ident', found 9"),
        ([x(1, 3)], r"shape for input 'X' for model 'ident'. Expected \[-1, 2\], got \[1, 3\]"),
        ([x(2)], r"got \[2\]"),
        ([x()], r"got \[\]"),
        ([x(0, 2)], r"got \[0, 2\] \(every dimension at least 1\)"),
        ([x(1, 2, size=7)], r"expected 8 bytes for shape \[1, 2\] of FP32, found 7"),
        ([x(1, 2, size=9)], "found 9"),
    ],
)
def test_what_does_not_fit_is_named(inputs: list[InputTensor], words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        identity().check(call(*inputs))


def test_inputs_must_agree_on_the_batch() -> None:
    of = served((spec("A", "FP32", 1), spec("B", "FP32", 1)), (spec("Y", "FP32", 1),))
    with pytest.raises(InvalidRequest, match="'B': expected a batch of 2 as in 'A', found 3"):
        of.check(call(x(2, 1, name="A"), x(3, 1, name="B")))
    with pytest.raises(InvalidRequest, match=r"missing required input\(s\) \['B'\]"):
        of.check(call(x(2, 1, name="A"), x(2, 1, name="A")))


@pytest.mark.parametrize(
    ("data", "fits"),
    [
        (b"\x01\0\0\0a\0\0\0\0", True),
        (b"\x01\0\0\0a", False),
        (b"\x01\0\0\0a\x09\0\0\0b", False),
        (b"\x01\0\0\0a\0\0\0\0\0\0\0\0", False),
        (b"\x01\0\0", False),
        (b"", False),
    ],
)
def test_strings_are_walked(data: bytes, *, fits: bool) -> None:
    tensor = InputTensor("X", "BYTES", (1, 2), data)
    if fits:
        identity("BYTES").check(call(tensor))
    else:
        with pytest.raises(InvalidRequest, match="'X': expected 2 elements of BYTES"):
            identity("BYTES").check(call(tensor))


@pytest.mark.parametrize("text", [b"\xff", b"a\xc3", b"\xed\xa0\x80", b"\xc0\x80"])
def test_strings_of_a_graph_are_text_and_of_other_models_any_bytes(text: bytes) -> None:
    data = b"\x03\0\0\0\xe2\x82\xac%c\0\0\0%s" % (len(text), text)
    for wire in (data, memoryview(data)):
        tensor = call(InputTensor("X", "BYTES", (1, 2), wire))
        graph, plain = identity("BYTES"), identity("BYTES")
        plain = Served(plain.model, replace(plain.code, backend="python"), 1)
        assert plain.check(tensor).rows == 1
        with pytest.raises(InvalidRequest, match=r"'X': element 1: expected UTF-8 text, .*found byte 0x"):
            graph.check(tensor)


def test_too_many_strings_are_refused_before_they_are_walked() -> None:
    with pytest.raises(InvalidRequest, match="expected at most 16384 elements"):
        identity("BYTES", -1).check(call(InputTensor("X", "BYTES", (1, 10**15), b"")))


def test_a_bool_is_0_or_1() -> None:
    identity("BOOL").check(call(InputTensor("X", "BOOL", (1, 2), b"\0\x01")))
    with pytest.raises(InvalidRequest, match="0 or 1 for BOOL"):
        identity("BOOL").check(call(InputTensor("X", "BOOL", (1, 2), b"\0\x02")))


@pytest.mark.parametrize(
    ("of", "wishes", "words"),
    [
        (identity(), [OutputWish("NOPE")], r"unexpected inference output 'NOPE' .*; expected \['Y'\]"),
        (identity(), [OutputWish("Y"), OutputWish("Y")], "found one twice"),
        (identity("FP16"), [OutputWish("Y")], "'Y': FP16 has no JSON form"),
        (identity("FP16"), None, "'Y': FP16 has no JSON form"),
        (identity("BYTES"), [OutputWish("Y", classes=1)], "BYTES has no classes"),
    ],
)  # fmt: skip
def test_outputs_that_cannot_be_given_are_named(
    of: Served, wishes: list[OutputWish] | None, words: str
) -> None:
    datatype = of.code.inputs[0].datatype
    data = b"\0\0\0\0\0\0\0\0" if datatype in ("FP32", "BYTES") else bytes(4)
    with pytest.raises(InvalidRequest, match=words):
        of.check(call(InputTensor("X", datatype, (1, 2), data), outputs=wishes))


def test_types_without_a_json_form_may_be_asked_for_in_binary() -> None:
    tensor = InputTensor("X", "FP16", (1, 2), bytes(4))
    identity("FP16").check(call(tensor, outputs=[OutputWish("Y", binary=True)]))
    identity("FP16").check(call(tensor), binary_only_allowed=True)


def test_sequences_are_refused() -> None:
    with pytest.raises(Unsupported, match=r"'sequence_id'.*keeps no state"):
        identity().check(call(x(1, 2), sequence_id=5))
    identity().check(call(x(1, 2), sequence_id=0, sequence_start=False, tenant="a"))


def test_a_raw_body_is_the_only_input() -> None:
    found = identity("FP32", -1, 3).raw_call(memoryview(bytes(24)))
    assert [(each.name, each.shape, len(each.data)) for each in found.inputs] == [("X", (1, 2, 3), 24)]
    assert found.binary
    found = identity("FP32", 2, batched=False).raw_call(memoryview(bytes(8)))
    assert found.inputs[0].shape == (2,)
    found = identity("BYTES", -1).raw_call(memoryview(b"text"))
    assert (found.inputs[0].shape, found.inputs[0].data) == ((1, 1), b"\x04\0\0\0text")
    of = identity("FP32", 2)
    call_of_9 = of.raw_call(memoryview(bytes(9)))
    with pytest.raises(InvalidRequest, match=r"expected 8 bytes .* found 9"):
        of.check(call_of_9)
    with pytest.raises(InvalidRequest, match="at most one dimension"):
        identity("FP32", -1, -1).raw_call(memoryview(bytes(8)))
    with pytest.raises(InvalidRequest, match="expected a model with one input"):
        served((spec("A", "FP32"), spec("B", "FP32")), ()).raw_call(memoryview(b""))


def test_unknown_models_are_named_as_clients_know_it() -> None:
    assert missing("x") == "Request for unknown model: 'x' is not found"
    assert missing("x", "9") == "Request for unknown model: 'x' version 9 is not found"


def test_a_reshaped_tensor_has_one_shape_for_clients_and_another_for_the_model() -> None:
    plain = served((spec("X", "FP32", 1, 3), spec("N", "FP32")), (spec("Y", "FP32", 1, 1, 2),))
    settings = ModelSettings(input_dims={"X": (3,), "N": (1,)}, output_dims={"Y": (2,)})
    config = model_config("ident", settings, plain.code, 8)
    of = Served(replace(plain.model, config=config), plain.code, 1)
    assert [put["shape"] for put in model_metadata(of, ["1"])["inputs"]] == [[-1, 3], [-1, 1]]
    assert [put["shape"] for put in model_metadata(of, ["1"])["outputs"]] == [[-1, 2]]
    inputs = [x(2, 3), x(2, 1, name="N")]
    assert of.check(call(*inputs)).rows == 2
    assert [(each.name, each.shape) for each in of.sent(inputs)] == [("X", (2, 1, 3)), ("N", (2,))]
    assert [each.shape for each in inputs] == [(2, 3), (2, 1)]
    with pytest.raises(InvalidRequest, match=r"Expected \[-1, 3\], got \[2, 1, 3\]"):
        of.check(call(x(2, 1, 3), inputs[1]))
    (y,) = of.answered([OutputTensor("Y", "FP32", (2, 1, 1, 2), bytes(16))])
    assert (y.shape, len(y.data)) == ((2, 2), 16)
    assert plain.sent(inputs) is inputs
