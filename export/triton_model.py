"""The model of a repository of `triton_repository` that takes frames and gives verdicts.

Runs in NVIDIA Triton Inference Server, whose Python backend starts it in one process per instance: a Detector
whose network is another model of the same server.
"""

import json
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils  # the server brings it

from ..bundle import read_bundle
from ..detector import Detector
from ..engine import OUTPUTS, CpuEngine, Outputs, with_embedding
from ..errors import BundleError, EngineError, InputError, OmniADError
from ..recognition import embedding_channels, read_recogniser
from ..result import Result
from .triton_repository import BUNDLE, weights_sha256


class ServedNetwork(CpuEngine):
    """The network as a model of this server. Frames are resized here, as on every CPU.

    model: name of the network's model; backend, precision: what computes it there; embeds: it gives embeddings
    """

    reason = "the model server's"

    def __init__(self, model: str, backend: str, precision: str, height: int, width: int, embeds: bool) -> None:
        super().__init__(threads=1)
        self.model, self.backend, self.precision = model, backend, precision
        self.size = height, width
        self.embeds, self.names = embeds, list(OUTPUTS[: 3 if embeds else 2])

    @property
    def input_size(self) -> tuple[int, int]:
        return self.size

    def run(self, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.run_all(pixels)[:2]

    def run_all(self, pixels: np.ndarray) -> Outputs:
        request = pb_utils.InferenceRequest(
            model_name=self.model,
            requested_output_names=self.names,
            inputs=[pb_utils.Tensor("pixels", pixels)],
            preferred_memory=pb_utils.PreferredMemory(pb_utils.TRITONSERVER_MEMORY_CPU, 0),
        )
        response = request.exec()
        if response.has_error():
            raise EngineError(f"model {self.model} failed on pixels {pixels.shape}: {response.error().message()}")
        outputs = [pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in self.names]
        outputs[1] = outputs[1].reshape(-1)  # (N, 1): the server knows no scalars
        return with_embedding(outputs)


class TritonPythonModel:
    """What the Python backend looks for: it calls `initialize` once, then `execute`."""

    def initialize(self, args: dict[str, str]) -> None:
        """args: what the server tells of this model, among it its folder and its config.pbtxt as JSON."""
        config = json.loads(args["model_config"])
        fact = {name: value["string_value"] for name, value in config["parameters"].items()}
        height, width = map(int, pb_utils.get_output_config_by_name(config, "anomaly_map")["dims"])
        network = args["model_name"] + "_network"
        self.bundle = Path(args["model_repository"], args["model_version"], BUNDLE)
        embeds = embedding_channels(read_bundle(self.bundle)) > 0
        engine = ServedNetwork(network, fact["backend"], fact["precision"], height, width, embeds)
        self.weights_sha256 = fact["weights_sha256"]
        self.detector = Detector(self.bundle, engine=engine)
        self.read_thresholds()

    def read_thresholds(self) -> None:
        changed_ns = self.bundle.stat().st_mtime_ns  # before reading: a file replaced meanwhile is read once more
        contents = read_bundle(self.bundle)
        if weights_sha256(contents) != self.weights_sha256:
            raise BundleError(
                f"{self.bundle}: its network is not the one served here; write a new repository of it"
            )
        self.detector.calibrations, self.detector.recogniser = contents.products, read_recogniser(contents)
        self.changed_ns = changed_ns

    def execute(self, requests: list) -> list:
        """One response a request: a verdict, or an error in words."""
        return [self.answer(request) for request in requests]

    def answer(self, request):
        frame = pb_utils.get_input_tensor_by_name(request, "frame").as_numpy()
        product = pb_utils.get_input_tensor_by_name(request, "product")
        try:
            # `omniad calibrate` changes it. Reading takes 0.05 s (18 MB, one core of an EPYC). The server could
            # load this model again instead, but then requests wait: 9 s on two busy cores.
            if self.bundle.stat().st_mtime_ns != self.changed_ns:
                self.read_thresholds()
            name = None if product is None else product.as_numpy()[0].decode(errors="replace")
            return pb_utils.InferenceResponse(tensors(self.detector(frame, name)))
        except (OmniADError, OSError) as exc:
            error = pb_utils.TritonError
            code = error.INVALID_ARG if isinstance(exc, InputError) else error.INTERNAL
            return pb_utils.InferenceResponse([], error(str(exc), code))


def tensors(result: Result) -> list:
    """The outputs of the model; `result` is `Result.to_dict` as JSON."""
    values = {
        "pred_label": np.array([result.pred_label], np.object_),
        "pred_score": np.array([result.pred_score]),
        "threshold": np.array([result.threshold]),
        "anomaly_map": result.anomaly_map,
        "result": np.array([json.dumps(result.to_dict())], np.object_),
    }
    return [pb_utils.Tensor(name, value) for name, value in values.items()]
