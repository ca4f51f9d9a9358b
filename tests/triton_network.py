"""A network model for servers without the ONNX Runtime backend: the same file, in ONNX Runtime from Python."""

from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        path = Path(args["model_repository"], args["model_version"], "model.onnx")
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def execute(self, requests):
        pixels = [pb_utils.get_input_tensor_by_name(request, "pixels").as_numpy() for request in requests]
        ends = np.cumsum([len(each) for each in pixels])[:-1]
        outputs = self.session.run(["anomaly_map", "pred_score"], {"pixels": np.concatenate(pixels)})
        maps, scores = (np.split(output, ends) for output in outputs)
        scores = [part[:, None] for part in scores]
        return [
            pb_utils.InferenceResponse([pb_utils.Tensor("anomaly_map", a), pb_utils.Tensor("pred_score", b)])
            for a, b in zip(maps, scores, strict=True)
        ]
