"""Weights on disk: our checkpoints, the published ones, and the teacher's.

A checkpoint is one safetensors file: float32 tensors by our names, and a header with the network's sizes
and the facts of its training. Nothing is unpickled; .pth files go through torch's weights-only reader.
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .backbone import ResNet
from .bundle import is_bundle
from .download import fetch
from .errors import BundleError, InputError
from .files import atomic_write, file_sha256
from .model import ModelConfig, OmniAD
from .published import published_name

FORMAT = "omniad-checkpoint"
SCHEMA = 1

# torchvision's ImageNet weights: the file, whose name ends in the start of its SHA-256, and its size in MB.
PROCEDURAL = Path(__file__).parent / "backbones"  # what `omniad pretrain` made
IMAGENET_URL = "https://download.pytorch.org/models"
IMAGENET = {
    "resnet18": ("resnet18-f37072fd", 45),
    "resnet34": ("resnet34-b627a593", 84),
    "resnet50": ("resnet50-0676ba61", 98),
    "wide_resnet50_2": ("wide_resnet50_2-95faca4d", 132),
}


def save_checkpoint(path: str | Path, model: OmniAD, facts: dict) -> None:
    """Write the model and what is known of its training (any JSON values), atomically."""
    tensors = {
        name: (t.float() if t.is_floating_point() else t).cpu().contiguous()
        for name, t in model.state_dict().items()
    }
    write_tensors(
        path,
        tensors,
        {
            "format": FORMAT,
            "schema": str(SCHEMA),
            "config": json.dumps(model.config.to_dict()),
            "facts": json.dumps(facts),
        },
    )


def load_checkpoint(path: str | Path) -> tuple[OmniAD, dict]:
    """The model, on the CPU in eval mode, and the facts it was saved with.

    Raises BundleError if the file is missing, damaged, not a checkpoint of ours, written by a newer version,
    or does not hold the tensors of the network it describes.
    """
    header = read_header(path)
    if header.get("format") != FORMAT:
        raise BundleError(f"{path}: not an omniad checkpoint; published weights load with load_published()")
    try:
        if int(header["schema"]) > SCHEMA:
            raise BundleError(
                f"{path}: written by a newer version (schema {header['schema']}, this one reads up to "
                f"{SCHEMA}): upgrade omniad-edge"
            )
        config, facts = ModelConfig(**json.loads(header["config"])), dict(json.loads(header["facts"]))
        tensors = read_tensors(path)
        if sum(config.depths) > len(tensors):  # a forged depth must not build a million blocks first
            raise BundleError(f"{path}: {len(tensors)} tensors cannot be the blocks {config.depths}")
        return fill(config, tensors, str(path)), facts
    except (KeyError, TypeError, ValueError) as exc:
        raise BundleError(f"{path}: the checkpoint's header is damaged: {exc}") from exc


def checkpoint_of(run: str | Path) -> Path:
    """The file of a training run's folder, or `run` if it is no folder. Raises BundleError if there is none."""
    path = Path(run)
    if is_bundle(path):
        raise BundleError(f"{path}: expected a training run's folder or its model.safetensors; this is a bundle")
    if path.is_dir():
        path = path / "model.safetensors"
        if not path.exists():
            raise BundleError(f"{path}: there is no such file; is this a training run, and did it end?")
    return path


def load_run(path: str | Path) -> tuple[OmniAD, dict]:
    """load_checkpoint of a training run's folder, or of its file; the facts are sure to be a training's.

    Raises BundleError as above, and if the run has not measured a model yet.
    """
    path = checkpoint_of(path)
    model, facts = load_checkpoint(path)
    missing = [name for name in ("data", "holdout", "trained_on", "backbone") if name not in facts]
    if missing:
        raise BundleError(f"{path}: not of a training run: its facts lack {', '.join(missing)}")
    return model, facts


def load_published(path: str | Path, config: ModelConfig) -> OmniAD:
    """The published code's state dict (.pth or .safetensors) as a model of ours, on the CPU in eval mode.

    The published code makes its attention output anew at each call, so its files lack it: they fit
    attention_output="none" only, unless somebody added `toProxy.ffn1` and `toProxy.ffn2`.
    Raises InputError if `config` cannot be such a network, BundleError if the file does not hold it.
    """
    if config.attention != "q+kv" or config.branches != "both":
        raise InputError(
            'published weights are those of attention "q+kv" and branches "both"; '
            f'got "{config.attention}" and "{config.branches}"'
        )
    state = read_state(path)
    with torch.device("meta"):
        ours = {name: published_name(name) for name in OmniAD(config).state_dict()}
    missing = [p for p in ours.values() if p not in state and not p.endswith("num_batches_tracked")]
    unexpected = sorted(set(state) - set(ours.values()))
    unexpected = [name for name in unexpected if not name.startswith(("net_t.layer4.", "net_t.fc."))]
    if missing or unexpected:
        hint = ""
        if any(".ffn" in name for name in missing):
            hint = ' The attention output is in no published file: use attention_output="none".'
        raise BundleError(
            f"{path}: does not fit this network: {listed(missing)} missing, {listed(unexpected)} unexpected.{hint}"
        )
    count = torch.zeros((), dtype=torch.long)
    return fill(config, {name: state.get(p, count) for name, p in ours.items()}, str(path))


def load_backbone(teacher: ResNet, name: str, source: str) -> str:
    """Fill the teacher, a ResNet(name), and say in words from what.

    source: "procedural" (ours, in this package: ResNet18 and 34), "imagenet" (torchvision's, downloaded once), a
    .pth or .safetensors file with torchvision's names (its `layer4` and `fc` are not used), or "none": the
    random weights stay, with a warning.
    Raises DownloadError, InputError if there is no such file, BundleError if it is damaged or of another
    network.
    """
    if source == "none":
        warnings.warn("the teacher has random weights: detection will be poor", stacklevel=2)
        return f"none (random, seed {torch.initial_seed()})"
    if source == "imagenet":
        file, size_mb = IMAGENET[name]
        path = fetch(f"{IMAGENET_URL}/{file}.pth", file.rsplit("-", 1)[1], size_mb=size_mb)
        words = f"ImageNet (torchvision {file})"
    elif source == "procedural":
        path = PROCEDURAL / f"{name}.safetensors"
        if not path.is_file():
            have = ", ".join(sorted(file.stem for file in PROCEDURAL.glob("*.safetensors")))
            raise InputError(f"procedural weights: there are some for {have}; got {name}. See `omniad pretrain`")
        words = f"procedural pictures (omniad-edge {path.stem}, sha256 {file_sha256(path)[:8]}...)"
    else:
        path = Path(source)
        if not path.is_file():
            raise InputError(
                f'backbone weights: expected "procedural", "imagenet", "none" or a file; there is no {path}'
            )
        words = f"file {path.name} (sha256 {file_sha256(path)[:8]}...)"
    state = {k: v for k, v in read_state(path).items() if not k.startswith(("layer4.", "fc."))}
    fill_module(teacher, state, f"{path} as {name}")
    return words


def fill(config: ModelConfig, tensors: dict[str, Tensor], source: str) -> OmniAD:
    """A model of `config` with exactly these tensors, on the CPU in eval mode."""
    with torch.device("meta"):
        model = OmniAD(config)
    fill_module(model, tensors, source)
    return model.eval()


def fill_module(module: nn.Module, tensors: dict[str, Tensor], source: str) -> None:
    """Copy tensors into the module by name; BundleError unless names and shapes are exactly its own.

    A module on the meta device gets memory on the CPU, after that check.
    """
    own = module.state_dict()
    tensors = {name: torch.zeros(()) for name in own if name.endswith("num_batches_tracked")} | tensors
    missing, unexpected = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    if missing or unexpected:
        raise BundleError(f"{source}: {listed(missing)} missing, {listed(unexpected)} unexpected")
    for name, tensor in own.items():
        if tensors[name].shape != tensor.shape:
            raise BundleError(
                f"{source}: {name}: expected shape {tuple(tensor.shape)}; got {tuple(tensors[name].shape)}"
            )
    if any(tensor.is_meta for tensor in own.values()):
        module.to_empty(device="cpu")
    module.load_state_dict(tensors)


def listed(names: list[str]) -> str:
    """How many names, and the first three."""
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else "none"


def write_tensors(path: str | Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """One safetensors file, atomically. Raises OSError (disk full, no permission)."""
    with atomic_write(path) as part:
        try:
            save_file(tensors, part, metadata=header)
        except SafetensorError as exc:  # also where it is the system's error
            raise OSError(f"{path}: could not be written: {exc}") from exc


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; BundleError if it is missing or damaged."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def read_header(path: str | Path) -> dict[str, str]:
    """The header of a safetensors file, without reading its tensors; BundleError as above."""
    with _opened(path) as file:
        return file.metadata() or {}


@contextmanager
def _opened(path: str | Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError as exc:
        raise BundleError(f"{path}: there is no such file") from exc
    except (OSError, SafetensorError, ValueError) as exc:
        raise BundleError(f"{path}: not a safetensors file, or damaged: {exc}") from exc


def read_state(path: str | Path) -> dict[str, Tensor]:
    """A state dict of somebody else: .safetensors or torch's format, without wrappers and `module.`."""
    if Path(path).suffix == ".safetensors":
        state = read_tensors(path)
    else:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as exc:
            raise BundleError(f"{path}: there is no such file") from exc
        except Exception as exc:  # whatever the reader makes of a damaged or forged file
            raise BundleError(
                f"{path}: not a file of weights that can be read without running code in it; save its bare "
                f"state dict ({type(exc).__name__})"
            ) from exc
    for wrapper in ("net", "state_dict"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BundleError(f"{path}: expected a dictionary of tensors, bare or in 'net' or 'state_dict'")
    return {key.removeprefix("module."): value for key, value in state.items()}
