"""The methods of `tvm-compress compress --method`, from options to compressed models."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tvm_compress.cli.load import epoch_lines, model_and_data, part_lines
from tvm_compress.compression import compress_model, compressed_model, uniform_policy
from tvm_compress.compressor import PostTraining
from tvm_compress.data.dataset import Split
from tvm_compress.errors import SettingError
from tvm_compress.fastlc.compress import fast_lc
from tvm_compress.fastlc.settings import SCHEMES, FastLcSettings
from tvm_compress.method import MethodResult
from tvm_compress.metrics.esn_training import EsnRecord
from tvm_compress.model import Model, load_model
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.prune_then_quantize import EsnSettings, prune_then_quantize
from tvm_compress.tolerance.algorithm1 import Iteration
from tvm_compress.tolerance.compress import toco
from tvm_compress.tolerance.settings import TocoSettings

# What may decide how a model is compressed ("policy" is a given or a uniform one), and the options of each
# beyond those that all share. An option of `compress` that no method names here belongs to all of them.
OPTIONS: dict[str, tuple[str, ...]] = {
    "policy": (
        *("policy", "pruning_ratio", "weight_bits", "activation_bits", "rounding", "criterion"),
        *("finetune_epochs", "learning_rate", "calibration", "images"),
        *("equalize", "weight_rounding", "bias_correction", "calibration_plot"),
    ),
    "toco": (
        *("objective", "group", "rounding", "loss_bound", "sigma", "trust_radius", "iterations"),
        *("step", "sampling"),
        *("images", "batches", "memory", "sensitivity", "worth", "percentile", "labels", "trials"),
        *("finetune_epochs", "learning_rate"),
    ),
    "fastlc": (
        *("scheme", "bits", "ratio", "rank", "factorization", "sparse_share", "scope", "group"),
        *("granularity", "scaled", "metric", "damping", "gradient", "keep", "reestimate_batch_norm"),
        *("images", "draws", "curvature", "save_curvature"),
    ),
    "esn": (
        *("width", "weight_bits", "mean_bits", "esn_record", "save_esn", "activation_bits", "criterion"),
        *("rounding", "finetune_epochs", "quantized_epochs", "learning_rate"),
    ),
}
METHODS = tuple(OPTIONS)


Outcome = tuple[Model, Split | None, dict[str, Any]]


def run_method(method: str, given: Mapping[str, Any]) -> Outcome:
    """Compress as the options of `compress` say.

    Parameters
    ----------
    given
        Every option by its name; None or False where it was not given.

    Returns
    -------
    The compressed model, the data if any were needed, and what the method found out.

    Raises
    ------
    SettingError
        If the method is unknown, or an option was given that it does not know.
    """
    if method not in OPTIONS:
        raise SettingError(f"--method {method!r} is unknown.", f"Known are: {', '.join(METHODS)}.")
    for name in {name for names in OPTIONS.values() for name in names}.difference(OPTIONS[method]):
        if given[name] not in (None, False):
            owners = " or ".join(owner for owner, names in OPTIONS.items() if name in names)
            raise SettingError(
                f"--{name.replace('_', '-')} does not go with --method {method}.",
                f"It belongs to --method {owners}. Leave it out, or name that method.",
            )
    return _RUNS[method](given)


def _chosen(given: Mapping[str, Any], *names: str, **others: Any) -> dict[str, Any]:
    """What was given of the named options, and of `others`, so that settings keep their own defaults."""
    taken = {name: given[name] for name in (*names, "target", "seed")} | others
    return {name: value for name, value in taken.items() if value is not None}


def _data(given: Mapping[str, Any]) -> tuple[Model, Split]:
    return model_and_data(*(given[name] for name in ("model", "data", "split_seed", "layout", "mean", "std")))


def _of(dense: Model, result: MethodResult, split: Split | None) -> Outcome:
    return compressed_model(dense, result.policy, result.module), split, result.summary


def _policy(given: Mapping[str, Any]) -> Outcome:
    uniform = ("pruning_ratio", "weight_bits", "activation_bits", "rounding", "criterion")
    both = [name for name in uniform if given[name] is not None]
    if given["policy"] is not None and both:
        raise SettingError(
            f"--policy says what is done to each site; --{both[0].replace('_', '-')} says it for all.",
            "Leave one out.",
        )
    dense, split = _data(given)
    if given["policy"] is not None:
        policy = CompressionPolicy.load(given["policy"])
    else:
        policy = uniform_policy(dense, **_chosen(given, *uniform))
    _check_plot(given["calibration_plot"], policy)
    epochs = given["finetune_epochs"] or 0
    compressed = compress_model(
        dense,
        policy,
        split,
        finetune_epochs=epochs,
        learning_rate=0.01 if given["learning_rate"] is None else given["learning_rate"],
        seed=given["seed"],
        post_training=PostTraining(
            **{k: given[k] for k in ("calibration", "weight_rounding") if given[k] is not None},
            equalize=given["equalize"],
            bias_correction=given["bias_correction"],
        ),
        **{k: given[k] for k in ("images",) if given[k] is not None},
        progress=epoch_lines(given["as_json"], epochs),
    )
    return compressed, split, {}


def _check_plot(path: Path | None, policy: CompressionPolicy) -> None:
    """Refuse a plot that could not be written, before anything is computed."""
    if path is None:
        return
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise SettingError(
            f"--calibration-plot is {str(path)!r}, but must be a PNG file in a folder that exists.",
            "Such as --calibration-plot ranges.png.",
        )
    if not any(site.quantized for site in policy.sites.values()):
        raise SettingError(
            "--calibration-plot draws ranges of what is quantized, and nothing is.",
            "Give --weight-bits and --activation-bits, or leave it out.",
        )


def _toco(given: Mapping[str, Any]) -> Outcome:
    dense, split = _data(given)
    settings = TocoSettings(**_chosen(given, *(name for name in OPTIONS["toco"] if name != "trials")))
    lines = part_lines(given["as_json"])

    def tell(iteration: Iteration) -> None:
        lines("iteration", iteration.number + 1, settings.iterations)

    return _of(dense, toco(dense.module, split, settings, given["trials"], tell), split)


def _fastlc(given: Mapping[str, Any]) -> Outcome:
    if given["scheme"] is None:
        raise SettingError("--method fastlc needs --scheme.", f"Known are: {', '.join(SCHEMES)}.")
    split: Split | None = None
    if given["curvature"] is None or given["reestimate_batch_norm"]:
        dense, split = _data(given)
    else:
        dense = load_model(given["model"])
    other = ("curvature", "save_curvature", "gradient", "keep")
    settings = FastLcSettings(
        **_chosen(
            given,
            *(name for name in OPTIONS["fastlc"] if name not in other),
            use_gradient=given["gradient"],
            keep=None if given["keep"] is None else tuple(given["keep"]),
        )
    )
    progress = part_lines(given["as_json"])
    result = fast_lc(dense.module, split, settings, given["curvature"], progress, given["save_curvature"])
    return _of(dense, result, split)


def _esn(given: Mapping[str, Any]) -> Outcome:
    record, mean_bits = given["esn_record"], given["mean_bits"]
    if record is not None and mean_bits is None:
        raise SettingError("--esn-record gives out bits by layer.", "Say how many with --mean-bits.")
    if mean_bits is not None and given["weight_bits"] is not None:
        raise SettingError(
            "--weight-bits gives every layer the same bits, --mean-bits each its own.", "Leave one out."
        )
    dense, split = _data(given)
    settings = EsnSettings(
        **_chosen(
            given,
            *("width", "activation_bits", "criterion", "rounding", "quantized_epochs", "learning_rate"),
            weight_bits=given["weight_bits"] if mean_bits is None else mean_bits,
            allocate=mean_bits is not None,
            record=None if record is None else EsnRecord.load(record),
            epochs=given["finetune_epochs"],
        )
    )
    progress = epoch_lines(given["as_json"], settings.epochs + settings.quantized_epochs)
    return _of(dense, prune_then_quantize(dense.module, split, settings, progress, given["save_esn"]), split)


_RUNS: dict[str, Callable[[Mapping[str, Any]], Outcome]] = {
    "policy": _policy,
    "toco": _toco,
    "fastlc": _fastlc,
    "esn": _esn,
}
