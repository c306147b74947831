"""Trains the networks of the benchmarks into the cache folder, one by one; goes on where it was stopped.

usage: python scripts/bench/train.py [NAME ...] [--cache FOLDER] [--shared FOLDER] [--list]

Beside each NAME.safetensors stands NAME.json: accuracy, settings, processor seconds, versions. Seeds are
fixed, one thread is used: the same machine gives the same weights. Other benchmarks take the networks with
`load_network` and the data with `bench_data`.
"""

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import CIFAR_NORMALIZATION, FASHION_NORMALIZATION, cache_folder, load_split, shared_folder
from networks import NETWORKS, NetworkSpec, ResNet18, ResNet20, binarize_weights
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from tvm_compress.data.dataset import Dataset
from tvm_compress.files import replacing, write_text
from tvm_compress.model import Model

SEED = 0
BATCH = 128
MOMENTUM = 0.9
# The learning rate rises over this share of the steps.
WARMUP = 0.2
# Images are moved by up to so many pixels each way, and half of them mirrored.
SHIFT = {"cifar10": 4, "fashion": 2}


def load_network(name: str, cache: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return a trained network in evaluation mode, and its record (`test_accuracy`, `note`, ...).

    Networks with binary weights come as the float network that holds these weights; "-bnn" networks have sign
    activations, which no importer takes: they are there to be evaluated.
    """
    spec = NETWORKS[name]
    folder = cache_folder(cache)
    if not (folder / f"{name}.safetensors").is_file():
        raise SystemExit(f"{name} is not trained: python scripts/bench/train.py {name}")
    network = (NETWORKS[spec.deployed] if spec.deployed else spec).build()
    network.load_state_dict(load_file(folder / f"{name}.safetensors"))
    record = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return network.eval(), record


def load_resnet18(shared: Path | None = None) -> nn.Module:
    """The ResNet-18 of width 32 for CIFAR-10 (JPEG q75) that stands ready in the shared folder."""
    network = ResNet18()
    path = shared_folder(shared) / "models" / "resnet18w32-cifar10-jpeg75.safetensors"
    # Batch norms were saved without their counters, which evaluation does not need.
    network.load_state_dict(network.state_dict() | load_file(path))
    return network.eval()


def load_resnet20(shared: Path | None = None) -> nn.Module:
    """The ResNet-20 in the shared folder, trained by others on PNG images, with ImageNet's normalisation."""
    network = ResNet20()
    path = shared_folder(shared) / "models" / "resnet20-cifar10.th"
    state = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    network.load_state_dict(network.state_dict() | {k.removeprefix("module."): v for k, v in state.items()})
    return network.eval()


def as_model(network: nn.Module, data: str) -> Model:
    """Import a network for "cifar10" or "fashion" images, with their normalisation."""
    normalization = CIFAR_NORMALIZATION if data == "cifar10" else FASHION_NORMALIZATION
    shape = (1, 3, 32, 32) if data == "cifar10" else (1, 1, 28, 28)
    return Model.from_torch(network, [torch.zeros(shape)], mean=normalization.mean, std=normalization.std)


def accuracy(network: nn.Module, data: Dataset) -> float:
    """Share of images that a network in evaluation mode classifies right."""
    network.eval()
    right = 0
    with torch.no_grad():
        for start in range(0, len(data), 500):
            part = slice(start, start + 500)
            found = network(torch.from_numpy(data.normalized(part))).argmax(1).numpy()
            right += int((found == data.y[part]).sum())
    return right / len(data)


def _augmented(x: np.ndarray, shift: int, rng: np.random.Generator) -> np.ndarray:
    """Move each uint8 image [N, C, H, W] by up to `shift` pixels (black comes in), mirror half of them."""
    n, _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (0, 0), (shift, shift), (shift, shift)))
    offsets = rng.integers(0, 2 * shift + 1, (2, n, 1))
    rows, columns = offsets[0] + np.arange(height), offsets[1] + np.arange(width)
    columns = np.where(rng.random((n, 1)) < 0.5, columns[:, ::-1], columns)
    picked = padded[np.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(picked.transpose(0, 3, 1, 2))


def _batches(train: Dataset, shift: int, epoch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Every training image once, in an order that depends on the epoch only."""
    rng = np.random.default_rng((SEED, epoch))
    order = rng.permutation(len(train))
    for indices in np.array_split(order, len(train) // BATCH):
        x = train.normalization.apply(_augmented(train.x[indices], shift, rng))
        yield torch.from_numpy(x), torch.from_numpy(train.y[indices])


@dataclass
class _Run:
    """A network in training: what a checkpoint holds."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    epoch: int = 0
    seconds: float = 0.0

    def save(self, path: Path) -> None:
        """Write the checkpoint."""
        state = {
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "seconds": self.seconds,
        }
        with replacing(path) as unfinished:
            torch.save(state, unfinished)

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint, if there is one."""
        if not path.is_file():
            return
        state = torch.load(path, weights_only=True)
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.seconds = state["epoch"], state["seconds"]


def _start(spec: NetworkSpec) -> _Run:
    torch.manual_seed(SEED)
    network = spec.build().to(memory_format=torch.channels_last)
    if spec.optimizer == "adam":
        return _Run(network, torch.optim.Adam(network.parameters(), spec.learning_rate))
    kernels = [p for p in network.parameters() if p.dim() > 1]
    vectors = [p for p in network.parameters() if p.dim() <= 1]
    groups = [
        {"params": kernels, "weight_decay": spec.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, lr=spec.learning_rate, momentum=MOMENTUM, nesterov=True)
    return _Run(network, optimizer)


def _rate(progress: float) -> float:
    """Share of the highest learning rate at this share of the steps."""
    return min(0.05 + progress / WARMUP, (1 - progress) / (1 - WARMUP))


def _train_epoch(run: _Run, spec: NetworkSpec, train: Dataset) -> float:
    """Train one epoch; return its mean loss."""
    run.network.train()
    steps = len(train) // BATCH
    total = 0.0
    for step, (x, y) in enumerate(_batches(train, SHIFT[spec.data], run.epoch)):
        for group in run.optimizer.param_groups:
            group["lr"] = spec.learning_rate * _rate((run.epoch + step / steps) / spec.epochs)
        loss = functional.cross_entropy(run.network(x.contiguous(memory_format=torch.channels_last)), y)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        if spec.bits == 1:
            for parameter in run.network.parameters():
                if parameter.dim() > 1:
                    parameter.data.clamp_(-1, 1)
        total += float(loss.detach()) * len(x)
    run.epoch += 1
    return total / len(train)


def train(name: str, cache: Path, shared: Path | None = None) -> dict[str, Any]:
    """Train one network unless it stands in the cache already; return its record."""
    spec = NETWORKS[name]
    if (cache / f"{name}.safetensors").is_file():
        return json.loads((cache / f"{name}.json").read_text(encoding="utf-8"))
    split = load_split(spec.data, shared, cache)
    run, checkpoint = _start(spec), cache / f"{name}.checkpoint"
    run.restore(checkpoint)
    loss = float("nan")
    while run.epoch < spec.epochs:
        start = time.process_time()
        loss = _train_epoch(run, spec, split.train)
        run.seconds += time.process_time() - start
        run.save(checkpoint)
        print(f"{name} epoch {run.epoch}/{spec.epochs}: loss {loss:.4f}, {run.seconds:.0f} s", flush=True)
    binarize_weights(run.network)
    record = {
        "name": name,
        "data": "CIFAR-10 (JPEG q75)" if spec.data == "cifar10" else "Fashion-MNIST",
        "test_accuracy": accuracy(run.network, split.test),
        "validation_accuracy": accuracy(run.network, split.validation),
        "test_images": len(split.test),
        "parameters": sum(p.numel() for p in run.network.parameters()),
        "weight_bits": spec.bits,
        "epochs": spec.epochs,
        "optimizer": spec.optimizer,
        "learning_rate": spec.learning_rate,
        "batch": BATCH,
        "seed": SEED,
        "processor_seconds": run.seconds,
        "torch": torch.__version__,
        "note": spec.note,
    }
    # The record first: what has weights has a record.
    write_text(cache / f"{name}.json", json.dumps(record, indent=1) + "\n")
    weights = {key: value.contiguous() for key, value in run.network.state_dict().items()}
    with replacing(cache / f"{name}.safetensors") as unfinished:
        save_file(weights, unfinished)
    checkpoint.unlink(missing_ok=True)
    return record


def main() -> None:
    """Train what is named, or everything."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(NETWORKS)}")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--list", action="store_true", help="print the names and notes only")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NETWORKS))
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}; known are: {', '.join(NETWORKS)}")
    if arguments.list:
        for name, spec in NETWORKS.items():
            print(f"{name:<30} {spec.note}")
        return
    torch.set_num_threads(1)
    for name in arguments.names or NETWORKS:
        record = train(name, cache_folder(arguments.cache), arguments.shared)
        print(f"{name}: test accuracy {100 * record['test_accuracy']:.2f} %", flush=True)


if __name__ == "__main__":
    main()
