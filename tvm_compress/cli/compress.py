"""`tvm-compress compress` and `compile`: apply a policy; build an artifact."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_compress.cli.load import epoch_lines, model_and_data
from tvm_compress.cli.options import (
    DataOption,
    DebugOption,
    JsonOption,
    LayoutOption,
    MeanOption,
    ModelArgument,
    SeedOption,
    SplitSeedOption,
    StdOption,
    TargetOption,
)
from tvm_compress.cli.output import print_json, print_lines
from tvm_compress.compression import compile_model, compress_model, model_policy, twin_logits, uniform_policy
from tvm_compress.data.dataset import Split
from tvm_compress.errors import SettingError
from tvm_compress.metrics.cost import metrics
from tvm_compress.model import Model, load_model
from tvm_compress.passes.policy import CompressionPolicy

# What may decide how a model is compressed; "policy" is a given or a uniform one.
METHODS = ("policy",)


def compress(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory of the compressed Model.")],
    method: Annotated[
        str, typer.Option(help="What decides: " + ", ".join(METHODS) + ". Each has its own options below.")
    ] = "policy",
    policy: Annotated[
        Path | None,
        typer.Option(help="policy.json; without it every site is treated alike by the options below."),
    ] = None,
    data: DataOption = None,
    layout: LayoutOption = None,
    mean: MeanOption = None,
    std: StdOption = None,
    split_seed: SplitSeedOption = 0,
    pruning_ratio: Annotated[
        float, typer.Option(help="Share of the channels to remove, without --policy.")
    ] = 0.0,
    weight_bits: Annotated[int, typer.Option(help="32, 8, or 1 to 6, without --policy.")] = 32,
    activation_bits: Annotated[int, typer.Option(help="32, 8, or 1 to 6, without --policy.")] = 32,
    rounding: Annotated[
        int, typer.Option(help="Kept channels are rounded up to a multiple: 1, 8 or 32.")
    ] = 8,
    criterion: Annotated[
        str, typer.Option(help="tolerance, l1 or l2: which channels go first.")
    ] = "tolerance",
    target: TargetOption = "host",
    finetune_epochs: Annotated[int, typer.Option(help="Epochs of fine-tuning afterwards.")] = 0,
    learning_rate: Annotated[float, typer.Option(help="Learning rate of the fine-tuning.")] = 0.01,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Apply a compression policy to a model without searching."""
    if method not in METHODS:
        raise SettingError(f"--method {method!r} is unknown.", f"Known are: {', '.join(METHODS)}.")
    dense, split = model_and_data(model, data, split_seed, layout, mean, std)
    chosen = (
        CompressionPolicy.load(policy)
        if policy
        else uniform_policy(
            dense,
            target=target,
            pruning_ratio=pruning_ratio,
            weight_bits=weight_bits,
            activation_bits=activation_bits,
            rounding=rounding,
            criterion=criterion,
            seed=seed,
        )
    )
    compressed = compress_model(
        dense,
        chosen,
        split,
        finetune_epochs=finetune_epochs,
        learning_rate=learning_rate,
        seed=seed,
        progress=epoch_lines(as_json, finetune_epochs),
    )
    _finish(compressed, split, output, target, {}, as_json)


def _finish(
    compressed: Model, split: Split, output: Path, target: str, summary: dict[str, Any], as_json: bool
) -> None:
    """Save the model that a method made, and tell what it is worth."""
    compressed.save(output)
    right = twin_logits(compressed, split.validation).argmax(axis=1) == split.validation.y
    result = {
        "model": str(output),
        "validation_accuracy": float(right.mean()),
        "metrics": metrics(compressed.module, model_policy(compressed)),
        **summary,
    }
    if as_json:
        print_json(result)
    else:
        print_lines(
            [
                *(f"{key.replace('_', ' ')}: {value}" for key, value in summary.items()),
                f"compressed model: {output}",
                f"validation accuracy: {100 * right.mean():.2f} % ({len(right)} images, twin)",
                f"next: tvm-compress compile {output} --target {target} -o ARTIFACT",
            ]
        )


def compile_artifact(
    model: ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Artifact directory, or a file that ends in .tar.")
    ],
    target: TargetOption = "host",
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Build a model, dense or compressed, for a target and write an artifact."""
    artifact = compile_model(load_model(model), target, output)
    result = {
        "artifact": str(output),
        "target": artifact.manifest.target,
        "library_bytes": artifact.library.stat().st_size,
        "sha256": artifact.manifest.sha256,
    }
    if as_json:
        print_json(result)
    else:
        print_lines([f"artifact: {output} ({result['library_bytes']:,} bytes of library)"])
