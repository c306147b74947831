"""The schemes of Fast LC: which step compresses which site, how far, and what that stores."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.c_steps import (
    Binary,
    CStep,
    FixedPoint,
    KMeans,
    LowRank,
    Prune,
    PruneGroups,
    Sum,
    Ternary,
)
from tvm_compress.fastlc.exact import prune_exactly, pruning_gains
from tvm_compress.fastlc.learn import Learned, learn
from tvm_compress.fastlc.quadratic import QuadraticModel
from tvm_compress.fastlc.ranks import choose_ranks, spectrum
from tvm_compress.fastlc.settings import FastLcSettings
from tvm_compress.passes.factorize import factorizable, matrix_shape
from tvm_compress.passes.policy import SitePolicy
from tvm_compress.passes.sites import Site
from tvm_compress.passes.weight_groups import spread_tiles, tile_sizes

Models = dict[str, QuadraticModel]
Progress = Callable[[str, int, int], None]

_RATIO, _BITS, _SPARSE_SHARE = 4.0, 4, 0.25
_SUM_ROUNDS = 4


@dataclass
class Compression:
    """Compressed weights by site, with what they store and what the quadratic model expects of them.

    Attributes
    ----------
    bits
        Stored for the weights of each site: indices and codebooks, factors, or the weights that are not 0
        (32 bits each) with one bit for every weight that says whether it is.
    loss, direct_loss
        Predicted growth of the loss, for these weights and for directly compressed ones.
    """

    weights: dict[str, np.ndarray] = field(default_factory=dict)
    policies: dict[str, SitePolicy] = field(default_factory=dict)
    bits: dict[str, float] = field(default_factory=dict)
    loss: float = 0.0
    direct_loss: float = 0.0

    def add(self, name: str, found: Learned, policy: SitePolicy, bits: float) -> None:
        """Take what was found for a site."""
        self.weights[name], self.policies[name], self.bits[name] = found.value, policy, bits
        self.loss += found.loss
        self.direct_loss += found.direct_loss


def compress_weights(
    models: Models, sites: list[Site], settings: FastLcSettings, progress: Progress | None = None
) -> Compression:
    """Compress the weights of sites, given the quadratic model of each."""
    if settings.scheme == "prune":
        return _prune(models, settings)
    if settings.scheme.startswith("low-rank"):
        return _low_rank(models, sites, settings, progress)
    return _codebooks(models, settings, progress)


def _told(models: Models, progress: Progress | None) -> Iterator[tuple[str, QuadraticModel]]:
    """The sites one by one, telling how many are done."""
    for done, item in enumerate(models.items()):
        if progress is not None:
            progress("compression", done, len(models))
        yield item


def _codebooks(models: Models, settings: FastLcSettings, progress: Progress | None) -> Compression:
    per_channel = settings.granularity == "channel"
    bits = settings.bits or _BITS
    step: CStep
    if settings.scheme == "kmeans":
        step = KMeans(bits, per_channel)
    elif settings.scheme == "fixed":
        step = FixedPoint(bits, per_channel)
    elif settings.scheme == "binary":
        bits, step = 1, Binary(settings.scaled is not False, per_channel)
    else:
        bits, step = 2, Ternary(per_channel)
    result = Compression()
    for name, model in _told(models, progress):
        found = learn(model, step, settings.mu, settings.metric)
        books = len(found.value) if per_channel else 1
        stored = bits * found.value.size + 32 * 2**bits * books
        result.add(name, found, SitePolicy(codebook_bits=bits), stored)
    return result


def _prune(models: Models, settings: FastLcSettings) -> Compression:
    ratio, group = settings.ratio or _RATIO, settings.group or "element"
    units = [list(models)] if settings.scope != "layer" else [[name] for name in models]
    result = Compression()
    for names in units:
        shapes = [models[name].weights.shape for name in names]
        whole = QuadraticModel(
            *(
                np.concatenate([getattr(models[name], part).ravel() for name in names], dtype=np.float32)
                for part in ("weights", "gradient", "curvature")
            )
        )
        kept = int(whole.weights.size / ratio)
        groups = None if group == "element" else _group_labels(shapes, group)
        found = _prune_unit(whole, kept, groups, settings)
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
        for name, shape, part in zip(names, shapes, np.split(found.value, ends[:-1]), strict=True):
            zeros = float(np.count_nonzero(part == 0)) / part.size
            share = min(zeros, 1 - 1 / part.size)  # a policy's share is below 1
            policy = SitePolicy(weight_pruning_ratio=share, group=group)
            stored = 32 * (1 - zeros) * part.size + part.size
            result.add(name, Learned(part.reshape(shape), 0.0, 0.0, found.steps), policy, stored)
        result.loss += found.loss
        result.direct_loss += found.direct_loss
    return result


def _prune_unit(
    model: QuadraticModel, kept: int, groups: np.ndarray | None, settings: FastLcSettings
) -> Learned:
    step = Prune(kept) if groups is None else PruneGroups(kept, groups)
    if settings.metric == "l2":
        return learn(model, step, settings.mu, "l2")
    if groups is None:
        value = prune_exactly(model, kept)
    else:
        assert isinstance(step, PruneGroups)
        value = np.where(step.mask(pruning_gains(model)), model.target, 0.0)
    return Learned(value, model.loss(value), model.loss(step(model.weights)), 1)


def _group_labels(shapes: list[tuple[int, ...]], group: str) -> np.ndarray:
    """Number of each weight's group, over several tensors laid end to end."""
    labels, first = [], 0
    for shape in shapes:
        sizes = tile_sizes(group, shape)
        numbers = np.arange(first, first + sizes.size).reshape(sizes.shape)
        labels.append(spread_tiles(numbers, group, shape).ravel())
        first += sizes.size
    return np.concatenate(labels)


def _low_rank(
    models: Models, sites: list[Site], settings: FastLcSettings, progress: Progress | None
) -> Compression:
    factorization = settings.factorization or "channel"
    sparse = settings.scheme == "low-rank+sparse"
    share = (settings.sparse_share or _SPARSE_SHARE) if sparse else 0.0
    ranks = _ranks(models, sites, settings, factorization, share)
    result = Compression()
    for name, model in _told(models, progress):
        rank, size = ranks[name], model.weights.size
        if rank is None:
            unchanged = Learned(model.weights, 0.0, 0.0, 0)
            result.add(name, unchanged, SitePolicy(), 32 * size)
            continue
        low = LowRank(rank, factorization)
        numbers = rank * sum(matrix_shape(model.weights.shape, factorization))
        if sparse:
            kept = min(size, int(numbers * share / (1 - share)))
            found = _best(model, Sum((Prune(kept), low), _SUM_ROUNDS), settings)
            note = f"rank {rank} plus {kept} single weights, stored as one dense tensor"
            result.add(name, found, SitePolicy(note=note), 32 * (numbers + kept) + size)
        else:
            policy = SitePolicy(rank=rank, factorization=factorization)
            result.add(name, _best(model, low, settings), policy, 32 * numbers)
    return result


def _ranks(
    models: Models, sites: list[Site], settings: FastLcSettings, factorization: str, share: float
) -> dict[str, int | None]:
    """Rank of each site; None where it stays whole."""
    fit = [site.name for site in sites if factorizable(site)]
    ranks: dict[str, int | None] = dict.fromkeys(models)
    if settings.rank is not None:
        for name in fit:
            rows, columns = matrix_shape(models[name].weights.shape, factorization)
            if settings.rank * (rows + columns) < rows * columns:
                ranks[name] = settings.rank
        if all(rank is None for rank in ranks.values()):
            raise SettingError(f"Rank {settings.rank} saves nothing in any site.", "Ask for a smaller rank.")
        return ranks
    total = sum(model.weights.size for model in models.values())
    fixed = sum(models[name].weights.size for name in models if name not in fit)
    budget = int((total / (settings.ratio or _RATIO) - fixed) * (1 - share))
    spectra = {
        name: spectrum(models[name].target, models[name].penalty("curvature"), factorization) for name in fit
    }
    return ranks | choose_ranks(spectra, budget)


def _best(model: QuadraticModel, step: CStep, settings: FastLcSettings) -> Learned:
    """Learn with a step that is exact in the plain norm only: in both norms, unless that is asked for."""
    metrics = ("l2",) if settings.metric == "l2" else ("curvature", "l2")
    return min((learn(model, step, settings.mu, metric) for metric in metrics), key=lambda found: found.loss)
