"""The folder of one training run: the best model, the state to go on from, and the history of its epochs.

model.safetensors   the best by validation loss; without held-out images the last
last.safetensors    weights, optimiser, how far it is: all that resuming needs
history.jsonl       one line an epoch: epoch, loss, lr, seconds, val_loss if it was measured
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.optim import AdamW

from .errors import BundleError, TrainingError
from .files import atomic_write, check_writable
from .model import OmniAD
from .weights import read_header, read_tensors, save_checkpoint, write_tensors

FORMAT = "omniad-run"
MOMENTS = ("exp_avg", "exp_avg_sq")
SAVE_EVERY_S = 60.0  # a state is some 300 MB: written after each of 500 short epochs it would wear out a disk


@dataclass
class State:
    """How far a run is."""

    epoch: int = 0  # epochs done
    steps: int = 0  # optimiser steps done
    loss: float = 0.0  # of the last epoch
    best_epoch: int = 0  # of model.safetensors; 0: there is none yet
    val_loss: float | None = None  # of model.safetensors
    seconds: float = 0.0

    def add(self, record: dict, steps: int, measured: bool) -> None:
        """Take in an epoch of this many steps; measured: it may be the best."""
        self.epoch, self.loss = record["epoch"], record["loss"]
        self.steps += steps
        self.seconds += record["seconds"]
        val_loss = record.get("val_loss")
        if measured and (val_loss is None or self.val_loss is None or val_loss < self.val_loss):
            self.best_epoch, self.val_loss = self.epoch, val_loss


class RunFolder:
    """Reads and writes the files above. facts: what is known of the run, JSON values by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoint = path / "model.safetensors"
        self.last = path / "last.safetensors"
        self.history = path / "history.jsonl"
        self.saved_epoch = 0  # of last.safetensors
        self._saved_at = float("-inf")

    def check(self, facts: dict, resume: bool) -> None:
        """TrainingError if a new run would overwrite one, or the one to resume is not there or another; InputError
        if it cannot be written."""
        check_writable(self.path, is_folder=True)
        if not resume:
            if self.last.exists() or self.checkpoint.exists():
                raise TrainingError(
                    f"{self.path} already holds a training run: resume it, or choose another folder"
                )
            return
        if not self.last.exists():
            raise TrainingError(f"nothing to resume: there is no {self.last}; start without resuming")
        different = differences(self._header("facts"), facts)
        if different:
            raise TrainingError(f"{self.last} cannot be resumed: {'; '.join(different)}")

    def load(self, model: OmniAD, optimizer: AdamW) -> State:
        """Put the last state into the model and its optimiser."""
        state = State(**self._header("state"))
        tensors = read_tensors(self.last)
        try:
            model.load_state_dict({name: tensors[f"model.{name}"] for name in model.state_dict()})
            moments = {  # in their parameters' layout: the fused AdamW goes through both as they lie in memory
                index: {"step": torch.tensor(float(state.steps))}
                | {moment: torch.empty_like(p).copy_(tensors[f"{moment}.{name}"]) for moment in MOMENTS}
                for index, (name, p) in enumerate(trained(model).items())
            }
        except (KeyError, RuntimeError) as exc:
            raise BundleError(f"{self.last}: does not hold the tensors of this network: {exc}") from exc
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        self.saved_epoch = state.epoch
        return state

    def write(self, model: OmniAD, optimizer: AdamW, state: State, record: dict, facts: dict, last: bool) -> None:
        """Write down the epoch of this record; last: there is no other to come."""
        if state.best_epoch == state.epoch:
            save_checkpoint(self.checkpoint, model, facts | record)
        self._add_history(record)
        if last or time.monotonic() - self._saved_at >= SAVE_EVERY_S:
            self._write_state(model, optimizer, state, facts)

    def _add_history(self, record: dict) -> None:
        """Keep the lines of earlier epochs; a resumed run repeats those after its last state."""
        self.path.mkdir(parents=True, exist_ok=True)
        lines = self.history.read_text().splitlines() if self.history.exists() else []
        if len(lines) >= record["epoch"]:
            with atomic_write(self.history) as part:
                part.write_text("".join(f"{line}\n" for line in lines[: record["epoch"] - 1]))
        with self.history.open("a") as file:
            file.write(json.dumps(record) + "\n")

    def _write_state(self, model: OmniAD, optimizer: AdamW, state: State, facts: dict) -> None:
        moments = optimizer.state_dict()["state"]
        tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()} | {
            f"{moment}.{name}": moments[index][moment]
            for index, name in enumerate(trained(model))
            for moment in MOMENTS
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        header = {"format": FORMAT, "facts": json.dumps(facts), "state": json.dumps(asdict(state))}
        write_tensors(self.last, tensors, header)
        self._saved_at, self.saved_epoch = time.monotonic(), state.epoch

    def _header(self, name: str) -> dict:
        header = read_header(self.last)
        if header.get("format") != FORMAT or name not in header:
            raise BundleError(f"{self.last}: not the state of a training run")
        return json.loads(header[name])


def trained(model: OmniAD) -> dict[str, torch.nn.Parameter]:
    """The parameters that training changes, in the optimiser's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def differences(old: dict, new: dict) -> list[str]:
    """In words, which of the values of `new` are others in `old`."""
    words = []
    for name, value in new.items():
        was = old.get(name)
        if isinstance(value, dict) and isinstance(was, dict):
            words += differences(was, value)
        elif isinstance(value, list) and isinstance(was, list) and {*was} != {*value}:
            gone, added = len({*was} - {*value}), len({*value} - {*was})
            words.append(f"{name}: {gone} of {len(was)} are gone, {added} are new")
        elif was != value:
            words.append(f"{name}: the run has {was}, now {value}")
    return words
