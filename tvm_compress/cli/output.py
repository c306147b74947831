"""What the commands print: tables for people, one JSON object for machines, progress on a terminal."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tvm_compress.search.results import Progress as ProgressCallback
from tvm_compress.search.results import ProgressEvent

STAGES = {
    "dense": "dense model",
    "tolerance": "tolerances",
    "sensitivity": "sensitivity",
    "episode": "search",
    "refine": "fine-tuning",
    "build": "build and verify",
}


def print_json(value: Any) -> None:
    """Print one JSON object on standard output."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False) + "\n")


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_lines(lines: Sequence[str]) -> None:
    """Print plain lines on standard output, unwrapped, so that paths can be copied."""
    sys.stdout.write("\n".join(lines) + "\n")


def describe_memory(memory: Mapping[str, int]) -> str:
    """Tell the memory that a manifest states, in words."""
    if not memory:
        return "not stated; compile the artifact again"
    parts = ("constant_bytes", "activation_bytes", "workspace_bytes")
    constants, activations, workspace = (f"{memory[part]:,}" for part in parts)
    return (
        f"{memory['peak_bytes']:,} bytes: constants {constants}, activations {activations}, "
        f"largest workspace of a kernel {workspace}"
    )


@contextmanager
def search_progress(quiet: bool) -> Iterator[ProgressCallback]:
    """Give a callback that draws the progress of a search on a terminal; nothing where nobody looks."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda event: None
        return
    with Progress(
        TextColumn("{task.description:<18}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
    ) as bars:
        tasks: dict[str, TaskID] = {}

        def show(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                for earlier in tasks.values():
                    bars.stop_task(earlier)
                tasks[event.stage] = bars.add_task(
                    STAGES.get(event.stage, event.stage), total=event.total, text=""
                )
            bars.update(tasks[event.stage], completed=event.done, total=event.total, text=_text(event))

        yield show


def _text(event: ProgressEvent) -> str:
    if event.trial is None:
        return event.text
    result = event.trial.result
    text = (
        f"reward {event.trial.reward:+.3f}  accuracy {100 * result.accuracy:.1f} %  "
        f"latency {result.ratio:.2f} of dense ({result.latency_kind})"
    )
    return text if event.best is None else f"{text}  best {event.best.reward:+.3f}"
