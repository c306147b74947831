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


def table(name: str, figures: str = "docs/figures") -> str:
    """Markdown table of a benchmark's figures, with the machine and how to take them again.

    `figures` is the folder of figures as seen from the document.
    """
    result = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = ["| figure | measured | goal | met |", "| --- | --- | --- | --- |"]
    for figure in result["figures"]:
        note = f" ({figure['note']})" if figure["note"] else ""
        lines.append(
            f"| {figure['id']}{note} | {figure['value']:.4g} {figure['unit']} | "
            f"{figure['comparison']} {figure['goal']:g} | {'yes' if figure['met'] else 'no'} |"
        )
    for part in result["data"]:
        if "table" in part:
            head, *body = part["table"]
            rows = [head, ["---"] * len(head), *body]
            lines += ["", *(f"| {' | '.join(row)} |" for row in rows)]
    machine = result["machine"]
    seeds = result["settings"].get("seeds")
    command = f"python scripts/bench/{name}.py" + (f" --seeds {seeds}" if seeds else "")
    where = f"{machine['processor']} ({machine['cores']} cores, shared with other work), "
    where += result["settings"].get("run_by", "one thread")
    raw = f"[docs/figures/{name}.json]({figures}/{name}.json)"
    worst = "The worst of the seeds counts; the" if seeds else "The"
    lines += ["", f"Measured by `{command}` on {where}; {versions}. {worst} raw values stand in {raw}."]
    return "\n".join(lines)


def fill(document: Path) -> None:
    """Fill a document's marked places: `<!-- figures:NAME -->` to `<!-- end -->`."""
    text = document.read_text(encoding="utf-8")
    figures = FIGURES.relative_to(document.parent).as_posix()
    for name in re.findall(r"<!-- figures:(\w+) -->", text):
        if not (FIGURES / f"{name}.json").is_file():
            continue
        pattern = rf"<!-- figures:{name} -->.*?<!-- end -->"
        filled = f"<!-- figures:{name} -->\n{table(name, figures)}\n<!-- end -->"
        text = re.sub(pattern, lambda _, filled=filled: filled, text, count=1, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")


def main() -> None:
    """Fill the marked places of the README and of docs/*.md, and copy pictures."""
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        fill(document)
    if len(sys.argv) > 1:
        for name in PICTURES:
            shutil.copy(Path(sys.argv[1]) / "figures" / f"{name}.png", FIGURES / f"demo-{name}.png")


if __name__ == "__main__":
    main()
