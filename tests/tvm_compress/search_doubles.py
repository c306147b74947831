"""Test doubles for the learner and the study: a hand-made network, and an evaluator by formula."""

import dataclasses
from typing import Any

from tvm_compress.passes.groups import CoupledSet, Cut
from tvm_compress.passes.policy import CompressionPolicy
from tvm_compress.passes.sites import Site
from tvm_compress.schedules.target_rules import parse_target, rules_for
from tvm_compress.search.problem import SearchProblem
from tvm_compress.search.results import EpisodeResult


def conv(name: str, inputs: int, outputs: int, size: int, stride: int = 1, kernel: int = 3) -> Site:
    return Site(
        name=name,
        kind="conv2d",
        weight=f"{name}.weight",
        weight_shape=(outputs, inputs, kernel, kernel),
        in_shape=(1, size * stride, size * stride, inputs),
        out_shape=(1, size, size, outputs),
        strides=(stride, stride),
    )


def problem(agent: str = "joint", **changes: Any) -> SearchProblem:
    """A stem, one residual block with a projection, a dense layer: 32 - 64 channels, 10 classes."""
    sites = [
        conv("stem", 1, 32, 8),
        conv("conv1", 32, 64, 4, stride=2),
        conv("conv2", 64, 64, 4),
        conv("down", 32, 64, 4, stride=2, kernel=1),
        Site("fc", "dense", "fc.weight", (10, 64), (1, 64), (1, 10)),
    ]
    sets = [
        CoupledSet(
            "stem",
            32,
            ("stem",),
            (Cut("stem.weight", 0), Cut("conv1.weight", 1), Cut("down.weight", 1)),
            True,
        ),
        CoupledSet("conv1", 64, ("conv1",), (Cut("conv1.weight", 0), Cut("conv2.weight", 1)), True),
        CoupledSet(
            "conv2",
            64,
            ("conv2", "down"),
            (Cut("conv2.weight", 0), Cut("down.weight", 0), Cut("fc.weight", 1)),
            True,
        ),
        CoupledSet("fc", 10, ("fc",), (Cut("fc.weight", 0),), False, "these are the network's outputs"),
    ]
    legal = rules_for(parse_target("host")).bitserial_legal
    return dataclasses.replace(SearchProblem(sites, sets, agent, legal, rounding=8, target="host"), **changes)


class FormulaEvaluator:
    """Accuracy and latency by a formula of bits and channels; counts its calls."""

    def __init__(self, network: SearchProblem) -> None:
        self.network = network
        self.calls = 0
        self.fail_at: int | None = None

    def evaluate(self, policy: CompressionPolicy, episode: int) -> EpisodeResult:
        if episode == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        kept = {name: policy[name].channels or 64 for name in policy.sites}
        cost = sum(
            kept[n] / 64 * (policy[n].weight_bits + policy[n].activation_bits) / 64 for n in kept
        ) / len(kept)
        return EpisodeResult(0.5 + 0.4 * cost, cost * 0.01, cost, "measured", "seconds", {"macs": 1e6 * cost})

    def ratio(self, policy: CompressionPolicy) -> float:
        return self.evaluate(policy, 0).ratio

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]
