"""The artifact: a compiled library with its manifest, checked by its sums whenever it is loaded."""

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import tvm

import tvm_compress
from tvm_compress.errors import ArtifactError, DataError
from tvm_compress.files import replacing, write_text
from tvm_compress.model import InputSpec
from tvm_compress.passes.pipeline import Compiled
from tvm_compress.rpc.device import Device, LatencyResult, MeasurementSettings
from tvm_compress.schedules.memory import memory_use

SCHEMA_VERSION = 1
LIBRARY = "model.so"
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What stands in `manifest.json`.

    Attributes
    ----------
    target
        The target as TVM's JSON.
    input
        Name, shape (N, C, H, W), dtype, mean and standard deviation per channel of an image in [0, 1].
    output
        Shape and dtype of the logits.
    class_names
        Names of the classes in the order of the logits; may be empty.
    policy
        The compression policy as JSON, or None for a dense model.
    metrics
        MACs, BOPs, bytes and the like, by name.
    accuracy
        What this very library reached: `value`, `samples`, `device`, `agreement` with the twin; None until
        it was verified.
    memory
        Bytes that an inference needs: `constant_bytes`, `activation_bytes`, `workspace_bytes` and their sum
        `peak_bytes` (`schedules.memory.MemoryUse`). Empty in artifacts of older versions.
    versions
        Of TVM, tvm-ffi and this tool.
    sha256
        Checksum of each file of the artifact, by name.
    """

    target: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]
    class_names: list[str]
    policy: dict[str, Any] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    accuracy: dict[str, Any] | None = None
    memory: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    sha256: dict[str, str] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Return the manifest as JSON text."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> "Manifest":
        """Read a manifest; another schema version, unknown or missing keys raise ArtifactError."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ArtifactError(f"{where} is not JSON: {error}.", "Compile the artifact again.") from error
        version = data.get("schema_version") if isinstance(data, dict) else None
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{where} has schema version {version!r}; this tool reads version {SCHEMA_VERSION}.",
                "Compile the artifact again with this version.",
            )
        try:
            return Manifest(**data)
        except TypeError as error:
            raise ArtifactError(
                f"{where} has missing or unknown entries: {error}.", "Compile it again."
            ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    import tvm_ffi

    return {"tvm": tvm.__version__, "tvm_ffi": tvm_ffi.__version__, "tvm_compress": tvm_compress.__version__}


@dataclass(frozen=True)
class Verification:
    """How an artifact did on labelled data.

    Attributes
    ----------
    accuracy
        Share of right predictions of the library.
    agreement
        Share of samples on which library and twin predict the same class; None without a twin.
    largest_difference
        Largest absolute difference of a logit between library and twin; None without a twin.
    samples
        How many samples were run.
    device
        Where they were run.
    labels
        "data", or "model": then `accuracy` is the share on which the library predicts as the model that gave
        the labels did.
    """

    accuracy: float
    agreement: float | None
    largest_difference: float | None
    samples: int
    device: str
    labels: str = "data"


@dataclass(frozen=True)
class Artifact:
    """A loaded artifact: where it stands and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """Path of the compiled library."""
        return self.path / LIBRARY

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape (N, C, H, W) that the library takes."""
        return tuple(self.manifest.input["shape"])

    @staticmethod
    def create(
        path: str | Path,
        compiled: Compiled,
        *,
        input_spec: InputSpec,
        class_names: Sequence[str],
        policy: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
        fcompile: Callable[..., None] | None = None,
    ) -> "Artifact":
        """Export a compiled module with its manifest; a `path` that ends in `.tar` becomes one file.

        Raises
        ------
        ArtifactError
            If `path` exists and is not an artifact.
        """
        final = Path(path)
        folder = final.with_suffix("") if final.suffix == ".tar" else final
        _refuse_foreign(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            staging.chmod(0o755)
            compiled.export(staging / LIBRARY, fcompile=fcompile)
            manifest = Manifest(
                target={key: _plain(value) for key, value in compiled.target.export().items()},
                input=_input_as_dict(input_spec),
                output={"shape": [int(n) for n in compiled.module["main"].ret_ty.shape], "dtype": "float32"},
                class_names=list(class_names),
                policy=None if policy is None else dict(policy),
                metrics=dict(metrics or {}),
                memory=memory_use(compiled.module, compiled.target).to_dict(),
                versions=_versions(),
                sha256={LIBRARY: _sha256(staging / LIBRARY)},
            )
            write_text(staging / MANIFEST, manifest.to_json())
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        artifact = Artifact(folder, manifest)
        if final.suffix == ".tar":
            artifact.pack(final)
        return artifact

    @staticmethod
    def load(path: str | Path) -> "Artifact":
        """Load an artifact from a directory or a `.tar` and check every file against its sum.

        Raises
        ------
        ArtifactError
            If something is missing, damaged or of another schema version.
        """
        source = Path(path)
        if source.suffix == ".tar" and source.is_file():
            source = _unpack(source)
        manifest_path = source / MANIFEST
        if not manifest_path.is_file():
            raise ArtifactError(
                f"{path} is not an artifact: it has no {MANIFEST}.",
                "`tvm-compress compile MODEL -o DIR` makes one.",
            )
        manifest = Manifest.from_json(manifest_path.read_text(encoding="utf-8"), str(manifest_path))
        if LIBRARY not in manifest.sha256:
            raise ArtifactError(f"{manifest_path} lists no {LIBRARY}.", "Compile the artifact again.")
        for name, expected in manifest.sha256.items():
            file = source / name
            if not file.is_file():
                raise ArtifactError(
                    f"{path} lacks {name}, which its manifest lists.", "Copy or compile it again."
                )
            if _sha256(file) != expected:
                raise ArtifactError(
                    f"{file} does not match its SHA-256 in the manifest: it was changed or damaged.",
                    "Copy or compile the artifact again.",
                )
        return Artifact(source, manifest)

    def pack(self, path: Path) -> None:
        """Write the artifact as one uncompressed `.tar`, the same bytes each time."""
        with replacing(path) as temporary, tarfile.open(temporary, "w") as archive:
            for name in (MANIFEST, *sorted(self.manifest.sha256)):
                info = archive.gettarinfo(self.path / name, arcname=name)
                info.mtime, info.uid, info.gid, info.uname, info.gname = 0, 0, 0, "", ""
                with (self.path / name).open("rb") as file:
                    archive.addfile(info, file)

    def predict(self, images: np.ndarray, device: Device) -> np.ndarray:
        """Run normalised float32 images [N, C, H, W] one by one and return the logits [N, classes].

        Raises
        ------
        DataError
            If the images do not have the shape that the library takes.
        DeviceError
            If the device fails.
        """
        self.check_images(images)
        with device.open() as session:
            outputs = session.run_many(self.library, [[image[None]] for image in images.astype(np.float32)])
        return np.concatenate([output[0] for output in outputs])

    def check_images(self, images: np.ndarray) -> None:
        """Raise DataError unless images are [N, C, H, W] of the library's shape."""
        if images.ndim != 4 or images.shape[1:] != self.input_shape[1:] or not len(images):
            raise DataError(
                f"The artifact takes images of shape {self.input_shape[1:]}; the data has {images.shape}.",
                "Bring the images to that shape (N, C, H, W).",
            )

    def verify(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        device: Device,
        twin_logits: np.ndarray | None = None,
        labels_from: str = "data",
    ) -> Verification:
        """Run labelled images and compare with what the twin computed for the same images."""
        logits = self.predict(images, device)
        predicted = logits.argmax(axis=1)
        agreement = largest = None
        if twin_logits is not None:
            agreement = float((predicted == twin_logits.argmax(axis=1)).mean())
            largest = float(np.abs(logits - twin_logits).max())
        accuracy = float((predicted == labels).mean())
        return Verification(accuracy, agreement, largest, len(images), str(device.name), labels_from)

    def record(self, verification: Verification) -> "Artifact":
        """Write what was verified into the manifest and return the artifact with it."""
        accuracy = {
            "value": verification.accuracy,
            **{k: v for k, v in asdict(verification).items() if k != "accuracy"},
        }
        manifest = replace(self.manifest, accuracy=accuracy)
        write_text(self.path / MANIFEST, manifest.to_json())
        return Artifact(self.path, manifest)

    def benchmark(
        self,
        device: Device,
        others: Mapping[str, "Artifact"] | None = None,
        settings: MeasurementSettings | None = None,
    ) -> dict[str, LatencyResult]:
        """Time this artifact (as "this") and others in one session, interleaved, on zeros."""
        jobs = {"this": self, **(others or {})}
        with device.open(settings) as session:
            return session.time_many(
                {name: (a.library, [np.zeros(a.input_shape, np.float32)]) for name, a in jobs.items()}
            )


def _input_as_dict(spec: InputSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "shape": list(spec.shape),
        "dtype": spec.dtype,
        "mean": list(spec.mean),
        "std": list(spec.std),
        "layout": "NCHW",
        "range": "(x / 255 - mean) / std for 8-bit images",
    }


def _plain(value: Any) -> Any:
    """TVM's containers as JSON values."""
    if isinstance(value, str | int | float) or value is None:
        return value
    return [_plain(item) for item in value] if isinstance(value, Sequence) else str(value)


def _refuse_foreign(folder: Path) -> None:
    """An existing artifact is replaced; anything else is somebody's work."""
    if (
        folder.exists()
        and not (folder / MANIFEST).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ArtifactError(
            f"{folder} exists and is not an artifact.", "Give another output path, or move it away."
        )


def _unpack(archive_path: Path) -> Path:
    """Unpack a `.tar` artifact beside itself, under a name of its checksum, once."""
    folder = archive_path.with_name(f".{archive_path.stem}-{_sha256(archive_path)[:12]}")
    if folder.is_dir():
        return folder
    staging = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=archive_path.parent))
    try:
        with tarfile.open(archive_path) as archive:
            archive.extractall(staging, filter="data")
        os.replace(staging, folder)
    except (tarfile.TarError, OSError) as error:
        raise ArtifactError(
            f"{archive_path} cannot be unpacked: {error}.", "Copy or pack the artifact again."
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder
