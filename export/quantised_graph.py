"""The network in 8 bits: the graphs of `onnx_graph` with convolutions and projections between Q/DQ nodes.

Each input of such an operation goes through QuantizeLinear and DequantizeLinear, which engines fuse with it into
one that multiplies in 8 bits. Nothing may lie between, or TensorRT 10.16 on Orin fails to infer types.
Weights stay in the file that all graphs share; engines round them while loading, each output channel with a scale
of its own.

Not quantised are the first convolution, whose three channels are pixels; depthwise convolutions, norms, softmax
and the products within the attention, which wait for memory rather than for multipliers; the decoder's residual
stream; and everything from the cosine on.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from onnx import ModelProto, TensorProto, helper
from onnxruntime.quantization.calibrate import MinMaxCalibrater

from ..kernels.fold import Array, Network
from ..kernels.network import forward
from .onnx_graph import HALF, OnnxOps, Value, model_of, weights_message

PIXEL_CHANNELS = 3
Range = tuple[float, float]  # least and largest value of a tensor


@dataclass(frozen=True)
class Format:
    """half: what is not quantised is in fp16, else in fp32
    type, steps: of activations; their range is so many steps of the scale
    weight_type, weight_steps: the same of weights, whose range is from 0 to the largest magnitude
    """

    half: bool
    type: int
    steps: int
    weight_type: int
    weight_steps: int


FORMATS = {
    # For CPUs. uint8 with a zero point, as ONNX Runtime fuses a ReLU with nothing else. Weights of 7 bits: where a
    # CPU has no VNNI two products are added in 16 bits, and 2 * 255 * 63 fits into them.
    "int8": Format(False, TensorProto.UINT8, 255, TensorProto.INT8, 63),
    # For TensorRT, which has no zero points, and takes uint8 for int8 with a mere warning.
    "int8_fp16": Format(True, TensorProto.INT8, 127, TensorProto.INT8, 127),
    "fp8": Format(True, TensorProto.FLOAT8E4M3FN, 448, TensorProto.FLOAT8E4M3FN, 448),
}


def build_quantised_graph(network: Network, name: str, half_weights: bool, ranges: Sequence[Range]) -> bytes:
    """The graph `name` of FORMATS without weights; it takes those of `build_graph`.

    ranges: of `activation_ranges`
    """
    ops = QuantisedOps(network, FORMATS[name], half_weights, ranges)
    return model_of(ops, network, *forward(ops, network, "pixels")).SerializeToString()


def activation_ranges(network: Network, pixels: np.ndarray) -> list[Range]:
    """Of every tensor that is to be quantised, in the order of the network, found by ONNX Runtime's calibrator.

    pixels: (N, H, W, 3) uint8 RGB of good parts
    """
    ops = ObservedOps(network)
    model = model_of(ops, network, *forward(ops, network, "pixels"))
    with tempfile.TemporaryDirectory() as folder:
        path, augmented = Path(folder) / "model.onnx", Path(folder) / "augmented.onnx"
        path.write_bytes(model.SerializeToString() + weights_message(ops.weights))
        calibrator = Calibrator(path, str(augmented), set(ops.observed))
        calibrator.collect_data(OneByOne(pixels))
    found = calibrator.compute_data()
    return [tuple(np.asarray(end).item() for end in found[name].range_value) for name in ops.observed]


class Calibrator(MinMaxCalibrater):
    """Of these tensors alone; of all that ONNX Runtime would choose it takes three times as long."""

    def __init__(self, path: Path, augmented: str, tensors: set[str]) -> None:
        super().__init__(path, augmented_model_path=augmented)
        self.tensors = tensors
        self.augment_graph()
        self.create_inference_session()

    def select_tensors_to_calibrate(self, model: ModelProto) -> tuple[set[str], dict]:
        return self.tensors, {}


class OneByOne:
    """Images as onnxruntime's CalibrationDataReader gives them."""

    def __init__(self, pixels: np.ndarray) -> None:
        self.images = iter(pixels)

    def get_next(self) -> dict[str, np.ndarray] | None:
        image = next(self.images, None)
        return None if image is None else {"pixels": image[None]}


class QuantisedOps(OnnxOps):
    """ranges: of the activations, in the order in which they are met"""

    def __init__(self, network: Network, form: Format, half_weights: bool, ranges: Sequence[Range]) -> None:
        super().__init__(network, form.half, half_weights)
        if form.half:  # from this opset on scales may be fp16
            self.opset, self.ir_version = 19, 9
        self.form, self.ranges = form, iter(ranges)
        self.scales: dict[str, np.ndarray] = {}
        self.in_decoder = False

    # ---- which operations

    def convolve(
        self, x: Value, filters: Value, weight: Array, bias: Array | None, like: Value, **attributes
    ) -> Value:
        if x.channels == PIXEL_CHANNELS:
            return super().convolve(x, filters, weight, bias, like, **attributes)
        x = self.activation(x)
        filters = self.channels(filters, weight, axis=0, bias=bias, times=x)
        biases = [] if bias is None else [self.bias(bias, x, filters)]
        return self.emit("Conv", x, filters, *biases, like=like, **attributes)

    def multiply(self, x: Value, matrix: Value, weight: Array, like: Value) -> Value:
        return super().multiply(self.activation(x), self.channels(matrix, weight, axis=1), weight, like)

    def add(self, a: Value, b: Value) -> Value:
        if not self.in_decoder:  # of what convolutions made and will take: engines add that in 8 bits
            a, b = self.activation(a), self.activation(b)
        return super().add(a, b)

    def decoder_input(self, x: Value) -> Value:
        self.in_decoder = True
        return super().decoder_input(x)

    # ---- how

    def activation(self, x: Value) -> Value:
        low, high = next(self.ranges)
        low, high = min(low, 0.0), max(high, 0.0)
        if self.form.type != TensorProto.UINT8:
            return self.rounded(x, max(-low, high) / self.form.steps, 0, self.form.type)
        scale = self.positive((high - low) / self.form.steps, x)
        return self.rounded(x, scale, np.round(-low / scale), self.form.type)

    def channels(
        self, x: Value, weight: Array, axis: int, bias: Array | None = None, times: Value | None = None
    ) -> Value:
        """x: `weight` (outputs, ...) as a value, its outputs along `axis`; bias: of the products with `times`"""
        scale = np.abs(weight).reshape(len(weight), -1).max(1) / self.form.weight_steps
        if bias is not None and self.compute != HALF:
            # A channel with next to no weights would count its bias in more steps than int32 has, and lose it.
            scale = np.maximum(scale, np.abs(bias) / (self.scales[times.name] * 2.0**30))
        return self.rounded(x, scale, np.zeros(len(weight)), self.form.weight_type, axis=axis)

    def bias(self, bias: Array, x: Value, filters: Value) -> Value:
        if self.compute == HALF:
            return self.weight(bias, x.type)
        # ONNX Runtime fuses a convolution only if its bias counts in the steps of the products.
        scale = self.scales[x.name] * self.scales[filters.name]
        whole = self.constant(np.round(bias / scale), np.int32)
        zeros = self.constant(np.zeros(len(bias)), np.int32)
        return self.emit("DequantizeLinear", whole, self.constant(scale), zeros, like=x, axis=0)

    def rounded(self, x: Value, scale: Array | float, zero: Array | float, type: int, **axis: int) -> Value:
        scale = self.positive(scale, x)
        zero = self.constant(zero, helper.tensor_dtype_to_np_dtype(type))
        step = self.constant(scale, scale.dtype)
        whole = self.emit("QuantizeLinear", x, step, zero, like=x, **axis)
        y = self.emit("DequantizeLinear", whole, step, zero, like=x, **axis)
        self.scales[y.name] = scale
        return y

    def positive(self, scale: Array | float, x: Value) -> np.ndarray:
        """As the graph holds it: in the type of x, and not 0, as those of unused channels would be."""
        dtype = np.float16 if x.type == HALF else np.float32
        return np.maximum(scale, np.finfo(dtype).tiny).astype(dtype)


class ObservedOps(QuantisedOps):
    """Leaves everything as it is, but knows which tensors would be quantised."""

    def __init__(self, network: Network) -> None:
        super().__init__(network, FORMATS["int8"], half_weights=False, ranges=())
        self.observed: list[str] = []

    def activation(self, x: Value) -> Value:
        self.observed.append(x.name)
        return x

    def channels(
        self, x: Value, weight: Array, axis: int, bias: Array | None = None, times: Value | None = None
    ) -> Value:
        return x

    def bias(self, bias: Array, x: Value, filters: Value) -> Value:
        return self.weight(bias, x.type)
