"""The data sets of the benchmarks, and where trained networks and decoded images are kept.

Folders come from options or from the environment: TVM_COMPRESS_BENCH_CACHE (default: the user's cache) and
TVM_COMPRESS_SHARED (default: ../shared beside the repository), which holds CIFAR-10 (JPEG q75).
"""

import io
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
from figures import ROOT

from tvm_compress.data.dataset import Normalization, Split
from tvm_compress.data.idx import FASHION_CLASSES, read_idx_part
from tvm_compress.data.split import Source, split_source
from tvm_compress.files import replacing, write_text

CIFAR_NORMALIZATION = Normalization((0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616))
IMAGENET_NORMALIZATION = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
FASHION_NORMALIZATION = Normalization((0.2860,), (0.3530,))
FASHION_FOLDER = Path("/usr/share/datasets/fashion-mnist")
# 5,000 training images of either set are held back for validation: no network here is trained on them.
VALIDATION = {"cifar10": 0.1, "fashion": 1 / 12}
SPLIT_SEED = 0


def cache_folder(given: Path | None = None) -> Path:
    """Folder of decoded data and trained networks; made where it is missing."""
    named = os.environ.get("TVM_COMPRESS_BENCH_CACHE")
    default = Path(named) if named else platformdirs.user_cache_path("tvm_compress") / "bench"
    folder = given or default
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Result of an earlier run from its JSON file, or of `make` now; never seen half-written."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        result = make()
        write_text(path, json.dumps(result, indent=1) + "\n")
        said = {key: value for key, value in result.items() if isinstance(value, int | float | str)}
        print(path.stem, said, flush=True)
    return json.loads(path.read_text(encoding="utf-8"))


def shared_folder(given: Path | None = None) -> Path:
    """Folder that holds `data/cifar10-jpeg75.zip` and `models/`."""
    return given or Path(os.environ.get("TVM_COMPRESS_SHARED", ROOT.parent / "shared"))


def fashion(folder: Path | None = None) -> Split:
    """Fashion-MNIST from a folder of IDX files (default: of Debian's package dataset-fashion-mnist)."""
    folder = folder or Path(os.environ.get("TVM_COMPRESS_FASHION", FASHION_FOLDER))
    train, test = read_idx_part(folder, "train"), read_idx_part(folder, "t10k")
    if train is None or test is None:
        raise SystemExit(f"{folder} has no Fashion-MNIST: apt-get install dataset-fashion-mnist")
    source = Source({"train": train, "test": test}, FASHION_CLASSES)
    return split_source(source, SPLIT_SEED, FASHION_NORMALIZATION, VALIDATION["fashion"])


def cifar10(shared: Path | None = None, cache: Path | None = None) -> Split:
    """CIFAR-10 (JPEG q75): 45,000 images to train, 5,000 for validation, 5,000 for the test."""
    decoded = cache_folder(cache) / "cifar10-jpeg75.npz"
    if not decoded.is_file():
        _decode(shared_folder(shared) / "data" / "cifar10-jpeg75.zip", decoded)
    with np.load(decoded, allow_pickle=False) as arrays:
        parts = {part: (arrays[f"x_{part}"], arrays[f"y_{part}"]) for part in ("train", "test")}
        names = tuple(str(name) for name in arrays["class_names"])
    return split_source(Source(parts, names), SPLIT_SEED, CIFAR_NORMALIZATION, VALIDATION["cifar10"])


def load_split(data: str, shared: Path | None = None, cache: Path | None = None) -> Split:
    """The split that a `NetworkSpec.data` names."""
    return cifar10(shared, cache) if data == "cifar10" else fashion()


def _decode(archive: Path, target: Path) -> None:
    """Decode every image of the archive (PART/CLASS/NUMBER.jpg) once, into one file."""
    from PIL import Image

    if not archive.is_file():
        raise SystemExit(f"{archive} is missing: name the folder that holds data/{archive.name}.")
    images: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    labels: dict[str, list[str]] = {"train": [], "test": []}
    with zipfile.ZipFile(archive) as content:
        for name in sorted(n for n in content.namelist() if n.endswith(".jpg")):
            part, label = Path(name).parts[-3:-1]
            pixels = np.asarray(Image.open(io.BytesIO(content.read(name))).convert("RGB"))
            images[part].append(pixels.transpose(2, 0, 1))
            labels[part].append(label)
    names = sorted(set(labels["train"]))
    arrays = {"class_names": np.asarray(names)}
    for part in images:
        arrays[f"x_{part}"] = np.stack(images[part])
        arrays[f"y_{part}"] = np.asarray([names.index(label) for label in labels[part]], np.int64)
    with replacing(target) as unfinished, unfinished.open("wb") as file:
        np.savez_compressed(file, **arrays)
