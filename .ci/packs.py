#!/usr/bin/env python3
"""Run a pack's check.py and compare its failures with those that are known.  Standard library only.

    packs.py PACK CHECK.PY --bin DIR [--update]

`.ci/known-failures.json` lists, for each pack, the cases that the programs do not pass yet. A failure that it does not list
fails the step, so nothing that passed may stop passing. A listed case that passes is printed, and `--update` takes it out.
Exit status: 0 no new failure; 1 a new failure, or a check.py that did not report.
"""
import argparse
import json
import pathlib
import subprocess
import sys
import tempfile

KNOWN = pathlib.Path(__file__).with_name("known-failures.json")


def failures(report):
    """The names of the cases that failed: the packs report them in two forms."""
    if "failed" in report:
        return set(report["failed"])
    return {name for name, case in report.items() if not case["ok"]}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("pack")
    p.add_argument("check")
    p.add_argument("--bin", required=True)
    p.add_argument("--update", action="store_true", help="write the failures of this run as the known ones")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        command = [sys.executable, args.check, "--bin", args.bin, "--json", str(report)]
        said = subprocess.run(command, capture_output=True, text=True)
        if not report.exists():
            print(said.stdout[-2000:], said.stderr[-2000:], sep="\n")
            print(f"{args.check} wrote no report (exit status {said.returncode})")
            return 1
        failed = failures(json.loads(report.read_text()))
    print(said.stdout.strip().splitlines()[-1] if said.stdout.strip() else "")
    known = json.loads(KNOWN.read_text()) if KNOWN.exists() else {}
    expected = set(known.get(args.pack, []))
    for name in sorted(expected - failed):
        print(f"passes now: {name} (packs.py --update takes it out of known-failures.json)")
    for name in sorted(failed - expected):
        lines = [line for line in said.stdout.splitlines() if name in line]
        print(f"new failure: {lines[0] if lines else name}")
    if args.update:
        known[args.pack] = sorted(failed)
        KNOWN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
        return 0
    print(f"{len(failed)} fail, {len(expected)} were known to")
    return 1 if failed - expected else 0


if __name__ == "__main__":
    sys.exit(main())
