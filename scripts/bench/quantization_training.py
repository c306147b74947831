"""The trained points of `quantization.py`: quantization-aware training, each kept when it is done.

usage: python scripts/bench/quantization_training.py [--network NAME] [--shared FOLDER] [--cache FOLDER]

Three epochs over all 45,000 training images, with the dense network as teacher: on one thread half an hour
for all of ResNet-20, an hour for ResNet-18 w32.
"""

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from bench_data import CIFAR_NORMALIZATION, IMAGENET_NORMALIZATION, cache_folder, cifar10
from train import load_resnet18, load_resnet20

from tvm_compress.compression import compressed_model, uniform_policy
from tvm_compress.compressor import Compressor, realize
from tvm_compress.data.dataset import Split
from tvm_compress.finetune import finetune
from tvm_compress.model import Model
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.twin import Twin

NETWORKS = ("resnet20", "resnet18-w32")
CALIBRATION_IMAGES = 512
EPOCHS = 3
AUGMENT = "shift+mirror"
# The ResNet-20 was trained on other images (PNG): it sees ours before anything is compared with it.
ADAPTATION_RATES = {"resnet20": 0.01}
# Learning rate that the training begins with, by network and (weight, activation) bits.
RATES = {(name, bits): rate for name in NETWORKS for bits, rate in {(2, 2): 0.02, (4, 4): 0.01}.items()}


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
    return replace(task, model=_finished(task, "adapted")) if name in ADAPTATION_RATES else task


def trained(task: Task, bits: tuple[int, int]) -> Model:
    """Give the network after its quantization-aware training, which must be done."""
    return _finished(task, _name(bits))


def _finished(task: Task, what: str) -> Model:
    path = task.folder / what
    if not path.is_dir():
        raise SystemExit(f"{path} is missing: python scripts/bench/quantization_training.py")
    return Model.load(path)


def _name(bits: tuple[int, int]) -> str:
    return f"w{bits[0]}a{bits[1]}"


def policy_of(model: Model, bits: tuple[int, int]) -> CompressionPolicy:
    """Every site alike; those without bit-serial kernels on the host are INT8, as are first and last."""
    return uniform_policy(model, target="host", weight_bits=bits[0], activation_bits=bits[1])


def _train(task: Task, what: str, start: Model, rate: float, teacher: Twin | None) -> None:
    """Train the network `start` and keep it as `what`."""
    begun = time.process_time()

    def progress(epoch: int, means: dict[str, float]) -> None:
        print(task.name, what, epoch, means, f"{time.process_time() - begun:.0f} s", flush=True)

    module = finetune(
        start.module,
        task.split.train,
        EPOCHS,
        rate,
        teacher=teacher,
        augment=AUGMENT,
        progress=progress,
    )
    after = start.with_module(module)
    task.folder.mkdir(parents=True, exist_ok=True)
    after.save(task.folder / what)
    print(task.name, what, "accuracy", task.evaluate(after), flush=True)


def train_network(name: str, shared: Path | None, cache: Path | None) -> None:
    """Do what is missing of one network's trainings."""
    task = load_task(name, shared, cache)
    if name in ADAPTATION_RATES and not (task.folder / "adapted").is_dir():
        _train(task, "adapted", task.model, ADAPTATION_RATES[name], None)
    task = adapted_task(name, shared, cache)
    for bits in (bits for known, bits in RATES if known == name):
        if (task.folder / _name(bits)).is_dir():
            continue
        policy = policy_of(task.model, bits)
        module = Compressor(task.model.module, task.calibration, None).quantize(task.model.module, policy)
        start = compressed_model(task.model, policy, module)
        _train(task, _name(bits), start, RATES[name, bits], Twin(task.model.module))


def main() -> None:
    """Train what is missing."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--network", choices=NETWORKS, action="append", help="repeatable; all by default")
    parser.add_argument("--shared", type=Path)
    parser.add_argument("--cache", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.network or NETWORKS:
        train_network(name, arguments.shared, arguments.cache)


if __name__ == "__main__":
    main()
