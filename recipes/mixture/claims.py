"""Claims about alignment methods, tried on points of a mixture where reward, density and KL are exact.

Command:  python recipes/mixture/claims.py 4 9 10 --out runs/claims --workers 2
          (no numbers: all of them)

Every claim writes `claim_N.json` (settings, every measurement, verdict, why) and `claim_N.png`. Results are in
recipes/mixture/README.md.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from recipes.mixture.finding import Finding

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file: the folder above `recipes` is not on the path

CLAIMS = {
    4: "claims_gradient",
    5: "claims_gradient",
    6: "claims_windows",
    9: "claims_matching",
    10: "claims_matching",
    11: "claims_matching",
    13: "claims_guidance",
    14: "claims_guidance",
    15: "claims_particles",
    20: "claims_critic",
    21: "claims_gradient",
    30: "claims_regions",
}
"""Number of a claim -> the file of this folder that tries it."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", type=int, choices=sorted(CLAIMS), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, each on one thread")
    options = parser.parse_args()
    for number in options.claims or sorted(CLAIMS):
        module = importlib.import_module(f"recipes.mixture.{CLAIMS[number]}")
        write(partial(vars(module)[f"claim_{number}"], options.workers), options.out)


def write(claim: Callable[[], Finding], out: Path) -> None:
    """Try one claim, keep numbers and figure, say the verdict."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    began = time.monotonic()
    finding = claim()
    seconds = {"wall_seconds": time.monotonic() - began, "processor_seconds": processor_seconds()}
    out.mkdir(parents=True, exist_ok=True)
    record = json.dumps({**finding.to_json(), **seconds}, indent=1, default=str)
    (out / f"claim_{finding.claim}.json").write_text(record, encoding="utf-8")
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    finding.draw(axes)
    axes.set_title(f"{finding.claim}: {finding.statement}\n{finding.verdict}", fontsize=9)
    figure.savefig(out / f"claim_{finding.claim}.png", dpi=110)
    pyplot.close(figure)
    print(f"claim {finding.claim} {finding.verdict}: {finding.why}", flush=True)


def processor_seconds() -> float:
    """Of this process and of those it started, since the program began."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


if __name__ == "__main__":
    main()
