"""A bundle in, a model repository of NVIDIA Triton Inference Server out: for a server that many machines ask.

omniad_<name>/          config.pbtxt, 1/model.py, 1/line.omniad: frames in, verdicts out, on the CPU
omniad_<name>_network/  config.pbtxt, 1/model.onnx or model.plan: the network, on a GPU in batches

How it is served, and why it is made so: serving.md.
"""

import re
from pathlib import Path
from string import Template

from ..bundle import WEIGHTS, Bundle, read_bundle
from ..errors import ExportError, InputError
from ..files import atomic_folder, atomic_write
from ..recognition import embedding_channels
from ..tensorrt_engine import build_server_plan

BUNDLE = "line.omniad"  # the copy whose thresholds apply
MODEL_PY = "from omniad_edge.export.triton_model import TritonPythonModel  # noqa: F401\n"
BATCH = 8  # frames per network call at most, and instances of the model that sends them, each one at a time

DETECTOR = Template("""\
name: "$name"
backend: "python"
max_batch_size: 0  # frames differ in size; their network's inputs are what is batched
input [
  { name: "frame" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ] },  # rows, columns, BGR
  { name: "product" data_type: TYPE_STRING dims: [ 1 ] optional: true }
]
output [
  { name: "pred_label" data_type: TYPE_STRING dims: [ 1 ] },
  { name: "pred_score" data_type: TYPE_FP64 dims: [ 1 ] },
  { name: "threshold" data_type: TYPE_FP64 dims: [ 1 ] },
  { name: "anomaly_map" data_type: TYPE_FP32 dims: [ $height, $width ] },
  { name: "result" data_type: TYPE_STRING dims: [ 1 ] }
]
parameters [
  { key: "backend" value { string_value: "$backend" } },
  { key: "precision" value { string_value: "$precision" } },
  { key: "weights_sha256" value { string_value: "$weights_sha256" } }
]
instance_group [ { kind: KIND_CPU count: $batch } ]  # a process each, with one frame under way
""")

NETWORK = Template("""\
name: "${name}_network"
platform: "$platform"
$batching
input [
  { name: "pixels" data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] }
]
output [
  { name: "anomaly_map" data_type: TYPE_FP32 dims: [ $height, $width ] },
  { name: "pred_score" data_type: TYPE_FP32 dims: [ 1 ] reshape { shape: [ ] } }$embedding
]
instance_group [ { kind: $kind count: 1 } ]
model_warmup [
$warmup
]
""")
EMBEDDING = ',\n  {{ name: "embedding" data_type: TYPE_FP32 dims: [ {} ] }}'
# On a CPU a batch of 8 takes 8 % less time a frame than one by one (the demo's network, one core of an EPYC), but
# its frames wait for each other, and their neighbours change the last bits of a map.
ON_CPU = {
    "backend": "onnxruntime",
    "platform": "onnxruntime_onnx",
    "kind": "KIND_CPU",
    "batching": "max_batch_size: 1",
}
ON_GPU = ON_CPU | {"kind": "KIND_GPU", "batching": f"max_batch_size: {BATCH}\ndynamic_batching {{ }}"}
PLAN = {
    "backend": "tensorrt",
    "platform": "tensorrt_plan",
    "kind": "KIND_GPU",
    "batching": "# The server reads max_batch_size from the plan; if it is above 1, it batches what is waiting.",
}
BUILT_PLAN = PLAN | {"batching": ON_GPU["batching"]}
WARMUP = Template("""\
  {
    name: "batch_$batch" batch_size: $batch
    inputs { key: "pixels" value { data_type: TYPE_UINT8 dims: [ $height, $width, 3 ] zero_data: true } }
  }""")


def write_triton_repository(
    bundle: str | Path,
    out: str | Path,
    gpu: bool = False,
    plan: str | Path | None = None,
    tensorrt: bool = False,
) -> tuple[str, str]:
    """Write the model repository of a bundle; -> the names of its models: the one to ask, and its network.

    out:  folder to write, new or empty; it appears as a whole or not at all
    gpu:  for a server with an NVIDIA GPU: the bundle's fp16 graph, there; else the graph of CPUs, on the CPU
    plan: in place of a graph a TensorRT plan of this bundle, built on that very server
    tensorrt: the same, built now, as this is that server; takes minutes

    Raises ExportError if the folder holds something or the bundle has no such graph, InputError if there is no
    such plan, BundleError as `read_bundle` does, EngineError or MissingDependencyError where none can be built.
    """
    bundle, out = Path(bundle), Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ExportError(f"{out}: expected a new or an empty folder, but it holds something; choose another")
    contents = read_bundle(bundle)
    if contents.tiling.count > 1:
        raise ExportError(
            f"{bundle}: its frames are seen as {contents.tiling}; a model repository cuts no tiles. Inspect with "
            "Detector or `omniad run`, or train without --tiles"
        )
    network = build_server_plan(contents, BATCH) if tensorrt else network_file(contents, gpu, plan)
    name = "omniad_" + re.sub("[^A-Za-z0-9_]", "_", bundle.stem)
    facts = BUILT_PLAN if tensorrt else PLAN if plan else ON_GPU if gpu else ON_CPU
    # ONNX Runtime on a GPU tunes its convolutions for every batch size it meets, the first time.
    sizes = range(1, BATCH + 1) if facts is ON_GPU else [1]
    facts = facts | {"name": name, "height": contents.height, "width": contents.width, "batch": BATCH}
    facts["precision"] = "fp32" if facts["kind"] == "KIND_CPU" else contents.precision
    channels = embedding_channels(contents)
    facts["embedding"] = EMBEDDING.format(channels) if channels else ""
    facts["weights_sha256"] = weights_sha256(contents)
    facts["warmup"] = ",\n".join(WARMUP.substitute(facts, batch=size) for size in sizes)
    files = {
        f"{name}/config.pbtxt": DETECTOR.substitute(facts).encode(),
        f"{name}/1/model.py": MODEL_PY.encode(),
        f"{name}/1/{BUNDLE}": bundle.read_bytes(),
        f"{name}_network/config.pbtxt": NETWORK.substitute(facts).encode(),
        f"{name}_network/1/model.{'plan' if plan or tensorrt else 'onnx'}": network,
    }
    with atomic_folder(out) as folder:
        for path, content in files.items():
            with atomic_write(folder / path) as part:
                part.write_bytes(content)
    return name, f"{name}_network"


def network_file(contents: Bundle, gpu: bool, plan: str | Path | None) -> bytes:
    if plan:
        if not Path(plan).is_file():
            raise InputError(f"{plan}: no such file; expected a TensorRT plan built on the server it is for")
        return Path(plan).read_bytes()
    if gpu and contents.precision != "fp16":
        raise ExportError("this bundle has no fp16 graph for the GPU: export it with --fp16")
    return contents.onnx("fp16" if gpu else "cpu")


def weights_sha256(contents: Bundle) -> str:
    return contents.manifest["parts"][WEIGHTS]["sha256"]
