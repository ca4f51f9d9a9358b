import numpy as np
import pytest

from golden import golden_model
from omniad_edge.errors import BundleError
from omniad_edge.export.onnx_graph import build_graph, weights_message
from omniad_edge.kernels.fold import fold
from omniad_edge.onnx_weights import read_weights


@pytest.mark.parametrize("half", [False, True])
def test_what_was_written_is_read(half):
    model = golden_model(backbone="resnet18", depths=(1, 1, 1, 1), height=64, width=96)
    _, weights = build_graph(fold(model), half=False, half_weights=half)
    read = read_weights(weights_message(weights))
    assert read.keys() == weights.keys()
    for name, value in weights.items():
        assert read[name].dtype == value.dtype and not read[name].flags.writeable
        np.testing.assert_array_equal(read[name], value)


def test_odd_shapes():
    weights = {
        "empty": np.zeros((0, 3), np.float32),
        "one": np.float32(2).reshape(()),
        "ä": np.ones(300, np.float16),
    }
    read = read_weights(weights_message(weights))
    assert {name: (v.shape, v.dtype) for name, v in read.items()} == {
        name: (v.shape, v.dtype) for name, v in weights.items()
    }


@pytest.mark.parametrize(
    "message", [b"\x3a", b"\x3a\xff\xff\xff\xff\x0f", b"\xff" * 12, b"\x3a\x04\x2a\x02\x10\x07", b"\x3b\x00"]
)
def test_anything_else_is_refused(message):
    with pytest.raises(BundleError, match=r"weights\.onnx: not a file of weights"):
        read_weights(message)


def test_truncated_files_are_refused_or_shorter():
    message = weights_message({"a": np.arange(6, dtype=np.float32).reshape(2, 3)})
    for end in range(1, len(message)):
        with pytest.raises(BundleError):
            read_weights(message[:end])
