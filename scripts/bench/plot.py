"""Brings what the documents quote into them: tables from docs/figures/*.json, pictures from a study.

usage: python scripts/bench/plot.py [STUDY]   (a study's pictures are copied to docs/figures/demo-*.png)
"""

import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "docs" / "figures"
PICTURES = ("accuracy_latency", "policy", "rewards", "sensitivity")


def table(name: str) -> str:
    """Markdown table of a benchmark's figures, with the machine and how to take them again."""
    result = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = ["| figure | measured | goal | met |", "| --- | --- | --- | --- |"]
    for figure in result["figures"]:
        note = f" ({figure['note']})" if figure["note"] else ""
        lines.append(
            f"| {figure['id']}{note} | {figure['value']:.4g} {figure['unit']} | "
            f"{figure['comparison']} {figure['goal']:g} | {'yes' if figure['met'] else 'no'} |"
        )
    machine = result["machine"]
    command = f"python scripts/bench/{name}.py --seeds {result['settings']['seeds']}"
    where = f"{machine['processor']} ({machine['cores']} cores, shared with other work), one thread"
    raw = f"[docs/figures/{name}.json](docs/figures/{name}.json)"
    lines += [
        "",
        f"Measured by `{command}` on {where}; {versions}. The worst of the seeds counts; "
        f"the raw values stand in {raw}.",
    ]
    return "\n".join(lines)


def main() -> None:
    """Fill the README's marked places and copy pictures."""
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    for name in re.findall(r"<!-- figures:(\w+) -->", text):
        pattern = rf"<!-- figures:{name} -->.*?<!-- end -->"
        filled = f"<!-- figures:{name} -->\n{table(name)}\n<!-- end -->"
        text = re.sub(pattern, lambda _, filled=filled: filled, text, count=1, flags=re.DOTALL)
    readme.write_text(text, encoding="utf-8")
    if len(sys.argv) > 1:
        for name in PICTURES:
            shutil.copy(Path(sys.argv[1]) / "figures" / f"{name}.png", FIGURES / f"demo-{name}.png")


if __name__ == "__main__":
    main()
