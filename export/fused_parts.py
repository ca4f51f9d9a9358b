"""The parts of a bundle for NVIDIA GPUs.

The fused engine reads the plan, kernels per architecture and self-test images; a builder of TensorRT engines the
graph for the plugin and the same kernels.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..evaluate import Predictions
from ..fused import BATCHES, PLAN
from ..kernels.fold import Network
from ..kernels.plan import Kernel, Plan
from ..kernels.schedule import for_batch
from ..model import OmniAD
from ..versions import versions
from .cubins import check_targets, compile_plan
from .onnx_graph import weights_message
from .parity import score_deviation

SELF_TEST_IMAGES = 4


def fused_parts(
    network: Network,
    targets: Sequence[str],
    report: Callable[[str], None] | None = None,
) -> dict[str, bytes]:
    """name -> content. targets: like "sm_87".

    report is called with a line per architecture. Raises ExportError as `cubins` does, InputError for images that
    are too large for the kernels.
    """
    from ..kernels.network_plan import build_plan  # Triton is needed from here on
    from ..kernels.plugin_plan import plugin_plans
    from .plugin_nodes import build_plugin_graph

    plan = build_plan(network, batch=1)
    for_batch(plan, max(BATCHES))  # fails here, not on the line
    parts = {PLAN: json.dumps(plan.to_dict()).encode()}
    parts["graphs/plugin.onnx"], _ = build_plugin_graph(network)
    for arch in check_targets(targets):
        kernels = compile_plans((plan, *plugin_plans(network)), arch)
        parts |= kernel_parts(kernels, arch)
        if report:
            size = len(parts[f"fused/sm_{arch}.bin"])
            report(f"sm_{arch}: {len(kernels)} kernels, {size} bytes, {len(plan.launches)} launches an image")
    return parts


def kernel_parts(kernels: Mapping[str, Kernel], arch: int) -> dict[str, bytes]:
    """The machine code of all kernels in one part, and in another where each begins, by its key."""
    code, index = bytearray(), {}
    for key, kernel in kernels.items():
        index[key] = {
            "name": kernel.name,
            "offset": len(code),
            "bytes": len(kernel.cubin),
            "shared_bytes": kernel.shared_bytes,
            "num_warps": kernel.num_warps,
        }
        code += kernel.cubin
    described = {"arch": f"sm_{arch}", "versions": versions(), "kernels": index}
    return {f"fused/sm_{arch}.bin": bytes(code), f"fused/sm_{arch}.json": json.dumps(described).encode()}


def compile_plans(plans: Iterable[Plan], arch: int) -> dict[str, Kernel]:
    """The kernels of all by key, each compiled once: a part of the network has few of its own."""
    kernels = {}
    for plan in plans:
        new = tuple(launch for launch in plan.launches if plan.kernel_key(launch) not in kernels)
        kernels |= compile_plan(replace(plan, launches=new), arch)
    return kernels


def self_test(reference: Predictions, model: OmniAD) -> bytes:
    """Some of what the network saw in the gate, images or their tiles, and what the trained network gives of them;
    also the deviation of all images' scores, or 0."""
    tiling = model.config.tiling
    count = len(reference.images.samples) * tiling.count
    chosen = np.unique(np.linspace(0, count - 1, SELF_TEST_IMAGES).astype(int))
    pixels = tiling.pick(reference.images.pixels, chosen)
    anomaly_map, _, embedding = model.predict_all(pixels)
    return weights_message(
        {
            "pixels": pixels.astype(np.float16),  # exact, and our readers know no integers
            "anomaly_map": anomaly_map.astype(np.float32),
            "embedding": embedding.astype(np.float32),
            "score_deviation": np.array(score_deviation(reference) or 0.0, np.float32),
        }
    )
