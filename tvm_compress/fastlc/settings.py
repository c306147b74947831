"""What Fast LC is asked to do, checked before anything runs."""

from dataclasses import dataclass, field

from tvm_compress.errors import SettingError
from tvm_compress.fastlc.learn import METRICS, MuSchedule
from tvm_compress.passes.policy import FACTORIZATIONS, GROUP

# The settings that go with each scheme; any other that is given is an error.
OPTIONS: dict[str, tuple[str, ...]] = {
    "prune": ("ratio", "scope", "group"),
    "kmeans": ("bits", "granularity"),
    "fixed": ("bits", "granularity"),
    "binary": ("scaled", "granularity"),
    "ternary": ("granularity",),
    "low-rank": ("ratio", "rank", "factorization"),
    "low-rank+sparse": ("ratio", "rank", "factorization", "sparse_share"),
}
SCHEMES = tuple(OPTIONS)
SCOPES = ("network", "layer")
GRANULARITIES = ("tensor", "channel")


@dataclass(frozen=True)
class FastLcSettings:
    """How `fast_lc` works. What is None is chosen: the values below, where the scheme knows the setting.

    Attributes
    ----------
    scheme
        "prune", "kmeans", "fixed", "binary", "ternary", "low-rank" or "low-rank+sparse".
    bits
        Of a weight: 1 to 8 for "kmeans", 2 to 8 for "fixed" (4).
    ratio
        How many times fewer weights are left, above 1 (4): "prune" keeps one of `ratio`; with the low-rank
        schemes ranks are chosen for it.
    rank
        One rank for every site, in the place of `ratio`; a site where it would save nothing stays whole.
    factorization
        "channel" or "spatial", of convolutions ("channel").
    sparse_share
        Share of the kept numbers that the sparse part of "low-rank+sparse" gets, in (0, 1) (0.25).
    scope
        Whether the weights that are kept are chosen over the "network" or in each "layer" alone ("network").
    group
        Which weights go together: "element", "simd-N", "filter" or "block-MxN" ("element").
    granularity
        A codebook or scale for each "tensor" or each output "channel" ("tensor").
    scaled
        Whether binary weights are -a and +a, or -1 and +1 (True).
    metric, mu
        See `learn`.
    damping
        Share of a layer's mean curvature that is added to every h: see `QuadraticModel.damped`.
    use_gradient
        Whether g counts; without it the trained weights are taken for a minimum (for pruning: optimal brain
        damage). Off by default: on real networks the diagonal model promises, for following g, gains that do
        not exist, since it takes the steps of millions of weights for independent (docs/fastlc.md).
    keep
        Sites that stay as they are.
    reestimate_batch_norm
        Whether the batch norms' statistics are taken again, from images without labels. Nothing else but the
        sites' weights is ever changed.
    images, draws
        For the curvature, where none is given: training images, and labels drawn for each (0: exact).

    Raises
    ------
    SettingError
        On an unknown scheme, a setting that the scheme does not know, and values out of range.
    """

    scheme: str
    bits: int | None = None
    ratio: float | None = None
    rank: int | None = None
    factorization: str | None = None
    sparse_share: float | None = None
    scope: str | None = None
    group: str | None = None
    granularity: str | None = None
    scaled: bool | None = None
    metric: str = "curvature"
    mu: MuSchedule = field(default_factory=MuSchedule)
    damping: float = 0.1
    use_gradient: bool = False
    keep: tuple[str, ...] = ()
    reestimate_batch_norm: bool = False
    images: int = 512
    draws: int = 0
    target: str = "host"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scheme not in OPTIONS:
            raise SettingError(f"Scheme {self.scheme!r} is unknown.", f"Known are: {', '.join(SCHEMES)}.")
        known = OPTIONS[self.scheme]
        for name in sorted({option for options in OPTIONS.values() for option in options}):
            if getattr(self, name) is not None and name not in known:
                with_it = [scheme for scheme, options in OPTIONS.items() if name in options]
                raise SettingError(
                    f"Scheme {self.scheme!r} has no {name}; its settings are: {', '.join(known)}.",
                    f"{name} goes with: {', '.join(with_it)}.",
                )
        if self.ratio is not None and self.rank is not None:
            raise SettingError("ratio and rank are both given.", "Give one: the rank follows from the ratio.")
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        choices = {
            "metric": METRICS,
            "scope": SCOPES,
            "granularity": GRANULARITIES,
            "factorization": FACTORIZATIONS,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value is not None and value not in allowed:
                raise SettingError(f"{name} must be one of {', '.join(allowed)}, not {value!r}.")
        if self.group is not None and (self.group == "channel" or not GROUP.fullmatch(self.group)):
            raise SettingError(
                f"group must be element, simd-N, filter or block-MxN, not {self.group!r}.",
                "Channels are removed by --method policy or toco." if self.group == "channel" else "",
            )

    def _check_ranges(self) -> None:
        least = 2 if self.scheme == "fixed" else 1
        if self.bits is not None and not least <= self.bits <= 8:
            raise SettingError(f"bits must be {least} to 8 with scheme {self.scheme!r}, not {self.bits}.")
        if self.ratio is not None and not 1 < self.ratio < float("inf"):
            raise SettingError(f"ratio must be above 1, not {self.ratio}.", "4 leaves a quarter.")
        if self.rank is not None and self.rank < 1:
            raise SettingError(f"rank must be at least 1, not {self.rank}.")
        if self.sparse_share is not None and not 0 < self.sparse_share < 1:
            raise SettingError(f"sparse_share must be above 0 and below 1, not {self.sparse_share}.")
        if not 0 <= self.damping < float("inf"):
            raise SettingError(f"damping must be at least 0, not {self.damping}.")
        if self.images < 1 or self.draws < 0:
            raise SettingError(
                f"images must be at least 1 and draws at least 0, not {self.images} and {self.draws}."
            )
