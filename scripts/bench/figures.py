"""What every benchmark writes: figures with their goals, machine and versions; `met` is computed here."""

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tvm_compress.rpc.local import processor_name

ROOT = Path(__file__).resolve().parents[2]
COMPARISONS = {"<=": lambda a, b: a <= b, ">=": lambda a, b: a >= b, "==": lambda a, b: a == b}
PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy", "xgboost-cpu")


@dataclass(frozen=True)
class Figure:
    """One measured figure and what it was meant to reach."""

    id: str
    value: float
    unit: str
    goal: float
    comparison: str
    peer: str = ""
    note: str = ""

    @property
    def met(self) -> bool:
        """Whether the value compares with the goal as wanted."""
        return bool(COMPARISONS[self.comparison](self.value, self.goal))


# Figures of a part of a benchmark, and the values behind them.
Part = tuple[list[Figure], dict[str, Any]]


def machine() -> dict[str, Any]:
    """The machine as a reader of the figures needs it."""
    return {"processor": processor_name(), "cores": os.cpu_count(), "system": platform.platform()}


def commit() -> str:
    """Commit that the figures were taken on, with "+" if files differ from it."""
    root = Path(__file__).resolve().parents[2]

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=False
        ).stdout

    return git("rev-parse", "--short", "HEAD").strip() + (
        "+" if git("status", "--porcelain", "-uno").strip() else ""
    )


def write(
    path: Path, name: str, settings: dict[str, Any], figures: Sequence[Figure], data: Sequence[dict[str, Any]]
) -> None:
    """Write the JSON of a benchmark (docs/architecture.md) and print its table."""
    content = {
        "name": name,
        "commit": commit(),
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in PACKAGES},
        },
        "settings": settings,
        "figures": [asdict(figure) | {"met": figure.met} for figure in figures],
        "data": list(data),
    }
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    for figure in figures:
        verdict = "met" if figure.met else "MISSED"
        goal = f"{figure.comparison} {figure.goal:<8g}"
        print(f"{figure.id:<54} {figure.value:>10.4g} {figure.unit:<8} {goal} {verdict}")


def parts_parser(description: str | None, name: str, parts: Iterable[str]) -> argparse.ArgumentParser:
    """Parser of a benchmark that has several parts."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = list(parts)
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / "figures" / f"{name}.json")
    parser.add_argument("--only", nargs="*", choices=known, default=known)
    return parser


def run_parts(
    arguments: argparse.Namespace,
    name: str,
    settings: dict[str, Any],
    parts: Mapping[str, Callable[[argparse.Namespace], Part]],
) -> None:
    """Run the parts that `arguments` of `parts_parser` ask for.

    Each replaces its own entries in the JSON when it is done; the order there is that of `parts`.
    """
    path: Path = arguments.json
    data: dict[str, dict[str, Any]] = {}
    for part in arguments.only:
        load = os.getloadavg()[0]
        figures, values = parts[part](arguments)
        # Read now: another process may have written other parts meanwhile.
        if path.exists():
            data = {one["part"]: one for one in json.loads(path.read_text(encoding="utf-8"))["data"]}
        data[part] = {
            "part": part, "commit": commit(), "figures": [asdict(figure) for figure in figures],
            "load_before": load, **values,
        }  # fmt: skip
        ordered = [data[known] for known in parts if known in data]
        everything = [Figure(**figure) for one in ordered for figure in one["figures"]]
        write(path, name, settings, everything, ordered)
