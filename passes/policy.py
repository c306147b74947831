"""CompressionPolicy: what is done to each site of a model, as versioned JSON."""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from tvm_compress.errors import PolicyError
from tvm_compress.files import write_text
from tvm_compress.passes.groups import CoupledSet, round_channels
from tvm_compress.passes.sites import Site

VERSION = 1
SCHEMES = ("fp32", "int8", "bitserial")
CRITERIA = ("tolerance", "l1", "l2")
MAX_BITSERIAL_BITS = 6
# Weight and activation bits that each scheme allows, from and to.
_BITS = {
    "fp32": ((32, 32), (32, 32)),
    "int8": ((1, 8), (8, 8)),
    "bitserial": ((1, MAX_BITSERIAL_BITS), (1, MAX_BITSERIAL_BITS)),
}
FACTORIZATIONS = ("channel", "spatial")
GROUP = re.compile(r"element|filter|channel|simd-[1-9][0-9]*|block-[1-9][0-9]*x[1-9][0-9]*")


class BitserialRules(Protocol):
    """The part of `schedules.target_rules.TargetRules` that a policy needs."""

    def bitserial_legal(
        self, kind: str, in_channels: int, out_channels: int, groups: int, out_height: int, out_width: int
    ) -> str | None:
        """Give the rule that such a bit-serial site would break, or None."""


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class SitePolicy:
    """What is done to one site; the defaults mean: untouched.

    Parameters
    ----------
    channels
        How many output channels of the site's coupled set are kept.
    kept
        Which of them, ascending; `channels` follows from it where it is not given.
    scheme
        "fp32" (32/32 bits), "int8" (8 bits; weights of fewer, 1 to 7, stand on a coarser grid, stored and
        computed as bytes) or "bitserial" (1 to 6 bits each).
    weight_pruning_ratio
        Share of the site's own weights that are zero, in [0, 1).
    group
        Which weights go to zero together: "element" (each alone), "simd-N" (N neighbours along the packed
        axis), "filter" (an output channel), "channel" (a coupled set's) or "block-MxN".
    rank
        Rank of the two layers that take the site's place; None leaves it whole.
    factorization
        How a convolution is split into them: "channel" (kernel to `rank` channels, then 1 x 1) or "spatial"
        (a column, then a row).
    codebook_bits
        The weights are indices of 1 to 8 bits into a codebook of floats; 0 is none. Scheme "fp32" only: what
        is computed stays float32.
    note
        For people, e.g. why bit-serial fell back to INT8.

    Raises
    ------
    PolicyError
        Where the values cannot be, whatever the model.
    """

    channels: int | None = None
    kept: tuple[int, ...] | None = None
    scheme: str = "fp32"
    weight_bits: int = 32
    activation_bits: int = 32
    weight_pruning_ratio: float = 0.0
    group: str = "element"
    rank: int | None = None
    factorization: str = "channel"
    codebook_bits: int = 0
    note: str = ""

    def __post_init__(self) -> None:
        self._check_channels()
        if self.scheme not in SCHEMES:
            raise PolicyError(f"scheme must be one of {', '.join(SCHEMES)}, not {self.scheme!r}.")
        for name, allowed in zip(("weight_bits", "activation_bits"), _BITS[self.scheme], strict=True):
            bits, (low, high) = getattr(self, name), allowed
            if not _is_int(bits) or not low <= bits <= high:
                wanted = str(low) if low == high else f"{low} to {high}"
                raise PolicyError(f"{name} must be {wanted} with scheme {self.scheme!r}, not {bits!r}.")
        self._check_weights()
        if not isinstance(self.note, str):
            raise PolicyError(f"note must be text, not {self.note!r}.")

    def _check_weights(self) -> None:
        ratio = self.weight_pruning_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 <= ratio < 1:
            raise PolicyError(f"weight_pruning_ratio must be in [0, 1), not {ratio!r}.")
        if not isinstance(self.group, str) or not GROUP.fullmatch(self.group):
            raise PolicyError(
                f"group must be element, simd-N, filter, channel or block-MxN, not {self.group!r}."
            )
        if self.rank is not None and (not _is_int(self.rank) or self.rank < 1):
            raise PolicyError(f"rank must be a whole number from 1, not {self.rank!r}.")
        if self.factorization not in FACTORIZATIONS:
            raise PolicyError(
                f"factorization must be one of {', '.join(FACTORIZATIONS)}, not {self.factorization!r}."
            )
        if not _is_int(self.codebook_bits) or not 0 <= self.codebook_bits <= 8:
            raise PolicyError(f"codebook_bits must be 0 to 8, not {self.codebook_bits!r}.")
        if self.codebook_bits and self.scheme != "fp32":
            raise PolicyError(
                f"codebook_bits goes with scheme 'fp32', not {self.scheme!r}: its codewords are floats."
            )

    def _check_channels(self) -> None:
        if self.kept is not None:
            if isinstance(self.kept, str) or not isinstance(self.kept, Sequence):
                raise PolicyError(f"kept must be a list of channels, not {self.kept!r}.")
            object.__setattr__(self, "kept", tuple(self.kept))
            if not all(_is_int(index) and index >= 0 for index in self.kept) or not self.kept:
                raise PolicyError(f"kept must hold channel numbers from 0, at least one, not {self.kept!r}.")
            if any(b <= a for a, b in zip(self.kept, self.kept[1:], strict=False)):
                raise PolicyError(f"kept must be ascending without repeats, not {self.kept!r}.")
            if self.channels is None:
                object.__setattr__(self, "channels", len(self.kept))
        if self.channels is not None and (not _is_int(self.channels) or self.channels < 1):
            raise PolicyError(f"channels must be a whole number from 1, not {self.channels!r}.")
        if self.kept is not None and self.channels != len(self.kept):
            raise PolicyError(f"channels is {self.channels}, but kept holds {len(self.kept)} channels.")

    @property
    def quantized(self) -> bool:
        """Whether the site computes integers."""
        return self.scheme != "fp32"

    def to_dict(self) -> dict[str, Any]:
        """Give the values that are not the defaults."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {name: list(value) if name == "kept" else value for name, value in values.items()}


def fingerprint(sites: Sequence[Site]) -> str:
    """Hash of the names and shapes of a model's sites (16 hexadecimal digits)."""
    rows = [
        [s.name, s.kind, s.weight_shape, s.in_shape, s.out_shape, s.strides, s.padding, s.dilation, s.groups]
        for s in sites
    ]
    return sha256(json.dumps(rows).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class CompressionPolicy:
    """What is done to a model: a `SitePolicy` per site; a site that is not named stays untouched.

    Parameters
    ----------
    sites
        By the sites' names.
    target
        What it was made for, as the user spelt it ("host", "raspberry-pi/4b-aarch64", ...).
    rounding
        The multiple that kept channels are rounded up to.
    criterion
        What chose the channels where `kept` is not given: "tolerance", "l1" or "l2".
    found_by, metrics
        Provenance: which search, with which results.
    model
        `fingerprint` of the sites it was made for; "" fits any model with these sites.

    Raises
    ------
    PolicyError
        Where a value cannot be; it names the site.
    """

    sites: dict[str, SitePolicy] = field(default_factory=dict)
    target: str = "host"
    rounding: int = 1
    criterion: str = "tolerance"
    seed: int = 0
    found_by: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    model: str = ""

    def __post_init__(self) -> None:
        for name in ("target", "found_by", "model"):
            if not isinstance(getattr(self, name), str):
                raise PolicyError(f"{name} must be text, not {getattr(self, name)!r}.")
        if not _is_int(self.rounding) or self.rounding < 1:
            raise PolicyError(f"rounding must be a whole number from 1, not {self.rounding!r}.")
        if not _is_int(self.seed) or self.seed < 0:
            raise PolicyError(f"seed must be a whole number from 0, not {self.seed!r}.")
        if self.criterion not in CRITERIA:
            raise PolicyError(f"criterion must be one of {', '.join(CRITERIA)}, not {self.criterion!r}.")
        for name, value in self.metrics.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise PolicyError(f"metric {name!r} must be a finite number, not {value!r}.")
        for name, site in self.sites.items():
            if not isinstance(name, str) or not isinstance(site, SitePolicy):
                raise PolicyError(f"site {name!r} must be a SitePolicy, not {site!r}.")

    def __getitem__(self, site: str) -> SitePolicy:
        """Give the policy of a site; an untouched one where the site is not named."""
        return self.sites.get(site, SitePolicy())

    def to_json(self) -> str:
        """Write as deterministic JSON text: same policy, same bytes."""
        values: dict[str, Any] = {"version": VERSION}
        values |= {f.name: getattr(self, f.name) for f in fields(self) if f.name != "sites"}
        values["metrics"] = dict(sorted(self.metrics.items()))
        values["sites"] = {name: site.to_dict() for name, site in sorted(self.sites.items())}
        return json.dumps(values, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "CompressionPolicy":
        """Read what `to_json` wrote.

        Raises
        ------
        PolicyError
            On text that is not JSON, another version, unknown keys and impossible values.
        """
        try:
            values = json.loads(text)
        except ValueError as error:
            raise PolicyError(
                f"The policy is not JSON: {error}.", "Give a file that this tool wrote."
            ) from error
        if not isinstance(values, dict):
            raise PolicyError(f"The policy must be a JSON object, not {type(values).__name__}.")
        version = values.pop("version", None)
        if version != VERSION or isinstance(version, bool):
            raise PolicyError(
                f"The policy has version {version!r}; this tool reads version {VERSION}.",
                "Make it again with this version of the tool.",
            )
        _check_keys(values, cls, "The policy")
        for name in ("sites", "metrics"):
            if not isinstance(values.get(name, {}), dict):
                raise PolicyError(f"{name} must be a JSON object, not {values[name]!r}.")
        sites = {name: _read_site(name, site) for name, site in values.pop("sites", {}).items()}
        return cls(sites=sites, **values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write to a file; it is never seen half-written."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CompressionPolicy":
        """Read a file; a PolicyError names the file where it cannot be read."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PolicyError(f"The policy {path} cannot be read: {error}.") from error
        return cls.from_json(text)

    def check(self, sites: Sequence[Site]) -> None:
        """Check that the policy fits a model, given its sites before any pruning.

        Raises
        ------
        PolicyError
            On unknown sites, channels that the site has not, and a policy made for another model.
        """
        found = fingerprint(sites)
        if self.model and self.model != found:
            raise PolicyError(
                f"This is a policy for another model: made for sites with fingerprint {self.model}, "
                f"the model's is {found}.",
                "Search again for this model, or give the model that the policy was made for.",
            )
        known = {site.name: site for site in sites}
        for name, wanted in self.sites.items():
            site = known.get(name)
            if site is None:
                raise PolicyError(
                    f"The policy names site {name!r}, which the model has not.",
                    f"Its sites are: {', '.join(known)}.",
                )
            if wanted.channels is not None and wanted.channels > site.out_channels:
                raise PolicyError(
                    f"Site {name!r} has {site.out_channels} output channels; "
                    f"{wanted.channels} cannot be kept."
                )
            if wanted.kept is not None and wanted.kept[-1] >= site.out_channels:
                raise PolicyError(
                    f"Site {name!r} has {site.out_channels} output channels; "
                    f"there is no channel {wanted.kept[-1]}."
                )

    def legalize(
        self, sites: Sequence[Site], rules: BitserialRules, sets: Sequence[CoupledSet] = ()
    ) -> "CompressionPolicy":
        """Turn the bit-serial sites that a target has no kernel for into INT8, with the reason as note.

        `sets` are the model's coupled sets: with them, the rules see the channels that are left after this
        policy's pruning, on both sides of each site; without them, the sites as they are.
        """
        left = channels_after(sites, sets, self)
        changed = dict(self.sites)
        for site in sites:
            wanted = self[site.name]
            if wanted.scheme != "bitserial":
                continue
            ins, outs = left[site.name]
            height, width = site.out_shape[1:3] if site.kind == "conv2d" else (1, 1)
            groups = ins if site.groups == site.in_channels > 1 else site.groups
            broken = rules.bitserial_legal(site.kind, ins, outs, groups, height, width)
            if broken is not None:
                bits = f"{wanted.weight_bits}x{wanted.activation_bits}"
                note = f"INT8 instead of bit-serial {bits}: {broken}"
                changed[site.name] = replace(
                    wanted, scheme="int8", weight_bits=8, activation_bits=8, note=note
                )
        return replace(self, sites=changed)


def channels_after(
    sites: Sequence[Site], sets: Sequence[CoupledSet], policy: CompressionPolicy
) -> dict[str, tuple[int, int]]:
    """Give each site's input and output channels that are left by the policy's pruning and rounding."""
    cut: dict[tuple[str, int], int] = {}
    for coupled in sets:
        asked = [policy[name] for name in coupled.producers]
        if any(site.kept is not None for site in asked):
            kept = next(len(site.kept) for site in asked if site.kept is not None)
        else:
            wanted = next((site.channels for site in asked if site.channels is not None), coupled.channels)
            kept = round_channels(wanted, coupled.channels, policy.rounding)
        for one in coupled.cuts:
            key = one.parameter, one.axis
            cut[key] = cut.get(key, 0) + (coupled.channels - kept) * one.repeat
    left = {}
    for site in sites:
        outs = site.out_channels - cut.get((site.weight, 0), 0)
        # A depthwise convolution has no weights per input channel: its channels go in and out together.
        depthwise = site.groups == site.in_channels == site.out_channels and site.groups > 1
        left[site.name] = (outs if depthwise else site.in_channels - cut.get((site.weight, 1), 0), outs)
    return left


def _check_keys(values: Mapping[str, Any], cls: type, what: str) -> None:
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise PolicyError(
            f"{what} has unknown keys: {', '.join(unknown)}.",
            f"Known are: {', '.join(f.name for f in fields(cls))}.",
        )


def _read_site(name: str, values: Any) -> SitePolicy:
    if not isinstance(values, dict):
        raise PolicyError(f"Site {name!r} must be a JSON object, not {values!r}.")
    _check_keys(values, SitePolicy, f"Site {name!r}")
    try:
        return SitePolicy(**values)
    except PolicyError as error:
        raise PolicyError(f"Site {name!r}: {error.message}", error.hint) from error
