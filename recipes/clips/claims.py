"""Claims about reward fine-tuning of video, tried on clips of which everything is known.

Command:  python recipes/clips/claims.py 26 27 --out runs/claims

Every claim writes `claim_N.json` (settings, every measurement, verdict, why) and `claim_N.png`. Results are in
recipes/clips/README.md.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))  # run as a file: the folder above `recipes` is not on the path

from recipes.clips.policy import ClipPolicy
from recipes.clips.train import SHAPE, measured, recipe, train
from recipes.mixture.claims import write
from recipes.mixture.finding import Finding, Verdict, at_level, column, mean_error, shown, together

SEEDS = (0, 1, 2)
ROUNDS = 80
MARKS = (5, 10, 20, 30, 40, 60, 80)
ARMS = ("dense", "sparse", "attenuated", "both")
STARTS = (0.3, 0.6, 1.0)
LEVELS = (-0.6, -0.5, -0.4)
"""Rewards per frame at which arms are compared; the base has about -2.7 and the wanted picture 0."""


def run(arm: str, start: float, seed: int) -> list[dict[str, Any]]:
    """One training run, measured after some rounds."""
    policy, rows = ClipPolicy(seed=seed), list[dict[str, Any]]()
    spent = 0

    def watch(done: int) -> None:
        nonlocal spent
        spent += policy.calls  # of training alone
        if done in MARKS:
            row = {"arm": arm, "start": start, "seed": seed, "round": done, "calls": spent}
            rows.append({**row, **measured(policy, SHAPE["num_steps"])})
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        policy.calls = 0

    train(recipe(arm, start=start, steps=ROUNDS, seed=seed), policy, watch)
    return rows


def at_reward(rows: list[dict[str, Any]], name: str, level: float, **where: Any) -> list[float]:
    """A number of each seed's run where its reward passes `level`, of the seeds that reach it."""
    found: list[float | None] = []
    for seed in SEEDS:
        own = sorted((r for r in rows if r["seed"] == seed and all(r[k] == v for k, v in where.items())), key=_round)
        reached = next((i for i, row in enumerate(own) if row["reward"] >= level), None)
        if reached:  # not at the first mark: nothing is known before
            pair = own[reached - 1], own[reached]
            found.append(at_level([(row["reward"], float(row[name])) for row in pair], level))
    return [value for value in found if value is not None]


def _round(row: dict[str, Any]) -> int:
    return row["round"]


def told(rows: list[dict[str, Any]], name: str, level: float, **where: Any) -> str:
    """`mean +- error` at a reward, or that it was not reached by every seed."""
    found = at_reward(rows, name, level, **where)
    return shown(found) if len(found) == len(SEEDS) else f"reached by {len(found)} of {len(SEEDS)}"


def ahead(rows: list[dict[str, Any]], name: str, level: float, one: dict[str, Any], other: dict[str, Any]) -> int:
    """1 if `one` has more than `other` at a reward by two standard errors over seeds, -1 if less, else 0; 0 too where
    a seed does not reach the reward."""
    both = [at_reward(rows, name, level, **arm) for arm in (one, other)]
    if any(len(found) < len(SEEDS) for found in both):
        return 0
    gap, error = mean_error([a - b for a, b in zip(*both, strict=True)])
    return 0 if abs(gap) <= 2 * error else 1 if gap > 0 else -1


def claim_26(workers: int = 1) -> Finding:
    """Dense against sparse and attenuated frame rewards, at equal reward."""
    rows = together([partial(run, arm, 0.6, seed) for arm in ARMS for seed in SEEDS], workers)
    return kept_motion(rows)


def kept_motion(rows: list[dict[str, Any]]) -> Finding:
    """The verdict on claim 26: `both` must keep more motion than `dense` at most of the rewards that all reach."""
    compared = [level for level in LEVELS if all(len(at_reward(rows, "motion", level, arm=a)) == 3 for a in ARMS)]
    wins = [level for level in compared if ahead(rows, "motion", level, {"arm": "both"}, {"arm": "dense"}) > 0]
    verdict: Verdict = "undecided" if not compared else "holds" if len(wins) > len(compared) / 2 else "fails"
    why = "; ".join(
        f"at reward {level:g}: "
        + ", ".join(
            f"{arm} {told(rows, 'motion', level, arm=arm)} ({told(rows, 'lag_one', level, arm=arm)})" for arm in ARMS
        )
        for level in LEVELS
    )
    last = "; ".join(
        f"{arm} reward {shown(column(rows, 'reward', arm=arm, round=ROUNDS))}, motion "
        f"{shown(column(rows, 'motion', arm=arm, round=ROUNDS))}, lag-1 "
        f"{shown(column(rows, 'lag_one', arm=arm, round=ROUNDS))}"
        for arm in ARMS
    )

    def draw(axes: Any) -> None:
        for arm in ARMS:
            axes.plot(column(rows, "reward", arm=arm), column(rows, "motion", arm=arm), "o", label=arm)
        axes.set(xlabel="reward per frame", ylabel="motion, 1 = base")
        axes.legend()

    return Finding(
        26,
        "a dense frame reward destroys motion; sparse and attenuated, it is kept",
        "at equal reward the dense one keeps as much motion",
        {"rounds": ROUNDS, **SHAPE, "start": 0.6, "seeds": SEEDS},
        rows,
        verdict,
        f"motion (lag-1 correlation) {why}. After {ROUNDS} rounds: {last}",
        draw,
    )


def claim_27(workers: int = 1) -> Finding:
    """Partial starts against a full one: reward per denoiser call, and what happens to other prompts."""
    return learnt_faster(together([partial(run, "both", start, seed) for start in STARTS for seed in SEEDS], workers))


def learnt_faster(rows: list[dict[str, Any]]) -> Finding:
    """The verdict on claim 27: 0.6 must need fewer calls than 1, and move other prompts less, at equal reward."""
    part, full = {"start": 0.6}, {"start": 1.0}
    known = [level for level in LEVELS if all(len(at_reward(rows, "calls", level, **arm)) == 3 for arm in (part, full))]
    cheaper = [level for level in known if ahead(rows, "calls", level, part, full) < 0]
    milder = [level for level in known if ahead(rows, "forgotten", level, part, full) < 0]
    most = len(known) / 2
    verdict: Verdict = "undecided" if not known else "holds" if min(len(cheaper), len(milder)) > most else "fails"
    why = "; ".join(
        f"at reward {level:g}: "
        + ", ".join(
            f"start {start:g} {told(rows, 'calls', level, start=start)} calls, others moved "
            f"{told(rows, 'forgotten', level, start=start)}, motion {told(rows, 'motion', level, start=start)}"
            for start in STARTS
        )
        for level in LEVELS
    )

    def draw(axes: Any) -> None:
        for start in STARTS:
            axes.plot(column(rows, "calls", start=start), column(rows, "reward", start=start), "o", label=f"{start:g}")
        axes.set(xlabel="denoiser calls of training, clips", ylabel="reward per frame", xscale="log")
        axes.legend(title="start")

    return Finding(
        27,
        "a partial start is cheaper at equal reward and forgets less",
        "the full start needs as few calls, or moves other prompts as little, at equal reward",
        {"rounds": ROUNDS, **SHAPE, "reward": "both", "starts": STARTS, "seeds": SEEDS},
        rows,
        verdict,
        f"cheaper at {len(cheaper)} and milder at {len(milder)} of {len(known)} rewards. {why}",
        draw,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", type=int, choices=(26, 27), metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    parser.add_argument("--workers", type=int, default=1, help="runs at the same time, each on one thread")
    options = parser.parse_args()
    for number in options.claims or (26, 27):
        write(partial({26: claim_26, 27: claim_27}[number], options.workers), options.out)


if __name__ == "__main__":
    main()
