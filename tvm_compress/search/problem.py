"""What is decided within which rules (sites, coupled sets, legality), and the policy so far."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tvm_compress.errors import SettingError
from tvm_compress.passes.groups import CoupledSet, round_channels
from tvm_compress.passes.policy import CompressionPolicy, SitePolicy
from tvm_compress.passes.sites import Site
from tvm_compress.search.discretize import FP32, Precision, choose_precision, discretize

# Names of the actions of each agent, in the order in which they stand in the action vector.
ACTIONS: dict[str, tuple[str, ...]] = {
    "pruning": ("pruning",),
    "quantization": ("activation", "weight"),
    "joint": ("pruning", "activation", "weight"),
}

#: (kind, input channels, output channels, groups, output height, output width) -> the broken rule, or None.
BitserialRule = Callable[[str, int, int, int, int, int], str | None]


@dataclass(frozen=True)
class SearchProblem:
    """A network as the search sees it.

    Parameters
    ----------
    sites, sets
        Of the dense module, in order of execution.
    agent
        "pruning", "quantization" or "joint".
    bitserial_rule
        The target's rule for bit-serial kernels.
    sensitivity
        By site: {"weight": {bits: Omega}, "activation": {bits: Omega}, "pruning": {ratio: Omega}}.
    tolerance
        By coupled set: statistics of its channels' scores, by name.
    curvature
        By site: what its weights count for by Fast LC's model of the loss; empty where none was given.
    """

    sites: Sequence[Site]
    sets: Sequence[CoupledSet]
    agent: str
    bitserial_rule: BitserialRule
    rounding: int = 1
    max_bits: int = 6
    target: str = ""
    criterion: str = "tolerance"
    seed: int = 0
    model: str = ""
    sensitivity: Mapping[str, Mapping[str, Mapping[float, float]]] = field(default_factory=dict)
    tolerance: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    curvature: Mapping[str, Mapping[str, float]] = field(default_factory=dict)

    @property
    def actions(self) -> tuple[str, ...]:
        """Names of the actions, as they stand in the action vector."""
        return ACTIONS[self.agent]

    def output_set(self, site: Site) -> CoupledSet | None:
        """Coupled set of a site's output channels."""
        return next((group for group in self.sets if site.name in group.producers), None)

    def input_sets(self, site: Site) -> list[tuple[CoupledSet, int]]:
        """Coupled sets of a site's input channels, and how many inputs each of their channels feeds."""
        return [
            (group, cut.repeat)
            for group in self.sets
            for cut in group.cuts
            if cut.parameter == site.weight and cut.axis == 1
        ]

    def decides_pruning(self, site: Site) -> bool:
        """Whether a pruning action at this site counts: it is the first of a prunable coupled set."""
        group = self.output_set(site)
        if group is None or not group.prunable:
            return False
        return next(s.name for s in self.sites if s.name in group.producers) == site.name

    def decision_sites(self) -> list[Site]:
        """Sites at which the agent acts, in order.

        Raises
        ------
        SettingError
            If there are none.
        """
        found = [s for s in self.sites if self.agent != "pruning" or self.decides_pruning(s)]
        if not found:
            reasons = sorted({group.reason for group in self.sets if group.reason})
            why = f" ({'; '.join(reasons)})" if reasons else ""
            raise SettingError(
                f"The {self.agent} agent has nothing to decide: no site can be pruned{why}.",
                "Use --agent quantization.",
            )
        return found


class PolicyDraft:
    """The policy as far as it is decided. Precisions follow the channels that are known so far."""

    def __init__(self, problem: SearchProblem) -> None:
        self.problem = problem
        self._outputs = {site.name: problem.output_set(site) for site in problem.sites}
        self._inputs = {site.name: problem.input_sets(site) for site in problem.sites}
        self._channels: dict[str, int] = {}
        self._actions: dict[str, tuple[float, float]] = {}

    def decide(self, site: Site, actions: Mapping[str, float]) -> None:
        """Apply the named actions to a site; a pruning action counts only where `decides_pruning`."""
        group = self._outputs[site.name]
        if "pruning" in actions and group is not None and self.problem.decides_pruning(site):
            wanted = discretize(actions["pruning"], group.channels)
            self._channels[group.name] = round_channels(wanted, group.channels, self.problem.rounding)
        if "weight" in actions:
            self._actions[site.name] = (actions["activation"], actions["weight"])

    def out_channels(self, site: Site) -> int:
        """Output channels that the site has left."""
        group = self._outputs[site.name]
        if group is None or group.name not in self._channels:
            return site.out_channels
        return self._channels[group.name]

    def in_channels(self, site: Site) -> int:
        """Input channels that the site has left."""
        if self._depthwise(site):
            return self.out_channels(site)
        lost = 0
        for group, repeat in self._inputs[site.name]:
            lost += (group.channels - self._channels.get(group.name, group.channels)) * repeat
        return site.in_channels - lost

    @staticmethod
    def _depthwise(site: Site) -> bool:
        return site.groups > 1 and site.groups == site.in_channels == site.out_channels

    def broken_rule(self, site: Site) -> str | None:
        """Why the site, as pruned so far, cannot be bit-serial; None if it can."""
        height, width = site.out_shape[1:3] if site.kind == "conv2d" else (1, 1)
        inputs = self.in_channels(site)
        groups = inputs if self._depthwise(site) else site.groups
        return self.problem.bitserial_rule(site.kind, inputs, self.out_channels(site), groups, height, width)

    def precision(self, site: Site) -> Precision:
        """Scheme and bit widths of the site; FP32 where nothing was decided."""
        actions = self._actions.get(site.name)
        if actions is None:
            return FP32
        return choose_precision(*actions, self.broken_rule(site), self.problem.max_bits)

    def macs(self, site: Site) -> float:
        """Multiply-accumulates of the site as pruned so far."""
        inputs = 1.0 if site.groups > 1 else self.in_channels(site) / site.in_channels
        return site.macs * inputs * self.out_channels(site) / site.out_channels

    def bops(self, site: Site) -> float:
        """Bit operations of the site as decided so far (FP32 counts 32 bits)."""
        precision = self.precision(site)
        return self.macs(site) * precision.weight_bits * precision.activation_bits

    def to_policy(self, found_by: str) -> CompressionPolicy:
        """Policy with an entry for every site; each site of a pruned set names the set's channels."""
        entries = {}
        for site in self.problem.sites:
            group, precision = self._outputs[site.name], self.precision(site)
            kept = self._channels.get(group.name) if group is not None else None
            entries[site.name] = SitePolicy(
                channels=kept if group is not None and kept != group.channels else None,
                kept=None,
                scheme=precision.scheme,
                weight_bits=precision.weight_bits,
                activation_bits=precision.activation_bits,
                note=precision.note,
            )
        return CompressionPolicy(
            sites=entries,
            target=self.problem.target,
            rounding=self.problem.rounding,
            criterion=self.problem.criterion,
            seed=self.problem.seed,
            found_by=found_by,
            metrics={},
            model=self.problem.model,
        )
