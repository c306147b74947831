"""From the words of the command line to models and data."""

import sys
from collections.abc import Callable
from pathlib import Path

from tvm_compress.data.dataset import Normalization, Split
from tvm_compress.data.load import load_data
from tvm_compress.errors import DataError, SettingError
from tvm_compress.model import Model, load_model


def model_and_data(
    model: str,
    data: str | None,
    seed: int,
    layout: str | None = None,
    mean: str | None = None,
    std: str | None = None,
) -> tuple[Model, Split]:
    """Load both; a sample model brings its own data.

    Raises
    ------
    DataError
        If no data is named and the model is no sample.
    """
    source = data or (model if model.startswith("sample:") else None)
    if source is None:
        raise DataError(
            "No data was given.", "Name it with --data: an .npz, an IDX folder, an image folder, ..."
        )
    loaded = load_model(model)
    split = load_data(source, loaded, seed, layout=layout, normalization=normalization(mean, std))
    if split.labels == "model":
        sys.stderr.write(f"{source} has no labels: the model's own predictions stand in for them.\n")
    return loaded, split


def normalization(mean: str | None, std: str | None) -> Normalization | None:
    """Normalisation from `--mean` and `--std`; None where neither is given.

    Raises
    ------
    SettingError
        If only one is given or a value is not a number.
    """
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise SettingError("--mean and --std go together; one is missing.")
    return Normalization(_numbers("--mean", mean), _numbers("--std", std))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise SettingError(f"{option} is {text!r}, but must be numbers, such as 0.5,0.5,0.5.") from error


def study_path(name: str, folder: Path) -> Path:
    """Directory of a study: a name stands in the folder of studies, a path stands for itself."""
    return Path(name) if "/" in name else folder / name


def part_lines(quiet: bool) -> Callable[[str, int, int], None]:
    """Progress callback of a method: what is done and how far, on one line, if somebody looks."""

    def show(what: str, done: int, total: int) -> None:
        if not quiet and sys.stderr.isatty():
            sys.stderr.write(f"\r{what}: {done} of {total}   " + ("\n" if done == total else ""))

    return show


def epoch_lines(quiet: bool, epochs: int) -> Callable[[int], None]:
    """Progress callback of a fine-tuning: one line per epoch on standard error, if somebody looks."""

    def show(done: int) -> None:
        if not quiet and sys.stderr.isatty():
            sys.stderr.write(f"fine-tuning: epoch {done} of {epochs}\n")

    return show
