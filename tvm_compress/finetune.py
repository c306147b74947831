"""Training of a module's parameters after compression."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from tvm_compress.data.dataset import Dataset
from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.twin import Twin

Progress = Callable[[int, dict[str, float]], None]


class Observer(Protocol):
    """Looks on while a network trains; `tensors` are the twin's parameters and buffers by name.

    What it does to the tensors in `after_step`, such as keeping some at zero, stays.
    """

    def begin_epoch(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look at the network before an epoch."""

    def after_step(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Look at the network after one batch; no gradients are recorded."""

    def end_epoch(self, epoch: int, means: Mapping[str, float]) -> None:
        """Hear an epoch's number (from 1) and its means, as `progress` does."""


MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
MAX_GRADIENT_NORM = 2.0
# Distillation (Hinton et al. 2015): softness of the targets, and their share of the loss.
TEMPERATURE = 2.0
TEACHER_SHARE = 0.7
# How training images may be varied: by what does not change what they show.
AUGMENTATIONS = ("none", "shift", "mirror", "shift+mirror")
# An image is moved by up to so many pixels each way.
MAX_SHIFT = 2
# Quantization scales never fall below this share of where they started.
LEAST_SCALE = 0.1
# How many training images re-estimate the batch norms at the end.
STATISTICS_IMAGES = 1024


@dataclass(frozen=True)
class _Targets:
    """Labels of a batch and, with a teacher, its logits."""

    labels: torch.Tensor
    teacher: torch.Tensor | None


def finetune(
    module: tvm.IRModule,
    train: Dataset,
    epochs: int,
    learning_rate: float = 0.01,
    seed: int = 0,
    batch_size: int = 64,
    teacher: Twin | None = None,
    augment: str = "none",
    progress: Progress | None = None,
    observer: Observer | None = None,
) -> tvm.IRModule:
    """Train a float or QDQ module for some epochs; return it, at the same stage, with new parameters.

    Stochastic gradient descent with Nesterov momentum, a cosine schedule from `learning_rate` to 0, clipped
    gradients, and weight decay on kernels only. At the QDQ stage weights and scales learn through
    straight-through estimators (LSQ), and the batch norms' statistics are re-estimated at the end. Same
    arguments and number of threads: same bits.

    Parameters
    ----------
    teacher
        The dense model's twin: the loss becomes 0.7 of the divergence from its softened answers and 0.3 of
        the cross-entropy.
    augment
        One of `AUGMENTATIONS`. "shift": each image is moved by up to two pixels each way; "mirror": half of
        them are mirrored, left to right.
    progress
        Called after each epoch with its number (from 1) and `loss`, `accuracy` (on what was trained on),
        `learning_rate`.
    observer
        Called before each epoch, after each batch and after each epoch, such as `metrics.EsnRecorder`.

    Raises
    ------
    SettingError
        If epochs, learning rate or batch size is out of range, or the augmentation is unknown.
    DataError
        If there are fewer than two images.
    ModelError
        If the module is at another stage, or the training diverges.
    """
    if epochs < 0 or batch_size < 2 or not (learning_rate > 0 and math.isfinite(learning_rate)):
        raise SettingError(
            f"Cannot train {epochs} epochs in batches of {batch_size} at learning rate {learning_rate}.",
            "Epochs are 0 or more, batches hold 2 images or more, the learning rate is positive.",
        )
    if augment not in AUGMENTATIONS:
        raise SettingError(
            f"Images cannot be augmented by {augment!r}.", f"Known are: {', '.join(AUGMENTATIONS)}."
        )
    if len(train) < 2:
        raise DataError(f"Fine-tuning needs at least two images, not {len(train)}.")
    twin = Twin(module)
    if twin.stage not in ("float", "qdq"):
        raise ModelError(f"Fine-tuning takes a float or QDQ module, not one of stage {twin.stage!r}.")
    generator = torch.Generator().manual_seed(seed)
    answers = None if teacher is None else _Answers(teacher, train, augment, epochs)
    trainer = _Trainer(twin, learning_rate, epochs * _batch_count(len(train), batch_size))
    twin.train()
    for epoch in range(1, epochs + 1):
        if observer is not None:
            observer.begin_epoch(twin.tensors)
        for indices in _shuffled(len(train), batch_size, generator):
            x, mirrored = _augmented(torch.from_numpy(train.normalized(indices)), augment, generator)
            logits = None if answers is None else answers.to(x, indices, mirrored)
            trainer.step(x, _Targets(torch.from_numpy(train.y[indices]), logits))
            if observer is not None:
                with torch.no_grad():
                    observer.after_step(twin.tensors)
        means = trainer.finish_epoch(epoch)
        if observer is not None:
            observer.end_epoch(epoch, means)
        if progress is not None:
            progress(epoch, means)
    twin.eval()
    if epochs and twin.stage == "qdq":
        chosen = torch.randperm(len(train), generator=generator)[:STATISTICS_IMAGES].numpy()
        twin.reestimate_batch_norm(train.normalized(chosen))
    return twin.to_module()


def _batch_count(n: int, batch_size: int) -> int:
    return max(1, n // batch_size)


def _shuffled(n: int, batch_size: int, generator: torch.Generator) -> Iterator[np.ndarray]:
    """Every index once, in batches of near-equal sizes: a small last one would spoil the batch norms."""
    order = torch.randperm(n, generator=generator).numpy()
    yield from np.array_split(order, _batch_count(n, batch_size))


def _augmented(
    x: torch.Tensor, augment: str, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images varied by chance, and which of them [N] were mirrored."""
    x = _shift(x, generator) if "shift" in augment else x
    if "mirror" not in augment:
        return x, torch.zeros(len(x), dtype=torch.bool)
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, x.flip(-1), x), mirrored.flatten()


def _shift(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Move each image [N, C, H, W] by its own random number of pixels; edges are repeated."""
    n, _, height, width = x.shape
    padded = F.pad(x, (MAX_SHIFT,) * 4, mode="replicate")
    offsets = torch.randint(0, 2 * MAX_SHIFT + 1, (2, n, 1), generator=generator)
    rows, columns = offsets[0] + torch.arange(height), offsets[1] + torch.arange(width)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()


class _Answers:
    """A teacher's logits: taken once where no image comes in more versions than epochs, else by the batch."""

    def __init__(self, teacher: Twin, train: Dataset, augment: str, epochs: int) -> None:
        self._teacher = teacher
        self._known: torch.Tensor | None = None
        if augment == "none" or (augment == "mirror" and epochs > 1):
            x = train.normalized()
            versions = [x, np.ascontiguousarray(x[..., ::-1])] if augment == "mirror" else [x]
            # [versions, N, classes]; the second version is the mirrored one.
            self._known = torch.from_numpy(np.stack([teacher.predict(version) for version in versions]))

    def to(self, x: torch.Tensor, indices: np.ndarray, mirrored: torch.Tensor) -> torch.Tensor:
        """Logits of the images `indices`, which look as `x` does."""
        if self._known is not None:
            return self._known[mirrored.long(), torch.from_numpy(indices)]
        with torch.no_grad():
            return self._teacher(x)


class _Trainer:
    """Stochastic gradient descent with its schedule, and what it saw since the epoch began.

    The step is `torch.optim.SGD`'s with Nesterov momentum. That class itself loads torch's compiler, 800
    modules and two seconds, for twelve lines.
    """

    def __init__(self, twin: Twin, learning_rate: float, steps: int) -> None:
        self.twin, self.learning_rate, self.steps, self.done = twin, learning_rate, steps, 0
        parameters = twin.trainable()
        self.parameters = list(parameters.values())
        self.velocities = [torch.zeros_like(p) for p in self.parameters]
        scales = [p for name, p in parameters.items() if name.endswith("_scale")]
        self.floors = [(scale, scale.detach() * LEAST_SCALE) for scale in scales]
        self._reset()

    def _reset(self) -> None:
        self.loss, self.correct, self.seen = 0.0, 0, 0

    @property
    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * self.done / max(1, self.steps)))

    def step(self, x: torch.Tensor, targets: _Targets) -> None:
        """Move the parameters by one batch."""
        logits = self.twin(x)
        loss = _loss(logits, targets)
        self.twin.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM)
        self._descend()
        self.done += 1
        self.loss += float(loss.detach()) * len(x)
        self.correct += int((logits.detach().argmax(1) == targets.labels).sum())
        self.seen += len(x)

    @torch.no_grad()
    def _descend(self) -> None:
        for parameter, velocity in zip(self.parameters, self.velocities, strict=True):
            if parameter.grad is None:
                continue
            gradient = parameter.grad
            if parameter.dim() > 1:
                gradient = gradient.add(parameter, alpha=WEIGHT_DECAY)
            velocity.mul_(MOMENTUM).add_(gradient)
            parameter.sub_(gradient.add(velocity, alpha=MOMENTUM), alpha=self.rate)
        for scale, floor in self.floors:
            torch.maximum(scale, floor, out=scale)

    def finish_epoch(self, epoch: int) -> dict[str, float]:
        """Return the epoch's means and begin the next."""
        means = {
            "loss": self.loss / self.seen,
            "accuracy": self.correct / self.seen,
            "learning_rate": self.rate,
        }
        if not math.isfinite(means["loss"]):
            raise ModelError(
                f"Training diverged in epoch {epoch} at learning rate {self.learning_rate}.",
                "Fine-tune with a smaller learning rate.",
            )
        self._reset()
        return means


def _loss(logits: torch.Tensor, targets: _Targets) -> torch.Tensor:
    hard = F.cross_entropy(logits, targets.labels)
    if targets.teacher is None:
        return hard
    soft = F.kl_div(
        F.log_softmax(logits / TEMPERATURE, 1),
        F.log_softmax(targets.teacher / TEMPERATURE, 1),
        reduction="batchmean",
        log_target=True,
    )
    # The square keeps the soft part's gradients as large as the hard part's (Hinton et al. 2015, section 2).
    return TEACHER_SHARE * TEMPERATURE**2 * soft + (1 - TEACHER_SHARE) * hard
