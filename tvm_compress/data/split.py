"""Divides a source of labelled images into train, validation and test that share no image."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from tvm_compress.data.dataset import Dataset, Normalization, Split, stratified_indices
from tvm_compress.errors import DataError

PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Source:
    """What a reader found: images and labels, in the parts that the source itself has.

    Attributes
    ----------
    parts
        Part's name ("train", "validation", "test") -> images (of any layout) and labels [N], or None
        where the source has no labels. A source without parts has "train" only.
    class_names
        One name for each label, or nothing where the source does not say.
    """

    parts: Mapping[str, tuple[np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()


def split_source(
    source: Source,
    seed: int,
    normalization: Normalization,
    validation: float = 0.1,
    test: float = 0.1,
    labels: str = "data",
) -> Split:
    """Divide a source whose images are NCHW; parts that it has itself are kept as they are.

    Missing parts are taken from the training images, stratified by label: validation and test are drawn by
    the seed, the training part is what is left.

    Parameters
    ----------
    validation, test
        Shares of the training images, used where the source lacks that part.
    labels
        Where the labels are from: see `Split`.

    Raises
    ------
    DataError
        If there are no training images or no labels, a share is outside (0, 1), or a part would be empty.
    """
    for name, share in (("validation", validation), ("test", test)):
        if not 0 < share < 1:
            raise DataError(f"The share of {name} images must be within (0, 1), not {share}.")
    if "train" not in source.parts:
        raise DataError("The data hold no training images.", "Search and fine-tuning need them.")
    sets = {}
    for name, (x, y) in source.parts.items():
        if y is None:
            raise DataError(f"The {name} images have no labels.", "`load_data` lets the model label them.")
        sets[name] = Dataset(x, y, source.class_names, normalization)
    rng = np.random.default_rng(seed)
    total = len(sets["train"])
    # Test first: which images these are then does not depend on the validation share.
    for name, share in (("test", test), ("validation", validation)):
        if name in sets:
            continue
        rest = sets["train"]
        drawn = stratified_indices(rest.y, min(round(total * share), len(rest)), rng)
        sets[name] = rest.take(drawn)
        sets["train"] = rest.take(np.setdiff1d(np.arange(len(rest)), drawn))
    for name in PARTS:
        if not len(sets[name]):
            raise DataError(
                f"Of {total} images none is left for {name}.", "Give more images, or other shares."
            )
    return Split(sets["train"], sets["validation"], sets["test"], labels)
