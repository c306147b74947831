"""`tvm-compress report`: the page of a finished study."""

from pathlib import Path
from typing import Annotated

import typer

from tvm_compress.cli.load import study_path
from tvm_compress.cli.options import DebugOption, JsonOption
from tvm_compress.cli.output import print_json, print_lines
from tvm_compress.errors import StudyError
from tvm_compress.report.data import ReportData
from tvm_compress.report.html import write_report
from tvm_compress.workflow import REPORT_DATA


def report(
    study: Annotated[str, typer.Argument(metavar="STUDY", help="Name or directory of a finished study.")],
    studies: Annotated[Path, typer.Option(help="Folder of the studies.")] = Path("runs"),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; else into the study.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write report.html and its pictures again from a study's results."""
    path = study_path(study, studies)
    source = path / REPORT_DATA
    if not source.is_file():
        raise StudyError(
            f"{path} holds no results: it has no {REPORT_DATA}.",
            "Finish the search first: tvm-compress search MODEL --study NAME goes on where it stopped.",
        )
    written = write_report(
        ReportData.from_json(source.read_text(encoding="utf-8")), output or path / "report.html"
    )
    if as_json:
        print_json({"report": str(written)})
    else:
        print_lines([f"report: {written}"])
