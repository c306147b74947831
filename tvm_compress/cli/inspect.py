"""`tvm-compress inspect`: what a model, an artifact or a policy is."""

from pathlib import Path
from typing import Annotated, Any

import typer

from tvm_compress.artifact import MANIFEST, Artifact
from tvm_compress.cli.options import DebugOption, JsonOption
from tvm_compress.cli.output import print_json, print_lines, print_table
from tvm_compress.compression import model_summary
from tvm_compress.model import load_model
from tvm_compress.passes.policy import CompressionPolicy


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="MODEL|ARTIFACT|POLICY", help="A model, an artifact, or a policy's JSON.")
    ],
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show the sites, coupled sets and costs of a model, or what an artifact or a policy holds."""
    path = Path(source)
    if path.suffix == ".json":
        policy = CompressionPolicy.load(path)
        print_lines([policy.to_json().rstrip()])
    elif path.suffix == ".tar" or (path / MANIFEST).is_file():
        print_lines([Artifact.load(path).manifest.to_json().rstrip()])
    else:
        summary = model_summary(load_model(source))
        if as_json:
            print_json(summary)
        else:
            _show(source, summary)


def _show(source: str, summary: dict[str, Any]) -> None:
    shape = "x".join(map(str, summary["input"]["shape"]))
    rows = [
        (
            site["name"],
            site["kind"],
            "x".join(map(str, site["weight_shape"])),
            "x".join(map(str, site["out_shape"])),
            f"{site['macs']:,}",
            ", ".join(f"{k} {v}" for k, v in site["policy"].items() if k != "kept") or "-",
        )
        for site in summary["sites"]
    ]
    print_table(
        f"{source}: stage {summary['stage']}, input {shape}",
        ("site", "kind", "weights", "output", "MACs", "policy"),
        rows,
    )
    groups = [
        (
            group["name"],
            str(group["channels"]),
            ", ".join(group["producers"]),
            "yes" if group["prunable"] else f"no: {group['reason']}",
        )
        for group in summary["coupled_sets"]
    ]
    print_table("coupled sets", ("set", "channels", "producers", "prunable"), groups)
    costs = [(name, f"{value:,.0f}") for name, value in summary["metrics"].items() if value is not None]
    print_table("costs of one inference", ("metric", "value"), costs)
