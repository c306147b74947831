#!/usr/bin/env python3
"""Trains the embedded sample on Fashion-MNIST and writes what `tvm_compress/samples` ships.

The 1,000 images that the sample gives for validation are never trained on, so that accuracy during a search
is honest. A run that was interrupted goes on from its last epoch.
"""

import argparse
import io
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save as safetensors_bytes
from torch.nn import functional

from tvm_compress.data.dataset import stratified_indices
from tvm_compress.data.idx import FASHION_CLASSES, read_idx_part
from tvm_compress.samples.resnet8 import ResNet8

ROOT = Path(__file__).resolve().parent.parent
SIZES = {"train": 5000, "validation": 1000, "test": 1000}


@dataclass(frozen=True)
class Data:
    """All of Fashion-MNIST as uint8 [N, 1, 28, 28], and which images the sample ships."""

    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]
    shipped: dict[str, np.ndarray]

    @property
    def trained_on(self) -> np.ndarray:
        """Indices of the training images without those of the shipped validation part."""
        return np.setdiff1d(np.arange(len(self.train[1])), self.shipped["validation"])


def read_data(folder: Path, seed: int) -> Data:
    train, test = read_idx_part(folder, "train"), read_idx_part(folder, "t10k")
    if train is None or test is None:
        raise SystemExit(f"{folder} has no Fashion-MNIST: apt-get install dataset-fashion-mnist")
    rng = np.random.default_rng(seed)
    validation = stratified_indices(train[1], SIZES["validation"], rng)
    rest = np.setdiff1d(np.arange(len(train[1])), validation)
    shipped = {
        "validation": validation,
        "train": rest[stratified_indices(train[1][rest], SIZES["train"], rng)],
        "test": stratified_indices(test[1], SIZES["test"], rng),
    }
    return Data(train, test, shipped)


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift each image by up to two pixels and mirror half of them."""
    n, _, height, width = x.shape
    padded = functional.pad(x, (2, 2, 2, 2))
    shift = torch.randint(0, 5, (2, n), generator=generator)
    rows = shift[0][:, None] + torch.arange(height)
    columns = shift[1][:, None] + torch.arange(width)
    mirrored = torch.rand(n, generator=generator) < 0.5
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    return padded[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None, :]][:, None]


def accuracy(model: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    model.eval()
    with torch.no_grad():
        right = sum(
            int((model(part).argmax(1) == labels).sum())
            for part, labels in zip(x.split(500), y.split(500), strict=True)
        )
    return right / len(y)


@dataclass(frozen=True)
class Training:
    """A network with its optimizer and learning rate: what a checkpoint holds."""

    model: ResNet8
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler

    @classmethod
    def start(cls, args: argparse.Namespace, images: int) -> "Training":
        """SGD with Nesterov momentum under a one-cycle rate, from weights drawn by the seed."""
        torch.manual_seed(args.seed)
        model = ResNet8().to(memory_format=torch.channels_last)
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, args.lr, epochs=args.epochs, steps_per_epoch=-(-images // args.batch)
        )
        return cls(model, optimizer, schedule)

    def save(self, path: Path, epoch: int, settings: dict) -> None:
        """Write the checkpoint after `epoch` epochs."""
        state = {name: part.state_dict() for name, part in vars(self).items()}
        buffer = io.BytesIO()
        torch.save(state | {"epoch": epoch, "settings": settings}, buffer)
        write(path, buffer.getvalue())

    def resume(self, path: Path, settings: dict) -> int:
        """Take up what a checkpoint holds, if there is one; returns the number of epochs that are done."""
        if not path.is_file():
            return 0
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            raise SystemExit(
                f"{path} is of a run with {state['settings']}: delete it, or name another --checkpoint"
            )
        for name, part in vars(self).items():
            part.load_state_dict(state[name])
        print(f"resumed after epoch {state['epoch']}", flush=True)
        return state["epoch"]

    def run_epoch(self, x: torch.Tensor, y: torch.Tensor, batch: int, generator: torch.Generator) -> float:
        """One pass over the images with label smoothing; returns the mean loss."""
        self.model.train()
        total = 0.0
        for indices in torch.randperm(len(y), generator=generator).split(batch):
            images = augment(x[indices], generator).contiguous(memory_format=torch.channels_last)
            loss = functional.cross_entropy(self.model(images), y[indices], label_smoothing=0.1)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += loss.item() * len(indices)
        return total / len(y)


def train(args: argparse.Namespace, data: Data, mean: float, std: float) -> ResNet8 | None:
    """Train, with a checkpoint after each epoch; None if stopped before the last by --stop-after."""
    x, y = as_tensors(data.train, data.trained_on, mean, std)
    held_x, held_y = as_tensors(data.train, data.shipped["validation"], mean, std)
    settings = {name: getattr(args, name) for name in ("seed", "epochs", "batch", "lr")}
    training = Training.start(args, len(y))
    first = training.resume(args.checkpoint, settings)
    last = min(args.epochs, args.stop_after or args.epochs)
    for epoch in range(first, last):
        start = time.monotonic()
        # One generator for each epoch, so that a resumed run sees the same batches.
        generator = torch.Generator().manual_seed(args.seed * 1000 + epoch)
        loss = training.run_epoch(x, y, args.batch, generator)
        training.save(args.checkpoint, epoch + 1, settings)
        held = accuracy(training.model, held_x, held_y)
        secs = time.monotonic() - start
        print(f"epoch {epoch + 1}: loss {loss:.4f}, validation {held:.4f}, {secs:.0f} s", flush=True)
    return training.model if last == args.epochs else None


def as_tensors(
    part: tuple[np.ndarray, np.ndarray], indices: np.ndarray | slice, mean: float, std: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised images [n, 1, 28, 28] and labels [n]."""
    x, y = (torch.from_numpy(np.array(values[indices])) for values in part)
    return (x.float() / 255 - mean) / std, y


def write(path: Path, data: bytes) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def subset_bytes(data: Data) -> bytes:
    arrays: dict[str, np.ndarray] = {}
    for part, indices in data.shipped.items():
        x, y = data.test if part == "test" else data.train
        arrays |= {f"x_{part}": x[indices], f"y_{part}": y[indices].astype(np.uint8)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--out", type=Path, default=ROOT / "tvm_compress" / "samples")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "build" / "train_sample.pt")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--stop-after", type=int, help="stop after this epoch, to go on later")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data = read_data(args.data, args.seed)
    write(args.out / "resnet8-fashion.npz", subset_bytes(data))
    unit = data.train[0][data.trained_on].astype(np.float32) / 255
    mean, std = round(float(unit.mean(dtype=np.float64)), 4), round(float(unit.std(dtype=np.float64)), 4)
    model = train(args, data, mean, std)
    if model is None:
        return

    def measure(part: tuple[np.ndarray, np.ndarray], indices: np.ndarray | slice) -> float:
        return accuracy(model, *as_tensors(part, indices, mean, std))

    facts = {
        "schema": 1,
        "network": "ResNet8",
        "input_shape": [1, *data.test[0].shape[1:]],
        "mean": [mean],
        "std": [std],
        "class_names": list(FASHION_CLASSES),
        "accuracy": {
            "test": measure(data.test, slice(None)),
            "shipped_test": measure(data.test, data.shipped["test"]),
            "shipped_validation": measure(data.train, data.shipped["validation"]),
        },
        "training": {
            "data": "Fashion-MNIST, the training images but for the shipped validation part",
            "images": len(data.trained_on),
            "epochs": args.epochs,
            "batch": args.batch,
            "lr": args.lr,
            "seed": args.seed,
            "torch": torch.__version__.split("+")[0],
        },
    }
    tensors = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    write(args.out / "resnet8-fashion.safetensors", safetensors_bytes(tensors))
    write(args.out / "resnet8-fashion.json", (json.dumps(facts, indent=2) + "\n").encode())
    print(json.dumps(facts["accuracy"]))


if __name__ == "__main__":
    main()
