"""What a kernel leaves open for a layer: which algorithm computes it, and how the work is cut.

The schedules choose by rules, tables and cost models. A `Choice` says what to take instead, for instance
because it was measured to be faster (see `tuning`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, zip_longest
from typing import Any, TypeVar

from tvm_compress.errors import KernelError

Cut = TypeVar("Cut")


@dataclass(frozen=True)
class Choice:
    """A way to compute a layer.

    Attributes
    ----------
    kernel
        "direct", "F2", "F4" (Winograd), "depthwise", "narrow", "lookup" or "popcount".
    cut
        The numbers of what the kernel calls its tile, blocking or plan, in the order of that class.
    """

    kernel: str
    cut: tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """Choices by layer (`layer_key`)."""

    by_layer: tuple[tuple[str, Choice], ...] = ()

    @staticmethod
    def of(choices: Mapping[str, Choice]) -> "Choices":
        """Make them of a mapping."""
        return Choices(tuple(sorted(choices.items())))

    @cached_property
    def _found(self) -> dict[str, Choice]:
        return dict(self.by_layer)

    def find(self, info: Mapping[str, Any], *kernels: str) -> Choice | None:
        """Return the choice for a layer, if there is one and it is one of these kernels.

        Parameters
        ----------
        info
            As of kernel.kernel_attrs.
        """
        if not self.by_layer:
            return None
        choice = self._found.get(layer_key(info))
        return choice if choice is not None and choice.kernel in kernels else None

    def cut(self, info: Mapping[str, Any], kernel: str, allowed: Mapping[tuple[int, ...], Cut]) -> Cut:
        """Return how a kernel cuts a layer: as chosen, or the first of those `allowed`.

        Raises
        ------
        KernelError
            Where what was chosen is not among those.
        """
        choice = self.find(info, kernel)
        if choice is None:
            return next(iter(allowed.values()))
        if choice.cut not in allowed:
            raise KernelError(
                f"The tuning says to cut the {kernel} kernel of the layer {layer_key(info)!r} as "
                f"{list(choice.cut)}, which is no way that this kernel can be cut.",
                "Tune it again.",
            )
        return allowed[choice.cut]


NO_CHOICES = Choices()

# Kernels by the family that is named in a scheduled function (apply.INFO), where they differ.
_KERNELS = {"fp32": "direct", "int8": "direct", "bitserial": "popcount"}


def choice_of(info: Mapping[str, Any], lanes: int) -> Choice:
    """Return what was chosen for a scheduled kernel.

    Parameters
    ----------
    info
        As a scheduled function states it, with "backend".
    lanes
        TargetRules.fp32_lanes.
    """
    family = str(info["backend"])
    if family.startswith("winograd"):
        cut = (*info["tile_block"], info["block"] // lanes, info["register_tiles"])
        return Choice(info["algorithm"], cut)
    if family.startswith("depthwise"):
        return Choice("depthwise", tuple(info["plan"][name] for name in ("columns", "rows", "chunk")))
    tile = tuple(info["tile"])
    if family == "fp32":
        tile = (*(tile if len(tile) == 2 else (1, *tile)), info["block"] // lanes)
    return Choice(_KERNELS.get(family, family), tile)


# What decides, with the target, which kernels compute a layer and how they can be cut.
_FACTS = (
    *("scheme", "activation_bits", "weight_bits", "N", "H", "W", "IC", "OC", "KH", "KW", "strides"),
    *("padding", "dilation", "groups"),
)


def layer_key(info: Mapping[str, Any]) -> str:
    """Text that two layers have in common if they compute the same with other weights.

    Parameters
    ----------
    info
        As of kernel.kernel_attrs.
    """
    facts = [f"{name}={_text(info[name])}" for name in _FACTS if name in info]
    return " ".join([str(info["operator"]), *facts])


def _text(value: Any) -> str:
    return (
        ",".join(map(str, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else str(value)
    )


def round_robin(ranked: Sequence[Sequence[Choice]]) -> list[Choice]:
    """Return the best of each kernel, then the second best of each, and so on."""
    return [choice for choice in chain.from_iterable(zip_longest(*ranked)) if choice is not None]
