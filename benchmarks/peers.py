"""PaDiM and PatchCore, of anomalib, on our backbone and our images: for the Python of an environment that has it.

    python3 -m venv peers
    peers/bin/python -m pip install anomalib==2.7.0 torch torchvision    # 6 GB with CUDA
    python benchmarks/accuracy.py --data DIR --peers peers/bin/python

which runs it, in a folder of one product, as
    peers.py fit BACKBONE FOLDER SEED THREADS
        train.npy, test.npy -> METHOD.npz, METHOD.safetensors for each of METHODS; on stdout facts as JSON
    peers.py serve BACKBONE FOLDER METHOD DEVICE THREADS HEIGHT WIDTH
        loads METHOD.safetensors and answers as `process.serve` does

BACKBONE         weights of a ResNet up to layer3 by torchvision's names; its header says which ResNet
*.npy            (N, H, W, 3) uint8 RGB, as our preprocessing made them
METHOD.npz       of the test images: anomaly_maps (N, H, W) and pred_scores (N,), float32
METHOD.safetensors   what the method keeps of the product, all but the backbone

Settings are anomalib's defaults: PaDiM on layers 1 to 3, 100 of their 448 channels (550 of the 1,792 of a ResNet
with bottlenecks); PatchCore on layers 2 and 3, a coreset of a tenth, 9 neighbours. Of which layers features are
taken is part of a method: PatchCore on layer 1 too would have four times the patches to search.
"""

import json
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from anomalib.models.image.padim.torch_model import PadimModel
from anomalib.models.image.patchcore.torch_model import PatchcoreModel
from process import serve
from safetensors import safe_open
from safetensors.torch import load_file, save_file

METHODS = ("padim", "patchcore")
PADIM_CHANNELS = {"resnet18": 100, "resnet34": 100, "resnet50": 550, "wide_resnet50_2": 550}
CORESET = 0.1
NEIGHBOURS = 9
BATCH = 8
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def build(method: str, backbone: Path) -> torch.nn.Module:
    """The method around exactly these weights, not yet fitted."""
    with safe_open(backbone, "pt") as file:
        name = file.metadata()["backbone"]
    if method == "padim":
        layers = ["layer1", "layer2", "layer3"]
        model = PadimModel(name, layers, pre_trained=False, n_features=PADIM_CHANNELS[name])
    else:
        model = PatchcoreModel(["layer2", "layer3"], name, pre_trained=False, num_neighbors=NEIGHBOURS)
    model.feature_extractor.feature_extractor.load_state_dict(load_file(backbone), strict=True)
    return model


def normalised(pixels: np.ndarray, device: str) -> torch.Tensor:
    """(N, H, W, 3) uint8 RGB -> (N, 3, H, W) float32, ImageNet mean 0 and deviation 1."""
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(value, device=device).view(1, 3, 1, 1) for value in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


@torch.inference_mode()
def predict(model: torch.nn.Module, device: str, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """pixels (N, H, W, 3) uint8 RGB -> anomaly_maps (N, H, W), pred_scores (N,)."""
    result = model(normalised(pixels, device))
    return result.anomaly_map[:, 0].cpu().numpy(), result.pred_score.flatten().cpu().numpy()  # (N, 1) of PaDiM


def batches(pixels: np.ndarray) -> list[np.ndarray]:
    return [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]


@torch.no_grad()
def fit(method: str, backbone: Path, train: np.ndarray, seed: int, device: str) -> torch.nn.Module:
    torch.manual_seed(seed)  # PaDiM draws channels, PatchCore a projection
    model = build(method, backbone).to(device).train()  # its backbone stays in eval mode
    for pixels in batches(train):
        model(normalised(pixels, device))
    if method == "padim":
        model.fit()
    else:
        model.subsample_embedding(CORESET)
    return model.eval()


def fit_all(backbone: Path, folder: Path, seed: int, threads: int) -> dict:
    torch.set_num_threads(threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    train, test = (np.load(folder / f"{name}.npy", allow_pickle=False) for name in ("train", "test"))
    fit_s = {}
    for method in METHODS:
        start = perf_counter()
        model = fit(method, backbone, train, seed, device)
        fit_s[method] = round(perf_counter() - start, 2)
        maps, scores = zip(*(predict(model, device, pixels) for pixels in batches(test)), strict=True)
        np.savez(folder / f"{method}.npz", anomaly_maps=np.concatenate(maps), pred_scores=np.concatenate(scores))
        kept = {name: t.cpu().contiguous() for name, t in model.state_dict().items() if not of_backbone(name)}
        save_file(kept, folder / f"{method}.safetensors")
    return {"versions": {name: version(name) for name in ("anomalib", "torch")}, "device": device, "fit_s": fit_s}


def of_backbone(name: str) -> bool:
    return name.startswith("feature_extractor.")


def load(method: str, backbone: Path, folder: Path, device: str) -> torch.nn.Module:
    model = build(method, backbone)
    own = {name: t for name, t in model.state_dict().items() if of_backbone(name)}
    model.load_state_dict(own | load_file(folder / f"{method}.safetensors"), strict=True)
    return model.to(device).eval()


def serve_one(backbone: Path, folder: Path, method: str, device: str, threads: int, *size: int) -> None:
    torch.set_num_threads(threads)
    pixels = np.random.default_rng(0).integers(0, 256, (1, *size, 3), dtype=np.uint8)
    serve(partial(predict, load(method, backbone, folder, device), device, pixels))


def main(command: str, backbone: str, folder: str, *rest: str) -> None:
    torch.backends.cudnn.allow_tf32 = False  # as our own fp32
    if command == "fit":
        print(json.dumps(fit_all(Path(backbone), Path(folder), *map(int, rest))))
    else:
        method, device, *numbers = rest
        serve_one(Path(backbone), Path(folder), method, device, *map(int, numbers))


if __name__ == "__main__":
    main(*sys.argv[1:])
