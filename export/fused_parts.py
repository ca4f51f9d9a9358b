"""The parts of a bundle that the fused engine reads: the plan, kernels per architecture, self-test images."""

import io
import json
from collections.abc import Callable, Sequence

import numpy as np

from ..evaluate import Predictions
from ..fused import PLAN, SELF_TEST
from ..kernels.fold import Network
from ..versions import versions
from .cubins import check_targets, compile_plan
from .parity import score_deviation

SELF_TEST_IMAGES = 4


def fused_parts(
    network: Network,
    targets: Sequence[str],
    reference: Predictions,
    report: Callable[[str], None] | None = None,
) -> dict[str, bytes]:
    """name -> content. targets: like "sm_87"; reference: the trained network's predictions that the gate saw.

    report is called with a line per architecture. Raises ExportError as `cubins` does.
    """
    from ..kernels.network_plan import build_plan  # Triton is needed from here on

    plan = build_plan(network, batch=1)
    parts = {PLAN: json.dumps(plan.to_dict()).encode(), SELF_TEST: self_test(reference)}
    for arch in check_targets(targets):
        code, index = bytearray(), {}
        for key, kernel in compile_plan(plan, arch):
            index[key] = {
                "name": kernel.name,
                "offset": len(code),
                "bytes": len(kernel.cubin),
                "shared_bytes": kernel.shared_bytes,
                "num_warps": kernel.num_warps,
            }
            code += kernel.cubin
        described = {"arch": f"sm_{arch}", "versions": versions(), "kernels": index}
        parts |= {f"fused/sm_{arch}.bin": bytes(code), f"fused/sm_{arch}.json": json.dumps(described).encode()}
        if report:
            report(f"sm_{arch}: {len(index)} kernels, {len(code)} bytes, {len(plan.launches)} launches an image")
    return parts


def self_test(reference: Predictions) -> bytes:
    """A few of the images, spread over them, with their maps; and the deviation of the scores of all, or 0."""
    pixels, anomaly_maps = reference.images.pixels, reference.anomaly_maps
    chosen = np.unique(np.linspace(0, len(pixels) - 1, SELF_TEST_IMAGES).astype(int))
    file = io.BytesIO()
    np.savez_compressed(
        file,
        pixels=pixels[chosen],
        anomaly_map=anomaly_maps[chosen],
        score_deviation=score_deviation(reference) or 0.0,
    )
    return file.getvalue()
