"""Commands that say what there is and what runs here: rewards, doctor, bench."""

from __future__ import annotations

import argparse

from alignkit.cli.printing import no_loading_bars, print_json, print_table

FAILURE = 1


def rewards(args: argparse.Namespace) -> int:
    from alignkit.evaluation import doctor as examined

    found = examined.rewards()
    if args.json:
        return print_json(found)
    rows = [
        [
            r["name"],
            r["family"],
            r["kind"],
            {True: "yes", False: "no"}.get(r["differentiable"], r["differentiable"]),
            r["range"],
            r["status"],
            r["summary"],
        ]
        for r in found
    ]
    print_table("", ["reward", "family", "scores", "differentiable", "range", "status", "a high score means"], rows)
    return 0


def doctor(args: argparse.Namespace) -> int:
    from alignkit.evaluation.doctor import examine

    record = examine()
    if args.json:
        return print_json(record)
    print_table("versions", (), [[name, found or "not installed"] for name, found in record["versions"].items()])
    for device in record["devices"] or ():
        print(f"device {device['device']}: {device['name']}")
    if record["attention"] is not None:
        rows = [
            [one["backend"], _yes(one["forward"]), _yes(one["backward"]), ", ".join(one["kernels"]) or one["note"]]
            for one in record["attention"]
        ]
        title = f"attention on {record['attention'][0]['device']}"
        print_table(title, ["backend", "forward", "backward", "kernel that ran, or why not"], rows)
    if record["rewards"] is not None:
        print_table("rewards", ["reward", "status"], [[r["name"], r["status"]] for r in record["rewards"]])
    print(f"tesseract: {record['tesseract'] or 'not installed'}")
    if record["threads"] is not None:
        print(f"threads: {record['threads']['torch_threads']} on {record['threads']['cpus']} CPUs")
    for problem in record["problems"]:
        print(f"! {problem}")
    return FAILURE if record["attention"] is None else 0


def _yes(ran: bool) -> str:
    return "runs" if ran else "-"


def bench(args: argparse.Namespace) -> int:
    from alignkit.training import benchmark, benchmark_guidance, benchmark_methods, benchmark_video

    no_loading_bars()
    record = benchmark.bench()
    if args.json:
        return print_json(record)
    print_table("alignkit bench", (), list(benchmark.lines(record)))
    print_table("one update of each method", benchmark_methods.COLUMNS, list(benchmark_methods.rows(record["methods"])))
    guided = list(benchmark_guidance.rows(record["guidance"]))
    print_table("a guided image beside an unguided one", benchmark_guidance.COLUMNS, guided)
    decoding = list(benchmark_video.rows(record["video"]))
    print_table("memory of decoding video", benchmark_video.COLUMNS, decoding)
    return 0
