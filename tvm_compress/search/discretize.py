"""From actions in [0, 1] to channel counts, bit widths and schemes (search paper, equations 4 and 8)."""

import math
from dataclasses import dataclass

MIX_THRESHOLD = 0.5
INT8_THRESHOLD = 0.2


def discretize(ratio: float, reference: int) -> int:
    """Map a compression ratio to a count in [1, reference].

    `min(reference, floor((1 - ratio) * reference) + 1)`: the reference itself at 0, 1 at 1.
    The printed equation 4 lacks the minimum and gives reference + 1 at ratio 0.
    """
    return min(reference, math.floor((1.0 - ratio) * reference) + 1)


def compression_ratio(action: float, threshold: float = MIX_THRESHOLD) -> float:
    """Stretch the part of an action above a threshold to [0, 1].

    The printed equation 8 has minimum and maximum exchanged, which would make every ratio 1.
    """
    return min(1.0, max(0.0, (action - threshold) / (1.0 - threshold)))


@dataclass(frozen=True)
class Precision:
    """A scheme with its bit widths; `note` says why the wanted scheme was not taken."""

    scheme: str
    weight_bits: int
    activation_bits: int
    note: str = ""


FP32 = Precision("fp32", 32, 32)
INT8 = Precision("int8", 8, 8)


def choose_precision(
    activation_action: float, weight_action: float, broken_rule: str | None, max_bits: int = 6
) -> Precision:
    """Precision of a site from its two actions (search paper, "Selection of Quantization Method").

    Parameters
    ----------
    activation_action, weight_action
        In [0, 1]; the larger, the fewer bits.
    broken_rule
        Why the site cannot be bit-serial on the target, or None if it can; then INT8 is taken instead.
    max_bits
        Largest bit width of a bit-serial site.
    """
    largest = max(activation_action, weight_action)
    if largest > MIX_THRESHOLD:
        if broken_rule is not None:
            return Precision("int8", 8, 8, broken_rule)
        weight_bits = discretize(compression_ratio(weight_action), max_bits)
        return Precision("bitserial", weight_bits, discretize(compression_ratio(activation_action), max_bits))
    return INT8 if largest > INT8_THRESHOLD else FP32
