"""`tvm-compress search` and `demo`: the main job."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from tvm_compress.cli.load import model_and_data, study_path
from tvm_compress.cli.options import (
    DataOption,
    DebugOption,
    DeviceOption,
    JsonOption,
    LayoutOption,
    MeanOption,
    ModelArgument,
    SeedOption,
    SplitSeedOption,
    StdOption,
    ThreadsOption,
)
from tvm_compress.cli.output import print_json, print_lines, print_table, search_progress
from tvm_compress.cost.latency_model import LatencyModel
from tvm_compress.fastlc.curvature import Curvature
from tvm_compress.finetune import AUGMENTATIONS
from tvm_compress.report.html import table_rows
from tvm_compress.search.settings import SearchSettings
from tvm_compress.workflow import RPI4, Outcome, run_study

DEMO_MODEL = "sample:resnet8-fashion"
DEFAULTS = SearchSettings()
StudiesOption = Annotated[Path, typer.Option(help="Folder of the studies.")]


def search(
    model: ModelArgument,
    study: Annotated[str, typer.Option(help="Name or directory of the study; the same again resumes it.")],
    data: DataOption = None,
    layout: LayoutOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    split_seed: SplitSeedOption = 0,
    agent: Annotated[str, typer.Option(help="joint, pruning or quantization.")] = DEFAULTS.agent,
    budget: Annotated[
        float, typer.Option(help="Latency to reach, as a share of the dense model's, in (0, 1].")
    ] = DEFAULTS.budget,
    episodes: Annotated[int, typer.Option(help="Policies to try.")] = DEFAULTS.episodes,
    warmup: Annotated[int, typer.Option(help="Random episodes at the start.")] = DEFAULTS.warmup,
    seed: SeedOption = 0,
    device: DeviceOption = DEFAULTS.device,
    threads: ThreadsOption = DEFAULTS.threads,
    target: Annotated[str, typer.Option(help="Target of the kernels; else the device's own.")] = "",
    artifact: Annotated[
        list[str] | None, typer.Option(help="Further targets to build artifacts for; may be repeated.")
    ] = None,
    latency: Annotated[
        str,
        typer.Option(
            help="measure; kernels: the sum of kernels, each timed once; or hybrid: predicted where safe."
        ),
    ] = DEFAULTS.latency,
    rounding: Annotated[
        int, typer.Option(help="Kept channels are rounded up to 1, 8 or 32.")
    ] = DEFAULTS.rounding,
    criterion: Annotated[str, typer.Option(help="tolerance, l1 or l2.")] = DEFAULTS.criterion,
    beta: Annotated[
        float, typer.Option(help="Weight of the latency in the reward, negative.")
    ] = DEFAULTS.beta,
    max_bits: Annotated[int, typer.Option(help="Largest width of a bit-serial site.")] = DEFAULTS.max_bits,
    retrain_epochs: Annotated[int, typer.Option(help="Training in each episode.")] = DEFAULTS.retrain_epochs,
    finetune_epochs: Annotated[int, typer.Option(help="Training of the best.")] = DEFAULTS.finetune_epochs,
    augment: Annotated[
        str, typer.Option(help="Varies the images of that training: " + ", ".join(AUGMENTATIONS) + ".")
    ] = DEFAULTS.augment,
    strategy: Annotated[str, typer.Option(help="ddpg, or random as a baseline.")] = DEFAULTS.strategy,
    curvature: Annotated[
        Path | None,
        typer.Option(help="Curvature of this model (compress --save-curvature) for the agent to see."),
    ] = None,
    cost_model: Annotated[
        Path | None, typer.Option(help="Latency model (cost fit) that --latency hybrid starts from.")
    ] = None,
    studies: StudiesOption = Path("runs"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Search a compression policy, fine-tune the best, build, verify and report."""
    settings = SearchSettings(
        agent=agent,
        budget=budget,
        episodes=episodes,
        warmup=warmup,
        seed=seed,
        device=device,
        threads=threads,
        target=target,
        latency=latency,
        rounding=rounding,
        criterion=criterion,
        beta=beta,
        max_bits=max_bits,
        retrain_epochs=retrain_epochs,
        finetune_epochs=finetune_epochs,
        augment=augment,
        strategy=strategy,
    )
    loaded, split = model_and_data(model, data, split_seed, layout, mean, std)
    with search_progress(as_json) as progress:
        outcome = run_study(
            loaded,
            split,
            settings,
            study_path(study, studies),
            targets=artifact or (),
            progress=progress,
            curvature=None if curvature is None else Curvature.load(curvature),
            latency_model=None if cost_model is None else LatencyModel.load(cost_model),
        )
    _print(outcome, as_json)


def demo(
    study: Annotated[
        str, typer.Option(help="Name or directory of the study; the same again resumes it.")
    ] = "demo",
    episodes: Annotated[int, typer.Option(help="Policies to try.")] = 16,
    budget: Annotated[float, typer.Option(help="Latency to reach, as a share of the dense model's.")] = 0.57,
    seed: SeedOption = 0,
    threads: ThreadsOption = DEFAULTS.threads,
    studies: StudiesOption = Path("runs"),
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Compress the embedded sample for this machine and build it for the Raspberry Pi 4 too."""
    # Predicted latencies make room for more policies within a few minutes; the winner is measured. One winner
    # that is trained for long loses less than the better of two that share the time.
    settings = SearchSettings(
        budget=budget,
        episodes=episodes,
        seed=seed,
        threads=threads,
        latency="hybrid",
        finetune_epochs=18,
        finetune_lr=0.06,
        augment="mirror",
        refine=1,
    )
    # The sample's tensors are so small that a second thread gains next to nothing, while waiting for a core
    # that something else keeps busy costs a multiple.
    torch.set_num_threads(1)
    loaded, split = model_and_data(DEMO_MODEL, None, 0)
    with search_progress(as_json) as progress:
        outcome = run_study(
            loaded,
            split,
            settings,
            study_path(study, studies),
            targets=(RPI4,),
            title="ResNet-8 on Fashion-MNIST, compressed",
            progress=progress,
        )
    _print(outcome, as_json)


def _print(outcome: Outcome, as_json: bool) -> None:
    if as_json:
        print_json(outcome.summary)
        return
    print_table(
        outcome.report_data.title,
        ("quantity", "dense", "compressed", "ratio"),
        table_rows(outcome.report_data.dense, outcome.report_data.best),
    )
    print_lines(
        [
            f"{name}: predicts as the twin on {100 * share:.2f} % of the test images that it ran"
            for name, share in outcome.report_data.agreement.items()
        ]
    )
    paths = outcome.summary["paths"]
    print_lines(
        [
            f"policy:   {paths['policy']}",
            *(f"artifact: {path}/" for path in paths["artifacts"].values()),
            f"report:   {paths['report']}",
        ]
    )
