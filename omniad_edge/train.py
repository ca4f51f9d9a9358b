"""Training: good images of one or several products -> one checkpoint.

Source: paper III-C. The teacher is frozen; the neck and the decoder learn to reconstruct its features.
An epoch's order and noise depend on (seed, epoch) only, so that on one machine a resumed run equals the
uninterrupted one bit for bit.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW

from .distributed import World, mean_of_losses, processes, share
from .errors import InputError, TrainingError
from .model import ModelConfig, OmniAD, normalise, reconstruction_loss
from .progress import Report, counting, progress_display, say
from .run_folder import RunFolder, State, trained
from .training_images import check_memory, describe_images, load_good_images, relative_paths, split_holdout
from .versions import versions
from .weights import load_backbone

LEARNING_RATE = 1e-3
LR_DROP, LR_DROP_AT = 0.1, 0.8  # times this, after this part of the epochs
BETAS = (0.9, 0.999)
WEIGHT_DECAY = 1e-4
CLIP_NORM = 5.0
CHECK_EVERY = 20  # steps; reading a loss makes the CPU wait for the GPU
MAX_SEED = 2**63 - 1  # NumPy takes any whole number from 0 on, torch up to 2**64 - 1, less what `fit` adds


@dataclass(frozen=True)
class TrainingResult:
    """checkpoint: the best measured model, of `best_epoch`; val_loss: its loss on held-out images, if any.

    loss: mean of the last epoch; trained_on, held_out, broken: numbers of images; seconds: of all epochs.
    """

    checkpoint: Path
    best_epoch: int
    val_loss: float | None
    loss: float
    trained_on: int
    held_out: int
    broken: int
    seconds: float


def train(
    data: str | Path,
    out: str | Path,
    config: ModelConfig,
    *,
    epochs: int = 500,
    backbone_weights: str = "procedural",
    batch_size: int = 16,
    holdout: float = 0.1,
    validate_every: int = 0,
    seed: int = 42,
    cache_features: bool = False,
    on_broken: str = "stop",
    resume: bool = False,
    device: str = "auto",
    progress: Report | None = None,
) -> TrainingResult:
    """Train one network on the good images of every product in `data`; the files in `out` are RunFolder's.

    config: where it has `tiles`, every tile of an image is trained on as an image of its own; an image is held out
        with all its tiles.
    epochs: 500 in the paper for MVTec AD and VisA, 100 for Real-IAD.
    backbone_weights: "procedural", "imagenet", a file, or "none" (see load_backbone).
    batch_size: images or tiles per step and process. An incomplete last batch is left out, as the published loader
        does; where there are fewer images than a batch, all of them are the batch.
    holdout: part of each product's images that is never trained on, at least one of two; 0 for none.
    validate_every: epochs between measurements of the loss on held-out images; 0: after the last only. The
        best of the measured epochs is kept, or without held-out images the last.
    cache_features: compute the teacher's features once and keep them in memory (1.8 MB an image of 256 x 256);
        equal to rounding. Saves a tenth of a step's time at 128 x 128 (preset small, batch 16, two cores of an AMD
        EPYC; benchmarks/results/training-2-core-epyc.json).
    on_broken: "stop" at an image that cannot be read, or "skip" it, which evaluation and export then do too.
    resume: go on with the run in `out`; settings and images must be the same (device and cache may differ).
    device: "auto" (CUDA if there is one), "cpu", "cuda", or one of several, as "cuda:1".
    progress: gets a dict with epoch, epochs, step, steps, loss, lr, at an epoch's end also seconds and, where
        measured, val_loss; None: shown on stderr.

    Under torchrun all processes train one model, equal to one process with the whole batch. Seeds torch's
    global generator. Raises DataError, DownloadError, BundleError, InputError for bad arguments, and
    TrainingError: `out` holds another run, memory is too small, the loss is not finite.
    """
    if not 0 <= holdout < 1:
        raise InputError(f"holdout: expected a part from 0 up to, not including, 1; got {holdout}")
    settings = {
        "model": config.to_dict(),
        "data": str(Path(data).resolve()),
        "epochs": at_least(1, epochs, "epochs"),
        "backbone_weights": backbone_weights,
        "batch_size": at_least(1, batch_size, "batch_size"),
        "holdout_fraction": holdout,
        "validate_every": at_least(0, validate_every, "validate_every"),
        "seed": checked_seed(seed),
    }
    with processes(device) as world, memory_errors(batch_size, config):
        facts = settings | {"processes": world.size}
        run = RunFolder(Path(out))
        run.check(facts, resume)  # before minutes of reading
        shown = progress is None and world.rank == 0
        torch.manual_seed(seed)
        model = OmniAD(config)
        if world.rank == 0:  # the others get its weights, and write nothing
            backbone = load_backbone(model.teacher, config.backbone, backbone_weights)
        images = load_good_images(settings["data"], *config.tiling.size, on_broken, world.local_size, shown)
        training, held_out = split_holdout(images.samples, holdout, seed)
        if world.rank == 0:
            facts |= describe_images(images.samples, training, held_out, settings["data"])
            run.check(facts, resume)
            broken = relative_paths([path for path, _ in images.broken], settings["data"])
            facts |= {"backbone": backbone, "broken": broken, "versions": versions()}
        seen = [config.tiling.tiles_of(some) for some in (training, held_out)]
        trainer = Trainer(model, images.pixels, *seen, batch_size, world)
        state = run.load(model, trainer.optimizer) if resume else State()
        if cache_features:
            trainer.cache_features(shown)
        with progress_display() if shown else nullcontext(progress or (lambda report: None)) as report:
            fit(trainer, run, state, facts, report)
    return TrainingResult(
        checkpoint=run.checkpoint,
        best_epoch=state.best_epoch,
        val_loss=state.val_loss,
        loss=state.loss,
        trained_on=len(training),
        held_out=len(held_out),
        broken=len(images.broken),
        seconds=state.seconds,
    )


@contextmanager
def memory_errors(batch_size: int, config: ModelConfig) -> Iterator[None]:
    """TrainingError in place of what NumPy and torch raise when there is no memory left."""
    try:
        yield
    except (RuntimeError, MemoryError) as exc:
        # On a CPU torch has no class for it, only these words.
        words = ("DefaultCPUAllocator", "bad_alloc")
        known = isinstance(exc, (torch.OutOfMemoryError, MemoryError)) or any(word in str(exc) for word in words)
        if not known:
            raise
        said = str(exc).partition("\n")[0]  # lines of C++ may follow
        raise TrainingError(
            f"out of memory with batches of {batch_size} at {config.tiling}: use a smaller batch size, input "
            f"size, size of frames to be seen in tiles, or network ({said})"
        ) from exc


def fit(trainer: "Trainer", run: RunFolder, state: State, facts: dict, report: Report) -> None:
    """Train the epochs that `state` still lacks, and write each down in the run's folder."""
    epochs, every, writes = facts["epochs"], facts["validate_every"], trainer.world.rank == 0
    try:
        for epoch in range(state.epoch + 1, epochs + 1):
            started = time.monotonic()
            lr = learning_rate(epoch, epochs)
            record = {"epoch": epoch, "lr": lr}
            torch.manual_seed(facts["seed"] + 1_000_003 * epoch)  # hence no generator's state is saved
            for step, loss in trainer.epoch(lr):
                record["loss"] = loss
                report(record | {"epochs": epochs, "step": step, "steps": trainer.steps})
            measured = epoch == epochs or (every > 0 and epoch % every == 0)
            if measured and len(trainer.held_out):
                record["val_loss"] = trainer.validation_loss()
            record["seconds"] = round(time.monotonic() - started, 3)
            state.add(record, trainer.steps, measured)
            if writes:
                run.write(trainer.model, trainer.optimizer, state, record, facts, last=epoch == epochs)
            report(record | {"epochs": epochs, "step": step, "steps": trainer.steps})
    except FloatingPointError as exc:
        raise TrainingError(f"epoch {epoch}: {exc}; {run.last} holds epoch {run.saved_epoch}") from exc
    except KeyboardInterrupt:
        if writes:
            kept = f"{run.last} holds epoch {run.saved_epoch}: go on with the same command and --resume"
            say(f"interrupted in epoch {epoch}; {kept if run.saved_epoch else 'nothing is saved yet'}")
        raise


def learning_rate(epoch: int, epochs: int) -> float:
    return LEARNING_RATE * (LR_DROP if epoch > LR_DROP_AT * epochs else 1)


class Trainer:
    """The network, its optimiser and its images.

    pixels: (N, rows, columns, 3) uint8 RGB; training, held_out: numbers of their tiles (`Tiling.tiles_of`), which
    are the images that the network sees; batch_size: of these per process.
    """

    def __init__(
        self,
        model: OmniAD,
        pixels: np.ndarray,
        training: np.ndarray,
        held_out: np.ndarray,
        batch_size: int,
        world: World,
    ) -> None:
        if world.size > 1 and len(training) < batch_size * world.size:
            raise TrainingError(
                f"{world.size} processes with batches of {batch_size} need {batch_size * world.size} images "
                f"to train on; there are {len(training)}: use smaller batches or fewer processes"
            )
        self.world = world
        self.pixels, self.tiling = pixels, model.config.tiling
        self.training, self.held_out = torch.from_numpy(training), torch.from_numpy(held_out)
        self.cached: list[Tensor] | None = None
        self.batch_size = min(batch_size * world.size, len(training))  # of all processes
        self.steps = len(training) // self.batch_size  # per epoch
        self.on_gpu = world.device.type == "cuda"
        self.layout = torch.channels_last if self.on_gpu else torch.contiguous_format
        self.model = model.to(world.device, memory_format=self.layout)
        self.student = share(self.model, world)
        self.parameters = list(trained(model).values())
        self.optimizer = AdamW(self.parameters, LEARNING_RATE, BETAS, weight_decay=WEIGHT_DECAY, fused=True)

    def epoch(self, lr: float) -> Iterator[tuple[int, float]]:
        """One pass over the training images in random order.

        Yields the step and the mean loss so far, every CHECK_EVERY steps and after the last.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        order = torch.randperm(len(self.training))
        each = self.batch_size // self.world.size
        losses, total = [], 0.0
        for step in range(1, self.steps + 1):
            start = (step - 1) * self.batch_size + self.world.rank * each
            losses.append(self.step(order[start : start + each]))
            if len(losses) == CHECK_EVERY or step == self.steps:
                total += self.finite_sum(losses, step)
                losses = []
                yield step, total / step

    def step(self, rows: Tensor) -> Tensor:
        """One step on these training images; the loss, nan if the gradient is not finite."""
        with self.autocast():
            teacher = self.teacher(rows)
            loss = reconstruction_loss(teacher, self.student(*teacher))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        return torch.where(norm.isfinite(), loss.detach(), torch.nan)

    def finite_sum(self, losses: list[Tensor], step: int) -> float:
        """Sum of the last losses, up to `step`, each the mean over all processes."""
        values = mean_of_losses(torch.stack(losses), self.world).tolist()
        for index, value in enumerate(values, step - len(values) + 1):
            if not math.isfinite(value):
                raise FloatingPointError(f"loss or gradient is not finite in step {index} of {self.steps}")
        return sum(values)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Mean reconstruction loss of the held-out images. Every process computes it, to the same result."""
        self.model.eval()
        total = 0.0
        for rows in self.held_out.split(self.batch_size):
            with self.autocast():
                teacher = self.see(rows)
                total += reconstruction_loss(teacher, self.model.student(teacher)).item() * len(rows)
        if not math.isfinite(total):
            raise FloatingPointError("the loss on held-out images is not finite")
        return total / len(self.held_out)

    @torch.no_grad()
    def cache_features(self, shown: bool = False) -> None:
        """Compute the teacher's features of all training images; TrainingError if memory is too small."""
        shapes = [f.shape[1:] for f in self.see(self.training[:1])]
        n = len(self.training)
        needed = n * sum(shape.numel() for shape in shapes) * 4
        check_memory(f"the features of {n} images", needed, self.world.local_size)
        cached = [torch.empty(n, *shape) for shape in shapes]
        with counting("teacher's features", n) if shown else nullcontext(lambda done: None) as progress:
            for rows in torch.arange(n).split(self.batch_size):
                for store, feature in zip(cached, self.see(self.training[rows]), strict=True):
                    store[rows] = feature.float().cpu()
                progress(int(rows[-1]) + 1)
        self.cached = cached

    @torch.no_grad()
    def teacher(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The teacher's features of these training images."""
        if self.cached is None:
            return self.see(self.training[rows])
        return tuple(f[rows].to(self.world.device, memory_format=self.layout) for f in self.cached)

    def see(self, images: Tensor) -> tuple[Tensor, ...]:
        """The teacher's features of these images."""
        pixels = torch.from_numpy(self.tiling.pick(self.pixels, images.numpy()))
        x = normalise(pixels.to(self.world.device), self.parameters[0])
        with self.autocast():
            return self.model.teacher(x.contiguous(memory_format=self.layout))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.on_gpu)


def checked_seed(seed: int) -> int:
    if at_least(0, seed, "seed") > MAX_SEED:
        raise InputError(f"seed: expected a whole number from 0 to {MAX_SEED}; got {seed}")
    return seed


def at_least(least: int, value: int, name: str) -> int:
    if not isinstance(value, int) or value < least:
        raise InputError(f"{name}: expected a whole number from {least} on; got {value!r}")
    return value
