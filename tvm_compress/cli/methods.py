"""The methods of `tvm-compress compress --method`, from options to results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tvm_compress.cli.load import epoch_lines, part_lines
from tvm_compress.data.dataset import Split
from tvm_compress.errors import SettingError
from tvm_compress.fastlc.compress import fast_lc
from tvm_compress.fastlc.settings import SCHEMES, FastLcSettings
from tvm_compress.method import MethodResult
from tvm_compress.model import Model
from tvm_compress.prune_then_quantize import EsnSettings, prune_then_quantize
from tvm_compress.tolerance.algorithm1 import Iteration
from tvm_compress.tolerance.compress import toco
from tvm_compress.tolerance.settings import TocoSettings


def run_toco(
    dense: Model, split: Split, options: Mapping[str, Any], trials: Path | None, quiet: bool
) -> MethodResult:
    """Tolerance analysis; options that are None keep their defaults."""
    settings = TocoSettings(**{name: value for name, value in options.items() if value is not None})
    lines = part_lines(quiet)

    def tell(iteration: Iteration) -> None:
        lines("iteration", iteration.number + 1, settings.iterations)

    return toco(dense.module, split, settings, trials, tell)


def run_fastlc(
    dense: Model,
    split: Split | None,
    options: Mapping[str, Any],
    curvature: Path | None,
    save_curvature: Path | None,
    quiet: bool,
) -> MethodResult:
    """Fast LC; options that are None keep their defaults.

    Raises
    ------
    SettingError
        If no scheme is named.
    """
    if options["scheme"] is None:
        raise SettingError("--method fastlc needs --scheme.", f"Known are: {', '.join(SCHEMES)}.")
    settings = FastLcSettings(**{name: value for name, value in options.items() if value is not None})
    return fast_lc(dense.module, split, settings, curvature, part_lines(quiet), save_curvature)


def run_esn(
    dense: Model, split: Split, options: Mapping[str, Any], save_record: Path | None, quiet: bool
) -> MethodResult:
    """Prune-then-quantize; options that are None keep their defaults.

    Raises
    ------
    SettingError
        If there is a record, but no mean of the bits that it could give out.
    """
    if options["record"] is not None and not options["allocate"]:
        raise SettingError("--esn-record gives out bits by layer.", "Say how many with --mean-bits.")
    settings = EsnSettings(**{name: value for name, value in options.items() if value is not None})
    progress = epoch_lines(quiet, settings.epochs + settings.quantized_epochs)
    return prune_then_quantize(dense.module, split, settings, progress, save_record)
