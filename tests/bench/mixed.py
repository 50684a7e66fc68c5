#!/usr/bin/env python3
"""What mixing costs: runs several workloads one after the other and as one file, in interleaved rounds, so that both see the same
machine, and prints the mixed file's time by the sum of its parts', and each run's tail. Standard library only. Rows must say how
long their answers are (`ignore_eos`, `temperature` 0 or a `seed`): the place of a row in a file makes the seed that it has else.

usage: mixed.py [--valar target/release/valar] [--rounds 5] [--order shuffled|blocks] W1.jsonl W2.jsonl ... [-- OPTIONS OF VALAR BENCH]

Times are the report's `seconds.total`: from the first input byte to the last fsync, without loading the model. The tail is the
share of it in which tokens were computed at under half their median rate. `valar bench plan W1.jsonl W2.jsonl ...` says both in
counted time, the same on any machine.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path


def mix(parts, order, path):
    """All rows in one file, with ids that none of the others has."""
    rows = []
    for i, part in enumerate(parts):
        for line in Path(part).read_text().splitlines():
            if line.strip():
                row = json.loads(line)
                rows.append(json.dumps({**row, "custom_id": f"{i}:{row['custom_id']}"}))
    if order == "shuffled":
        random.Random(7).shuffle(rows)
    Path(path).write_text("\n".join(rows) + "\n")


def bench(valar, workload, options):
    done = subprocess.run([valar, "bench", str(workload), "--json", *options], stdout=subprocess.PIPE)
    if done.returncode != 0:
        sys.exit(f"{workload}: valar bench ended with {done.returncode}")
    return json.loads(done.stdout)


def main():
    own, options = sys.argv[1:], []
    if "--" in own:
        own, options = own[:own.index("--")], own[own.index("--") + 1:]
    parser = argparse.ArgumentParser(usage=__doc__)
    parser.add_argument("parts", nargs="+")
    parser.add_argument("--valar", default="target/release/valar")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--order", choices=["shuffled", "blocks"], default="shuffled")
    args = parser.parse_args(own)
    ratios, tails = [], []
    with tempfile.TemporaryDirectory() as folder:
        mixed = Path(folder) / "mixed.jsonl"
        mix(args.parts, args.order, mixed)
        files = [*args.parts, mixed]
        names = [Path(file).stem for file in files]
        print("round " + "".join(f"{name + ' s':>16}{'tail':>8}" for name in names) + f"{'ratio':>8}")
        for i in range(args.rounds):
            # Now one first, now the other: a machine that slows down does so for both.
            order = files if i % 2 == 0 else files[::-1]
            reports = {file: bench(args.valar, file, options) for file in order}
            work = [[reports[file]["rows"]["completed"], *(reports[file]["tokens"][name] for name in ("prompt", "completion"))]
                    for file in files]
            if [sum(column) for column in zip(*work[:-1])] != work[-1]:
                sys.exit(f"the mixed file's rows and tokens are not those of its parts: {work}")
            seconds = [reports[file]["seconds"]["total"] for file in files]
            tail = [reports[file]["rates"]["tail_share"] for file in files]
            ratios.append(seconds[-1] / sum(seconds[:-1]))
            tails.append(tail)
            cells = "".join(f"{s:>16.2f}{100 * t:>7.1f}%" for s, t in zip(seconds, tail))
            print(f"{i + 1:<6}{cells}{ratios[-1]:>8.3f}", flush=True)
    print(f"mixed / sum of its parts: median {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    medians = [f"{name} {100 * statistics.median(tail):.1f} %" for name, tail in zip(names, zip(*tails))]
    print("tails, medians: " + ", ".join(medians))


if __name__ == "__main__":
    main()
