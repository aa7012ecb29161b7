"""The picture of docs/performance.md: what GPU benches reached, against the roof that the same run measured.

python -m bench.plot_gpu RESULTS/gpu-h200.json RESULTS/gpu2-h200.json --out docs/gpu.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

Bar = tuple[str, float, float]
"""(what, GB/s, the roof's GB/s)"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reports", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    mpl.use("Agg")
    reports = [json.loads(path.read_text()) for path in options.reports]
    figure, axes = plt.subplots(len(reports), 1, figsize=(11, 5.2 * len(reports)), layout="constrained")
    for axis, report in zip(axes if len(reports) > 1 else [axes], reports, strict=True):
        draw(axis, report)
    figure.savefig(options.out, dpi=110)


def draw(axis: Any, report: dict[str, Any]) -> None:
    """One bar a figure, the roof of each as a line at its end."""
    bars = [*kernels(report), *pushes(report)]
    names, reached, roofs = zip(*bars, strict=True)
    places = range(len(bars))
    axis.barh(places, roofs, color="#e4e7ec", label="roof measured in the same run")
    axis.barh(places, reached, height=0.5, color="#2f6fb3", label="reached")
    for place, (_, got, roof) in zip(places, bars, strict=True):
        axis.text(max(got, roof), place, f"  {got:.0f} of {roof:.0f} GB/s: {got / roof:.0%}", va="center", fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, max(roofs) * 1.45)
    axis.set_xlabel("GB/s (conversion: read and written; digests: read; pushes: payload)", fontsize=8)
    axis.set_title(f"{report['about']['device']}, commit {report['about']['commit']}", fontsize=9)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, -0.02))
    axis.spines[["top", "right"]].set_visible(False)


def kernels(report: dict[str, Any]) -> Iterator[Bar]:
    limits = report["limits"]
    for row in report.get("conversion", []):
        if row["what"].startswith(("w13", "w2", "whole")):
            what = row["what"] if "to bfloat16" in row["what"] else f"FP8 of {row['what']}"
            yield f"{what}, {row['source']}", row["gbps"], limits["copy_gbps"]
    for row in report.get("digest", []):
        yield row["what"], row["gbps"], limits["read_gbps"]


def pushes(report: dict[str, Any]) -> Iterator[Bar]:
    limits = report["limits"]
    roof = limits.get("peer_copy_gbps", limits["copy_payload_gbps"])
    for row in report["push"]:
        if row["what"].startswith("wire alone"):
            yield f"push, {row['fleet']}", row["gbps"], roof
        elif "over_the_floor" in row:
            yield (
                f"convert and push (roof: no transport), {row['fleet']}",
                row["gbps"],
                row["gbps"] * row["over_the_floor"],
            )
        elif row["what"] == "staged commit: copy":
            yield f"staged commit's copy, {row['fleet']}", row["gbps"], limits["copy_payload_gbps"]


if __name__ == "__main__":
    main()
