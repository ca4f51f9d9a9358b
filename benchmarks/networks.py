"""The network under test with seeded weights, and its plain exports: what one has without the folded graph.

A plain export computes the same anomaly map in fp32, from a normalised image, by the usual means: torch's own
ONNX exporter, upsampling by interpolation, smoothing by a convolution. In two forms:
"paper"  the published network's structure, made deterministic: a channels-last residual stream, Linear layers,
         attention literally (softmax(Q K) + pe) V with the learnable tokens projected at run time
"module" our own `OmniAD` module as it is
"""

import io
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omniad_edge.anomaly_map import SCALE, SIGMA_PX, TRUNCATE
from omniad_edge.bundle import describe_input, write_bundle
from omniad_edge.calibration import calibrate
from omniad_edge.engine import OnnxRuntimeEngine
from omniad_edge.export.onnx_graph import OPSET, build_graph, weights_message
from omniad_edge.kernels.fold import fold
from omniad_edge.model import (
    KeyValueAttention,
    ModelConfig,
    OmniAD,
    OmniBlock,
    PatchExpand,
    QueryAttention,
    merge_heads,
    norm_silu,
    normalise,
    split_heads,
)

DEFECTIVE_SHARE = 0.02  # of the map's pixels above the seeded bundle's threshold, so that there are regions


def seeded_model(config: ModelConfig) -> OmniAD:
    """An untrained network whose every parameter counts: latency does not depend on the weights' values.

    What training starts at zero (tokens, pe, biases) is drawn too; a runtime may drop additions of zero.
    """
    torch.manual_seed(0)
    model = OmniAD(config).eval()
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return model


def write_seeded_bundle(path: Path, model: OmniAD, fp16: bool) -> None:
    """A bundle as `omniad-export` writes it, but without training, parity gate and good images."""
    config = model.config
    graph, weights = build_graph(fold(model), half=False, half_weights=fp16)
    parts = {"graphs/cpu.onnx": graph, "weights.onnx": weights_message(weights)}
    pixels = np.random.default_rng(0).integers(0, 256, (1, config.height, config.width, 3), dtype=np.uint8)
    anomaly_map, _ = OnnxRuntimeEngine(graph + parts["weights.onnx"]).run(pixels)
    threshold = float(np.quantile(anomaly_map, 1 - DEFECTIVE_SHARE))
    manifest = {
        "created": "for this benchmark only",
        "versions": {},
        "model": config.to_dict(),
        "precision": "fp16" if fp16 else "fp32",
        "input": describe_input(config.tiling),
        "outputs": ["anomaly_map", "pred_score", "embedding"],
        "recognition": {},
        "products": {"seeded": calibrate([threshold], float(np.median(anomaly_map))).to_dict()},
        # Without an entry bf16 is refused at run time; nobody inspects parts with this bundle.
        "parity": {"engines": {f"openvino {p}": {"passed": True} for p in ("fp32", "bf16")}},
        "trained_on": [],
        "history": [],
    }
    write_bundle(path, manifest, parts)


def export_plain(model: OmniAD, form: str) -> bytes:
    """A complete ONNX model of `form` "paper" or "module", any batch.

    Its input `pixels` is (N, 3, H, W) float32, normalised; its outputs are named and shaped as ours.
    """
    config = model.config
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter is deprecated, and reports every shape that it traces
        torch.onnx.export(
            PlainNetwork(model, form).eval(),
            (torch.zeros(2, 3, config.height, config.width),),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=["pixels"],
            output_names=["anomaly_map", "pred_score"],
            dynamic_axes={name: {0: "N"} for name in ("pixels", "anomaly_map", "pred_score")},
        )
    return file.getvalue()


def normalised(pixels: np.ndarray) -> np.ndarray:
    """(N, H, W, 3) uint8 RGB -> what a plain export takes."""
    return np.ascontiguousarray(normalise(torch.from_numpy(pixels), torch.zeros(())).numpy())


class PlainNetwork(nn.Module):
    """Normalised image (N, 3, H, W) -> anomaly_map (N, H, W), smoothed, and pred_score (N,), its maximum."""

    def __init__(self, model: OmniAD, form: str) -> None:
        super().__init__()
        self.model, self.form = model, form
        self.size = (model.config.height, model.config.width)
        radius = int(TRUNCATE * SIGMA_PX + 0.5)
        kernel = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / SIGMA_PX) ** 2)
        self.radius = radius
        self.register_buffer("kernel", (kernel / kernel.sum())[None, None])  # (1, 1, 33)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        teacher = self.model.teacher(image)
        x = self.model.neck(*teacher)
        student = paper_decoder(self.model.decoder, x) if self.form == "paper" else self.model.decoder(x)
        total = 0
        for t, s in zip(teacher, student, strict=True):
            distance = 1 - F.cosine_similarity(t, s, dim=1)[:, None]
            total = total + F.interpolate(distance, self.size, mode="bilinear", align_corners=True)
        for _ in "yx":
            total = self.smooth_rows(total).transpose(2, 3)
        anomaly_map = total[:, 0] * SCALE
        return anomaly_map, anomaly_map.amax((1, 2))

    def smooth_rows(self, x: Tensor) -> Tensor:
        mirrored = (x[:, :, : self.radius].flip(2), x, x[:, :, -self.radius :].flip(2))
        return F.conv2d(torch.cat(mirrored, dim=2), self.kernel[..., None])


# ---- the published structure; x is (N, H, W, C)


def paper_decoder(decoder: nn.Module, x: Tensor) -> list[Tensor]:
    x = x.permute(0, 2, 3, 1)
    students = []
    for index, stage in enumerate(decoder.stages):
        if index:
            x = paper_expand(decoder.expands[index - 1], x)
        for block in stage:
            x = paper_block(block, x)
        students.append(x.permute(0, 3, 1, 2))
    return students[:0:-1]


def paper_expand(expand: PatchExpand, x: Tensor) -> Tensor:
    n, height, width, c = x.shape
    y = expand.expand(x).reshape(n, height, width, 2, 2, c // 2).permute(0, 1, 3, 2, 4, 5)
    return expand.norm(y.reshape(n, 2 * height, 2 * width, c // 2))


def paper_block(block: OmniBlock, x: Tensor) -> Tensor:
    y = 0
    if block.global_branch is not None:
        m = paper_attention(block.global_branch.step1, x) + x
        y = y + paper_attention(block.global_branch.step2, m) + m + x
    if block.local_branch is not None:
        y = y + block.local_branch(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    y = norm_silu(block.mix(y).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return block.out(y) + x


def paper_attention(step: nn.Module, x: Tensor) -> Tensor:
    n, height, width, c = x.shape
    image = x.flatten(1, 2)  # (N, H*W, C)
    learnt = step.tokens.expand(n, -1, -1) if hasattr(step, "tokens") else None  # (N, T, C)
    from_tokens = isinstance(step, QueryAttention)
    q = split_heads(step.q(learnt if from_tokens else image))
    k, v = map(split_heads, step.kv(learnt if isinstance(step, KeyValueAttention) else image).chunk(2, dim=-1))
    weights = (q @ k.transpose(2, 3) * q.shape[-1] ** -0.5).softmax(-1)
    if learnt is not None:
        weights = weights + step.pe
    o = step.out(merge_heads(weights @ v))
    if from_tokens:
        o = o.transpose(1, 2).reshape(n, c, step.grid, step.grid)
        return F.interpolate(o, size=(height, width), mode="nearest").permute(0, 2, 3, 1)
    return o.reshape(n, height, width, c)
