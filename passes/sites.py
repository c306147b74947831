"""Find the compressible sites of a module: its convolutions and dense layers, by stable names."""

from dataclasses import dataclass
from math import prod

from tvm import IRModule


@dataclass(frozen=True)
class Site:
    """A convolution or dense layer.

    Parameters
    ----------
    name
        The weight parameter's name without `.weight` (or `_weight`).
    kind
        "conv2d" or "dense".
    weight
        The weight parameter's name.
    weight_shape
        OIHW (I per group), or [out, in].
    in_shape, out_shape
        NHWC, or [N, C]; the batch extent is always 1.
    strides, dilation
        Height, width.
    padding
        Top, left, bottom, right.
    """

    name: str
    kind: str
    weight: str
    weight_shape: tuple[int, ...]
    in_shape: tuple[int, ...]
    out_shape: tuple[int, ...]
    strides: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def in_channels(self) -> int:
        """Channels of the input, over all groups."""
        return self.in_shape[-1]

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        return self.out_shape[-1]

    @property
    def kernel(self) -> tuple[int, int]:
        """Height and width of the kernel; (1, 1) for a dense layer."""
        return (self.weight_shape[2], self.weight_shape[3]) if self.kind == "conv2d" else (1, 1)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one inference of one sample."""
        return prod(self.out_shape) * prod(self.weight_shape[1:])


def site_name(weight: str) -> str:
    """Give the name of the site whose weight parameter has this name."""
    for ending in (".weight", "_weight"):
        if weight.endswith(ending) and weight != ending:
            return weight[: -len(ending)]
    return weight


def find_sites(module: IRModule) -> list[Site]:
    """Give the sites of a float, annotated or QDQ module in order of execution."""
    raise NotImplementedError
