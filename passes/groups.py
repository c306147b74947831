"""Channel dependency analysis: which channels must be removed together, and from which parameters."""

from dataclasses import dataclass

from tvm import IRModule


@dataclass(frozen=True)
class Cut:
    """One axis of a parameter that holds a coupled set's channels.

    Channel c stands at positions `offset + c * repeat` to `offset + (c + 1) * repeat - 1`: `repeat` is more
    than 1 after a flatten, which gives each channel a block, and `offset` more than 0 after a concatenation.
    """

    parameter: str
    axis: int
    repeat: int = 1
    offset: int = 0


@dataclass(frozen=True)
class CoupledSet:
    """Channels that must be removed together.

    Parameters
    ----------
    name
        The first producing site.
    channels
        How many channels the set has; each producer has as many output channels.
    producers
        The sites whose output channels these are, in order of execution.
    cuts
        Every parameter axis that loses something with a channel.
    prunable, reason
        Whether channels can be removed and, where not, why.
    """

    name: str
    channels: int
    producers: tuple[str, ...]
    cuts: tuple[Cut, ...]
    prunable: bool
    reason: str = ""


def find_coupled_sets(module: IRModule) -> list[CoupledSet]:
    """Give the coupled sets of a float module in order of execution; each site produces exactly one of them."""
    raise NotImplementedError


def round_channels(wanted: float, total: int, multiple: int = 1) -> int:
    """Round a wanted channel count up to a multiple, never above the total and never to 0."""
    raise NotImplementedError
