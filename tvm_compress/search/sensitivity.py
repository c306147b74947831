"""Sensitivity: how far the answers move when one site alone is compressed (search paper, equation 5)."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import tvm

from tvm_compress.compressor import Compressor
from tvm_compress.passes.groups import round_channels
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.search.discretize import discretize
from tvm_compress.search.problem import PolicyDraft, SearchProblem
from tvm_compress.twin import Twin

# Points of the range of pruning ratios that are tried.
PRUNING_POINTS = 10

#: {site: {"weight" | "activation": {bits: Omega}, "pruning": {removed share: Omega}}}
Sensitivity = dict[str, dict[str, dict[float, float]]]


@dataclass(frozen=True)
class Variant:
    """One site compressed in one way; `entries` are the (method, key) that its divergence answers."""

    site: str
    policy: CompressionPolicy
    entries: tuple[tuple[str, float], ...]


def kl_divergence(compressed: np.ndarray, dense: np.ndarray) -> float:
    """Mean over samples of KL(p_compressed || p_dense) in nats, from logits [N, classes]."""
    log_p, log_q = _log_softmax(compressed), _log_softmax(dense)
    return float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def variants(problem: SearchProblem) -> list[Variant]:
    """Single-site policies that the search could choose parts of, without repeats.

    - Bit widths 1 to `max_bits` of weights and of activations, the other side at `max_bits`, where the target
      allows bit-serial for the site as it is; and INT8, which counts for both sides.
    - Up to 10 shares of channels removed, evenly spread, at the first site of each prunable coupled set;
      those that round to the same number of channels are one.
    """
    draft = PolicyDraft(problem)
    found: list[Variant] = []
    for site in problem.sites:
        if "weight" in problem.actions:
            legal = draft.broken_rule(site) is None
            found.extend(_bit_variants(problem, site.name, problem.max_bits if legal else 0))
        if "pruning" in problem.actions and problem.decides_pruning(site):
            found.extend(_pruning_variants(problem, site.name))
    return found


def _bit_variants(problem: SearchProblem, name: str, most: int) -> Iterator[Variant]:
    def variant(site: SitePolicy, *entries: tuple[str, float]) -> Variant:
        return Variant(name, _policy(problem, {name: site}), entries)

    int8 = SitePolicy(scheme="int8", weight_bits=8, activation_bits=8)
    yield variant(int8, ("weight", 8), ("activation", 8))
    if not most:
        return
    both = SitePolicy(scheme="bitserial", weight_bits=most, activation_bits=most)
    yield variant(both, ("weight", most), ("activation", most))
    for bits in range(1, most):
        yield variant(SitePolicy(None, None, "bitserial", bits, most), ("weight", bits))
        yield variant(SitePolicy(None, None, "bitserial", most, bits), ("activation", bits))


def _pruning_variants(problem: SearchProblem, name: str) -> Iterator[Variant]:
    group = next(g for g in problem.sets if name in g.producers)
    seen = {group.channels}
    for point in range(1, PRUNING_POINTS + 1):
        wanted = discretize(point / PRUNING_POINTS, group.channels)
        kept = round_channels(wanted, group.channels, problem.rounding)
        if kept in seen:
            continue
        seen.add(kept)
        sites = {producer: SitePolicy(channels=kept) for producer in group.producers}
        yield Variant(name, _policy(problem, sites), (("pruning", round(1.0 - kept / group.channels, 6)),))


def _policy(problem: SearchProblem, sites: Mapping[str, SitePolicy]) -> CompressionPolicy:
    return CompressionPolicy(
        sites=dict(sites),
        target=problem.target,
        rounding=problem.rounding,
        criterion=problem.criterion,
        found_by="sensitivity",
    )


def analyse(
    problem: SearchProblem, compressor: Compressor, x: np.ndarray, progress: Callable[[int, int], None]
) -> Sensitivity:
    """Divergence of each variant on images [N, C, H, W]; nothing in it is random.

    Quantized variants are taken at the QDQ stage, pruned ones with batch-norm statistics re-estimated, as in
    an episode. A site that no variant touches has an empty entry.
    """
    todo = variants(problem)
    dense = _logits(compressor.module, x)
    found: Sensitivity = {site.name: {} for site in problem.sites}
    for index, variant in enumerate(todo):
        policy = compressor.resolve(variant.policy)
        module = compressor.quantize(compressor.prune(policy), policy)
        divergence = kl_divergence(_logits(module, x), dense)
        for method, key in variant.entries:
            found[variant.site].setdefault(method, {})[float(key)] = divergence
        progress(index + 1, len(todo))
    return found


def _logits(module: tvm.IRModule, x: np.ndarray) -> np.ndarray:
    return Twin(module).predict(x)


def labelled(sensitivity: Mapping[str, Mapping[str, Mapping[float, float]]]) -> dict[str, dict[str, float]]:
    """The same by site and a label for people, such as "weights 4 bit" or "channels -25 %"."""
    words = {
        "weight": "weights {:g} bit",
        "activation": "activations {:g} bit",
        "pruning": "channels -{:.0%}",
    }
    return {
        site: {
            words[method].format(key): value
            for method in words
            for key, value in sorted(methods.get(method, {}).items())
        }
        for site, methods in sensitivity.items()
    }


def to_json(sensitivity: Sensitivity) -> dict[str, dict[str, list[list[float]]]]:
    """As JSON values (numbers cannot be keys there)."""
    return {
        site: {method: [[k, v] for k, v in sorted(table.items())] for method, table in methods.items()}
        for site, methods in sensitivity.items()
    }


def from_json(values: Mapping[str, Mapping[str, list[list[float]]]]) -> Sensitivity:
    """Read what `to_json` gave."""
    return {
        site: {method: {float(k): float(v) for k, v in rows} for method, rows in methods.items()}
        for site, methods in values.items()
    }
