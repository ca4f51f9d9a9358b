"""A stand-in for NVIDIA Triton Inference Server: a repository's Python model beside its network in ONNX Runtime.

Tensors are held against the models' configurations, which the server's own schema has read. The stand-in is also
the module `triton_python_backend_utils`, as far as our model knows it.
"""

import runpy
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import onnxruntime
from google.protobuf import text_format
from google.protobuf.json_format import MessageToJson
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

DTYPES = {"TYPE_UINT8": np.uint8, "TYPE_FP32": np.float32, "TYPE_FP64": np.float64, "TYPE_STRING": np.object_}


class Refused(Exception):
    """An error as a client gets it. code: as the model gave it, or "server"."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class Tensor:
    def __init__(self, name: str, array: np.ndarray) -> None:
        self.name, self.array = name, array
        if array.dtype == np.object_:  # text goes as UTF-8
            texts = [text if isinstance(text, bytes) else text.encode() for text in array.ravel()]
            self.array = np.array(texts, np.object_).reshape(array.shape)

    def as_numpy(self) -> np.ndarray:
        return self.array


class TritonError:
    INVALID_ARG, INTERNAL = "invalid argument", "internal"

    def __init__(self, message: str, code: str = INTERNAL) -> None:
        self.text, self.code = message, code

    def message(self) -> str:
        return self.text


class Response:
    def __init__(self, output_tensors: list[Tensor], error: TritonError | None = None) -> None:
        self.tensors = {tensor.name: tensor for tensor in output_tensors}
        self.failure = error

    def has_error(self) -> bool:
        return self.failure is not None

    def error(self) -> TritonError | None:
        return self.failure


class TritonStandIn:
    """Serves the models of a repository, in which one has a network in ONNX.

    run: pixels -> what the network gives; tests put others in its place
    """

    def __init__(self, repository: Path, monkeypatch) -> None:
        self.configs = {path.parent.name: read_config(path) for path in sorted(repository.glob("*/config.pbtxt"))}
        self.name, self.network = self.configs
        self.folder = repository / self.name
        model = repository / self.network / "1" / "model.onnx"
        session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        names = [output.name for output in self.configs[self.network].output]
        self.run = lambda pixels: session.run(names, {"pixels": pixels})
        monkeypatch.setitem(sys.modules, "triton_python_backend_utils", self.backend_utils())
        monkeypatch.delitem(sys.modules, "omniad_edge.export.triton_model", raising=False)
        config = MessageToJson(self.configs[self.name], preserving_proto_field_name=True)
        self.model = runpy.run_path(str(self.folder / "1" / "model.py"))["TritonPythonModel"]()
        place = {"model_repository": str(self.folder), "model_version": "1", "model_name": self.name}
        self.model.initialize(place | {"model_config": config})

    def backend_utils(self) -> ModuleType:
        module = ModuleType("triton_python_backend_utils")
        module.Tensor, module.TritonError, module.InferenceResponse = Tensor, TritonError, Response
        module.TRITONSERVER_MEMORY_CPU = "cpu"
        module.PreferredMemory = lambda kind, device: (kind, device)
        module.get_input_tensor_by_name = lambda request, name: request.get(name)
        module.get_output_tensor_by_name = lambda response, name: response.tensors.get(name)
        module.get_output_config_by_name = lambda config, name: {o["name"]: o for o in config["output"]}[name]
        module.InferenceRequest = lambda **fields: SimpleNamespace(exec=lambda: self.ask_network(**fields))
        return module

    def ask(self, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """What a client gets. Raises Refused."""
        config = self.configs[self.name]
        check(inputs, config.input)
        (response,) = self.model.execute([{name: Tensor(name, array) for name, array in inputs.items()}])
        if response.failure:
            raise Refused(response.failure.text, response.failure.code)
        outputs = {name: tensor.array for name, tensor in response.tensors.items()}
        check(outputs, config.output)
        assert len(outputs) == len(config.output)
        return outputs

    def ask_network(
        self, model_name: str, requested_output_names: list[str], inputs: list[Tensor], preferred_memory: tuple
    ) -> Response:
        assert (model_name, preferred_memory) == (self.network, ("cpu", 0))
        config = self.configs[self.network]
        (pixels,) = inputs
        assert len(pixels.array) <= config.max_batch_size
        check({pixels.name: pixels.array[0]}, config.input)
        try:
            maps, scores, *rest = self.run(pixels.array)
        except RuntimeError as exc:
            return Response([], TritonError(str(exc)))
        names = [output.name for output in config.output]
        outputs = dict(zip(names, [maps, scores[:, None], *rest], strict=True))  # as its configuration reshapes it
        check({name: array[0] for name, array in outputs.items()}, config.output)
        return Response([Tensor(name, outputs[name]) for name in requested_output_names])


def read_config(path: Path) -> ModelConfig:
    """By the server's schema; fails on any field that this does not have."""
    return text_format.Parse(path.read_text(), ModelConfig())


def check(tensors: dict[str, np.ndarray], described) -> None:
    """Raises Refused where tensors are not what a configuration describes."""
    described = {io.name: io for io in described}
    missing = [
        name for name, io in described.items() if name not in tensors and not getattr(io, "optional", False)
    ]
    if missing or tensors.keys() - described.keys():
        raise Refused(f"expected {', '.join(described)}; got {', '.join(tensors)}", "server")
    for name, array in tensors.items():
        io = described[name]
        dtype, dims = DTYPES[DataType.Name(io.data_type)], tuple(io.dims)
        if array.dtype != dtype or len(dims) != array.ndim:
            raise Refused(f"{name}: expected {dims} of {dtype}, got {array.shape} of {array.dtype}", "server")
        if any(wanted not in (-1, got) for wanted, got in zip(dims, array.shape, strict=True)):
            raise Refused(f"{name}: expected {dims}, got {array.shape}", "server")
