"""How a depthwise kernel is cut and its weights are packed, by layer and target."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from tvm_compress.schedules import packing
from tvm_compress.schedules.packing import round_up
from tvm_compress.schedules.target_rules import TargetRules

# Most multiply-add statements that a tile is unrolled into: more would miss the instruction cache.
MOST_UNROLLED = 200

# What a tile costs beside its multiply-adds, in multiply-adds: its loop, its addresses.
_TILE_OVERHEAD = 4

# Most accumulators of a tile: enough to hide the latency of an addition.
_MOST_ACCUMULATORS = 8


@dataclass(frozen=True)
class Plan:
    """How a depthwise kernel is cut.

    Attributes
    ----------
    lanes
        Channels of a vector.
    columns
        Pixels of a row that a register tile holds.
    rows
        Output rows of a strip, a divisor of the output's height.
    chunk
        Channels whose strip is stored at once, a divisor of the padded channels.
    """

    lanes: int
    columns: int
    rows: int
    chunk: int


@dataclass(frozen=True)
class Form:
    """What the products of a depthwise kernel are made of.

    Attributes
    ----------
    name
        "float32", "pairs" or "bytes".
    lanes
        Channels of a vector.
    item_bytes
        Of one channel of one pixel in `stored`.
    accumulators
        Vector registers that the sums of one pixel and vector take.
    """

    name: str
    lanes: int
    item_bytes: int
    accumulators: int


def form_for(rules: TargetRules, integer: bool, channels: int) -> Form:
    """Return the form in which a target multiplies fastest."""
    if not integer:
        return Form("float32", rules.fp32_lanes, 4, 1)
    if rules.is_arm:
        lanes = 16 if channels % 16 == 0 else 8
        return Form("bytes", lanes, 1, lanes // 4)
    return Form("pairs", rules.vector_bits // 32, 4, 1)


def cuts(rules: TargetRules, form: Form, info: dict[str, Any]) -> dict[tuple[int, ...], Plan]:
    """Return the ways to cut a layer, by the numbers of a `Choice`, the best first.

    `info` is what `kernel_attrs` takes.
    """
    kh, kw = info["KH"], info["KW"]
    (sh, sw), (dh, dw) = info["strides"], info["dilation"]
    taps = kh * (-(-kw // 2) if form.name == "pairs" else kw)
    # Weights stay in registers where they leave enough of them for a tile.
    held = taps if taps <= rules.vector_registers - 4 * form.accumulators - 2 else 1
    most = (rules.vector_registers - held - 1) // form.accumulators
    most = max(1, min(most, _MOST_ACCUMULATORS, MOST_UNROLLED // taps, info["OW"]))
    columns = min(
        range(1, most + 1),
        key=lambda t: (-(-info["OW"] // t) * (t * taps + _TILE_OVERHEAD + (info["OW"] % t > 0) * taps), -t),
    )
    channels = round_up(info["OC"], form.lanes)
    overhang = channels != info["OC"]
    width = (round_up(info["OW"], columns) - 1) * sw + dw * (kw - 1) + 1

    def strip_bytes(rows: int, chunk: int) -> int:
        return ((rows - 1) * sh + dh * (kh - 1) + 1) * width * chunk * form.item_bytes

    def filled_per_row(rows: int) -> float:
        return ((rows - 1) * sh + dh * (kh - 1) + 1) / rows

    line = 64 // form.item_bytes
    chunks = [c for c in range(form.lanes, channels + 1, form.lanes) if channels % c == 0]
    # Chunks of whole lines of the cache, if the channels allow it.
    whole = [c for c in chunks if c % line == 0] or chunks
    # The loop over vectors is cut where channels overhang: it must then run over all of them.
    chunks = [channels] if overhang else whole
    half = rules.l1_bytes // 2
    divisors = [r for r in range(1, info["OH"] + 1) if info["OH"] % r == 0]
    fitting = [(r, c) for r in divisors for c in chunks if strip_bytes(r, c) <= half]
    if not fitting:
        fitting = [(divisors[0], chunks[0])]
    # Few rows are stored twice, then few passes over the input.
    fitting.sort(key=lambda cut: (filled_per_row(cut[0]), -cut[1]))
    return {(columns, rows, chunk): Plan(form.lanes, columns, rows, chunk) for rows, chunk in fitting}


def pack_taps(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Turn [O, 1, KH, KW] into [KH, KW, C], C being O filled up with zeros to whole vectors."""
    o, _, kh, kw = weight.shape
    channels = round_up(o, lanes)
    return np.ascontiguousarray(packing.pad_axes(weight[:, 0].transpose(1, 2, 0), (kh, kw, channels)))


def pack_pairs(weight: np.ndarray, lanes: int) -> np.ndarray:
    """Turn int8 [O, 1, KH, KW] into int16 [KH, pairs of KW, C, 2]; zeros for what is missing."""
    taps = pack_taps(weight, lanes).astype(np.int16)
    kh, kw, channels = taps.shape
    even = packing.pad_axes(taps, (kh, round_up(kw, 2), channels))
    return np.ascontiguousarray(even.reshape(kh, -1, 2, channels).swapaxes(2, 3))
