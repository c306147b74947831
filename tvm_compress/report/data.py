"""What a report shows, as plain values: whoever ran the job fills them in, plots and page only draw."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from tvm_compress.calibration import RangeReport
from tvm_compress.errors import StudyError


@dataclass(frozen=True)
class Variant:
    """One model in the table: dense, or compressed.

    Attributes
    ----------
    name
        "dense" or "compressed".
    accuracy
        Share of right predictions on the test part.
    latency
        Median latency in `latency_unit`, measured.
    latency_spread
        Median absolute deviation of the samples.
    latency_unit
        "seconds" or "estimated_cycles".
    emulated_cycles
        Estimated Cortex-A72 cycles (emulated), where they were taken.
    macs, bops, parameter_bytes, library_bytes, esn_a, esn_d
        Costs; None where not counted.
    """

    name: str
    accuracy: float
    latency: float
    latency_spread: float
    latency_unit: str
    emulated_cycles: float | None = None
    macs: float | None = None
    bops: float | None = None
    parameter_bytes: float | None = None
    library_bytes: float | None = None
    esn_a: float | None = None
    esn_d: float | None = None


@dataclass(frozen=True)
class TrialPoint:
    """One episode: accuracy is on the validation part, latency_ratio is T_P / T_0."""

    episode: int
    reward: float
    accuracy: float
    latency_ratio: float
    latency_kind: str
    warmup: bool = False


@dataclass(frozen=True)
class SiteBar:
    """What the chosen policy does to one site."""

    name: str
    channels_total: int
    channels_kept: int
    scheme: str
    weight_bits: int
    activation_bits: int
    note: str = ""


@dataclass(frozen=True)
class ReportData:
    """Everything on the page.

    Attributes
    ----------
    sensitivity
        Site name -> (compression label, such as "weights 4 bit" -> mean KL divergence in nats).
    ranges
        Calibration of what the chosen policy quantizes, before any fine-tuning.
    pareto
        Episodes on the Pareto front of accuracy against latency.
    chosen
        Episode of the chosen policy, or None.
    budget
        The latency share that was asked for, T_P / T_0.
    agreement
        Share of test samples on which artifact and twin predict the same class, by artifact name.
    settings, versions, machine
        Name -> value, as shown in the last table.
    """

    title: str
    study: str
    seed: int
    budget: float
    dense: Variant
    best: Variant
    trials: Sequence[TrialPoint]
    sites: Sequence[SiteBar]
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    ranges: Sequence[RangeReport] = ()
    pareto: Sequence[int] = ()
    chosen: int | None = None
    agreement: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the data as JSON text, from which `from_json` makes it again."""
        # In the given order: it is the order of the rows and the labels on the page.
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "ReportData":
        """Read what `to_json` wrote.

        Raises
        ------
        StudyError
            If the text is not that.
        """
        try:
            values = json.loads(text)
            return ReportData(
                **values
                | {
                    "dense": Variant(**values["dense"]),
                    "best": Variant(**values["best"]),
                    "trials": [TrialPoint(**trial) for trial in values["trials"]],
                    "sites": [SiteBar(**site) for site in values["sites"]],
                    "ranges": [RangeReport.from_dict(row) for row in values.get("ranges", ())],
                }
            )
        except (ValueError, KeyError, TypeError) as error:
            raise StudyError(
                f"The report's data cannot be read: {error}.", "Run the search again with the same --study."
            ) from error
