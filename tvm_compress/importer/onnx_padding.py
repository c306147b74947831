"""Padding that stands before a convolution in an ONNX file, as TensorFlow's "same" needs it at stride 2."""

from collections.abc import Mapping

import numpy as np
import onnx
from onnx import helper


def take_padding(layer: onnx.NodeProto, pad: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> None:
    """Let a Conv read what a Pad reads, and pad by itself, where that is the same."""
    attributes = {a.name: helper.get_attribute_value(a) for a in layer.attribute}
    around = _zeros_around(pad, constants)
    if around is None or attributes.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return
    own = attributes.get("pads") or [0, 0, 0, 0]
    kept = [a for a in layer.attribute if a.name not in ("pads", "auto_pad")]
    del layer.attribute[:]
    layer.attribute.extend(kept)
    layer.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(own, around, strict=True)]))
    layer.input[0] = pad.input[0]


def _zeros_around(pad: onnx.NodeProto, constants: Mapping[str, np.ndarray]) -> list[int] | None:
    """Zeros that a Pad puts around images: top, left, bottom, right; None if it does anything else."""
    attributes = {a.name: helper.get_attribute_value(a) for a in pad.attribute}
    inputs = [constants.get(name) for name in pad.input]
    # Attributes until opset 10, inputs since then.
    widths = attributes.get("pads", inputs[1] if len(inputs) > 1 else None)
    value = inputs[2] if len(inputs) > 2 and pad.input[2] else attributes.get("value", 0.0)
    axes = inputs[3] if len(inputs) > 3 and pad.input[3] else np.arange(4)
    if widths is None or value is None or axes is None or attributes.get("mode", b"constant") != b"constant":
        return None
    before, after = np.asarray(widths, int).reshape(2, -1)
    found = np.zeros((2, 4), int)
    if len(before) != len(axes) or np.any(np.asarray(value) != 0):
        return None
    found[:, np.asarray(axes, int)] = before, after
    return None if found.min() < 0 or found[:, :2].any() else [int(width) for width in found[:, 2:].ravel()]
