"""Gradient and diagonal Gauss-Newton of a network's loss: all that Fast LC needs to know of the data."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import tvm

from tvm_compress.errors import DataError, ModelError, SettingError
from tvm_compress.fastlc.square_sums import sum_of_squares
from tvm_compress.files import replacing
from tvm_compress.passes.params import get_params, get_stage
from tvm_compress.passes.policy import fingerprint
from tvm_compress.passes.sites import find_sites
from tvm_compress.twin import Twin

SCHEMA = "tvm_compress.curvature.1"

# Derivatives of that many logits stand in memory at once.
_CLASSES_AT_ONCE = 16

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Curvature:
    """Derivatives of the mean cross-entropy with respect to the sites' weights, at a model's own weights.

    Attributes
    ----------
    gradient
        g by site, float32, the shape of the weights.
    diagonal
        h by site, the diagonal of the Gauss-Newton matrix, never negative; the same shapes.
    model
        `model_fingerprint` of the model that they belong to.
    images
        How many images they are the mean over.
    draws
        Labels drawn per image from the model's own distribution; 0: h is exact.
    labels
        Where the labels of g came from: "data", or "model" (its own predictions).
    """

    gradient: dict[str, np.ndarray]
    diagonal: dict[str, np.ndarray]
    model: str
    images: int
    draws: int = 0
    labels: str = "data"

    def check(self, module: tvm.IRModule) -> None:
        """Raise a ModelError unless this is the curvature of this very module, weights included."""
        found = model_fingerprint(module)
        if found != self.model:
            raise ModelError(
                f"This is the curvature of another model: it was taken at fingerprint {self.model}, "
                f"the model's is {found}.",
                "Give the model that it was computed for, or compute it again (--data, --save-curvature).",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; it is never seen half-written."""
        tensors = {f"gradient/{name}": value for name, value in self.gradient.items()}
        tensors |= {f"diagonal/{name}": value for name, value in self.diagonal.items()}
        record = {"model": self.model, "images": self.images, "draws": self.draws, "labels": self.labels}
        metadata = {"schema": SCHEMA, "record": json.dumps(record)}
        try:
            with replacing(path) as temporary:
                temporary.write_bytes(safetensors.numpy.save(tensors, metadata))
        except OSError as error:
            raise DataError(f"The curvature cannot be written to {path}: {error}.") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Curvature":
        """Read what `save` wrote.

        Raises
        ------
        DataError
            If there is no such file, or it is damaged or holds something else.
        """
        try:
            with safetensors.safe_open(str(path), framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except (OSError, safetensors.SafetensorError) as error:
            raise DataError(f"The curvature {path} cannot be read: {error}.") from error
        if metadata.get("schema") != SCHEMA:
            raise DataError(
                f"{path} is not a curvature file: its schema is {metadata.get('schema')!r}, not {SCHEMA!r}.",
                "Write one with --save-curvature.",
            )
        parts: dict[str, dict[str, np.ndarray]] = {"gradient": {}, "diagonal": {}}
        for name, value in tensors.items():
            kind, _, site = name.partition("/")
            parts[kind][site] = value
        record: dict[str, Any] = json.loads(metadata["record"])
        return cls(parts["gradient"], parts["diagonal"], **record)


def model_fingerprint(module: tvm.IRModule) -> str:
    """Hash of a model's sites and of all its parameters' values (16 hexadecimal digits)."""
    digest = hashlib.sha256(fingerprint(find_sites(module)).encode())
    for name, value in sorted(get_params(module).items()):
        digest.update(f"{name}:{value.dtype}:{value.shape}".encode())
        digest.update(np.ascontiguousarray(value).data)
    return digest.hexdigest()[:16]


def estimate_curvature(
    module: tvm.IRModule,
    x: np.ndarray,
    y: np.ndarray | None = None,
    *,
    draws: int = 0,
    chunk: int = 16,
    seed: int = 0,
    progress: Progress | None = None,
) -> Curvature:
    """Compute g and h of the mean softmax cross-entropy, chunk by chunk, in constant memory.

    The Gauss-Newton matrix of one image is `Jᵀ (diag(p) - p pᵀ) J`, J the Jacobian of the logits. Its middle
    part is `Σ_c p_c (p - e_c)(p - e_c)ᵀ`, so the diagonal is the p-weighted sum, over classes, of the squared
    gradients that the image would have with each class as its label: one backward pass per class. With
    `draws`, labels are drawn from p instead (an unbiased estimate), for networks with many classes.

    Parameters
    ----------
    x
        Images [N, C, H, W], normalised.
    y
        Labels [N] for the gradient; None: the model's own predictions.
    draws
        0 sums over all classes, exactly; else labels drawn per image.
    chunk
        Images in memory at once.
    progress
        Called with images done and all images.

    Raises
    ------
    ModelError
        If the module is not at the stage float.
    SettingError
        On negative draws or an empty chunk.
    DataError
        If there are no images, or a derivative is not finite, or all are zero.
    """
    if get_stage(module) != "float":
        raise ModelError(
            f"Curvature is taken of a float model, not of one at the stage {get_stage(module)!r}.",
            "Give the dense model.",
        )
    if draws < 0 or chunk < 1:
        raise SettingError(f"draws must be at least 0 and chunk at least 1, not {draws} and {chunk}.")
    if len(x) == 0:
        raise DataError("There are no images to take the curvature of.")
    twin = Twin(module)
    labels = twin.predict(x).argmax(axis=1) if y is None else np.asarray(y)
    generator = torch.Generator().manual_seed(seed)
    totals: dict[str, torch.Tensor] = {}
    for start in range(0, len(x), chunk):
        images = torch.from_numpy(np.ascontiguousarray(x[start : start + chunk], dtype=np.float32))
        for name, part in _chunk_diagonal(twin, images, draws, generator).items():
            totals[name] = totals[name] + part if name in totals else part.double()
        if progress is not None:
            progress(min(start + chunk, len(x)), len(x))
    weights = {site.name: site.weight for site in find_sites(module)}
    gradients = twin.gradients(x, labels)
    return Curvature(
        gradient=_checked({name: gradients[weight] for name, weight in weights.items()}, "gradient"),
        diagonal=_checked(
            {
                name: (totals[name] / len(x)).float().numpy()
                if name in totals
                else np.zeros_like(gradients[weight])
                for name, weight in weights.items()
            },
            "Gauss-Newton diagonal",
        ),
        model=model_fingerprint(module),
        images=len(x),
        draws=draws,
        labels="model" if y is None else "data",
    )


def _chunk_diagonal(
    twin: Twin, images: torch.Tensor, draws: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Sum of the diagonal over a chunk of images, by site."""
    with torch.enable_grad():
        logits, records = twin.record(images)
    probabilities = logits.detach().softmax(1)
    outputs = [record.output for record in records.values()]
    vectors = _logit_vectors(probabilities, draws, generator)
    sums: dict[str, torch.Tensor] = {}
    for start in range(0, len(vectors), _CLASSES_AT_ONCE):
        part = vectors[start : start + _CLASSES_AT_ONCE]
        rows = [
            torch.autograd.grad(logits, outputs, vector, retain_graph=True, allow_unused=True)
            for vector in part
        ]
        for position, (name, record) in enumerate(records.items()):
            if rows[0][position] is None:
                continue  # nothing of it reaches the logits
            stacked = torch.stack([row[position] for row in rows])
            found = sum_of_squares(record.node, record.input.detach(), stacked)
            sums[name] = sums[name] + found if name in sums else found
    return sums


def _logit_vectors(probabilities: torch.Tensor, draws: int, generator: torch.Generator) -> torch.Tensor:
    """Vectors v [S, N, C] with `Σ_s v vᵀ = diag(p) - p pᵀ`, exactly or (with draws) in expectation."""
    classes = probabilities.shape[1]
    if draws == 0:
        units = torch.eye(classes)[:, None, :]
        return (probabilities[None] - units) * probabilities.T[:, :, None].sqrt()
    labels = torch.multinomial(probabilities, draws, replacement=True, generator=generator).T
    chosen = torch.nn.functional.one_hot(labels, classes).to(probabilities.dtype)
    return (probabilities[None] - chosen) / draws**0.5


def _checked(values: dict[str, np.ndarray], what: str) -> dict[str, np.ndarray]:
    for name, value in values.items():
        if not np.isfinite(value).all():
            raise DataError(
                f"The {what} of {name!r} is NaN or infinite.", "Check the images and the parameters."
            )
    if not any(value.any() for value in values.values()):
        raise DataError(
            f"The {what} is zero everywhere: on these images no weight changes the loss.",
            "Give other images, and check that the model's logits are finite and not saturated.",
        )
    return values
