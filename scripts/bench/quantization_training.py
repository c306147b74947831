"""The trained points of `quantization.py`: quantization-aware training in rounds, each kept when it is done.

usage: python scripts/bench/quantization_training.py [--rounds N] [--shared FOLDER] [--cache FOLDER]

A round trains one epoch on 5,000 training images, drawn anew for each round, with the dense network as
teacher. One thread takes minutes for a round, so fewer are done than the three epochs of 45,000 images that
the issue has in mind; `ROUNDS` says how many. `--rounds N` does the next N that are missing.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_data import CIFAR_NORMALIZATION, IMAGENET_NORMALIZATION, cache_folder, cifar10
from train import load_resnet18, load_resnet20

from tvm_compress.compression import compressed_model, uniform_policy
from tvm_compress.compressor import Compressor, realize
from tvm_compress.data.dataset import Split
from tvm_compress.files import write_text
from tvm_compress.finetune import finetune
from tvm_compress.model import Model
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.twin import Twin


def _falling(rounds: int, first: float) -> tuple[float, ...]:
    """Learning rates that fall linearly."""
    return tuple(first * (1 - number / rounds) for number in range(rounds))


NETWORKS = ("resnet20", "resnet18-w32")
CALIBRATION_IMAGES = 512
ROUND_IMAGES = 5_000
AUGMENT = "shift+mirror"
# The ResNet-20 was trained on other images (PNG): it sees ours before anything is compared with it.
ADAPTATION = {"resnet20": _falling(4, 0.01)}
# Learning rate of each round, by network and (weight, activation) bits.
ROUNDS = {
    ("resnet20", (2, 2)): (*_falling(9, 0.02), *_falling(3, 0.005)),
    ("resnet20", (4, 4)): _falling(3, 0.01),
    ("resnet18-w32", (2, 2)): _falling(4, 0.02)[:2],
}


@dataclass(frozen=True)
class Task:
    """A dense network with its data, and where what is made of it is kept."""

    name: str
    model: Model
    split: Split
    folder: Path

    @property
    def calibration(self) -> np.ndarray:
        """Normalised images that give ranges: the same for everything and everybody."""
        return self.split.train.subset(CALIBRATION_IMAGES, np.random.default_rng(0)).normalized()

    def evaluate(self, model: Model) -> float:
        """Test accuracy, of the integers where the model is quantized."""
        return Twin(realize(model.module)).accuracy(self.split.test.normalized(), self.split.test.y)


def load_task(name: str, shared: Path | None = None, cache: Path | None = None) -> Task:
    """Give one of `NETWORKS` as it stands in its file, before any adaptation."""
    split = cifar10(shared, cache)
    is_small = name == "resnet20"
    taken = IMAGENET_NORMALIZATION if is_small else CIFAR_NORMALIZATION
    parts = {
        part: replace(getattr(split, part), normalization=taken) for part in ("train", "validation", "test")
    }
    network = (load_resnet20 if is_small else load_resnet18)(shared)
    shape = [torch.zeros(1, 3, 32, 32)]
    model = Model.from_torch(network, shape, mean=taken.mean, std=taken.std)
    return Task(name, model, replace(split, **parts), cache_folder(cache) / "quantization" / name)


def adapted_task(name: str, shared: Path | None = None, cache: Path | None = None) -> Task:
    """Give one of `NETWORKS` as everything is compared with it; its adaptation must be done."""
    task = load_task(name, shared, cache)
    if name not in ADAPTATION:
        return task
    return replace(task, model=Model.load(_finished(task, "adapted", len(ADAPTATION[name]))))


def trained(task: Task, bits: tuple[int, int]) -> Model:
    """Give the network after its quantization-aware training, which must be done."""
    return Model.load(_finished(task, f"w{bits[0]}a{bits[1]}", len(ROUNDS[task.name, bits])))


def _finished(task: Task, what: str, rounds: int) -> Path:
    path = task.folder / f"{what}-{rounds}"
    if not (path / "round.json").is_file():
        raise SystemExit(f"{path} is missing: python scripts/bench/quantization_training.py")
    return path


def policy_of(model: Model, bits: tuple[int, int]) -> CompressionPolicy:
    """Every site alike; those without bit-serial kernels on the host are INT8, as are first and last."""
    return uniform_policy(model, target="host", weight_bits=bits[0], activation_bits=bits[1])


def _round(task: Task, model: Model, number: int, rate: float, teacher: Twin | None) -> Model:
    train = task.split.train.subset(ROUND_IMAGES, np.random.default_rng((1, number)))
    module = finetune(
        model.module,
        train,
        epochs=1,
        learning_rate=rate,
        seed=number,
        teacher=teacher,
        augment=AUGMENT,
    )
    return model.with_module(module)


def _series(
    task: Task, what: str, start: Model, rates: Sequence[float], teacher: Twin | None, left: int
) -> int:
    """Do up to `left` missing rounds of a series; give how many are still allowed."""
    for number, rate in enumerate(rates):
        path = task.folder / f"{what}-{number + 1}"
        if (path / "round.json").is_file():
            continue
        if not left:
            return 0
        begun = time.process_time()
        before = Model.load(task.folder / f"{what}-{number}") if number else start
        after = _round(task, before, number, rate, teacher)
        path.parent.mkdir(parents=True, exist_ok=True)
        after.save(path)
        said: dict[str, Any] = {"round": number + 1, "processor_seconds": time.process_time() - begun}
        said["accuracy"] = task.evaluate(after) if number + 1 in (1, len(rates)) else None
        write_text(path / "round.json", json.dumps(said) + "\n")
        print(task.name, what, said, flush=True)
        left -= 1
    return left


def main() -> None:
    """Do the next rounds."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--rounds", type=int, default=10**6)
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    left = arguments.rounds
    for name, rates in ADAPTATION.items():
        task = load_task(name, arguments.shared, arguments.cache)
        left = _series(task, "adapted", task.model, rates, None, left)
    for (name, bits), rates in ROUNDS.items():
        if not left:
            break
        task = adapted_task(name, arguments.shared, arguments.cache)
        policy = policy_of(task.model, bits)
        module = Compressor(task.model.module, task.calibration, None).quantize(task.model.module, policy)
        start = compressed_model(task.model, policy, module)
        left = _series(task, f"w{bits[0]}a{bits[1]}", start, rates, Twin(task.model.module), left)


if __name__ == "__main__":
    main()
