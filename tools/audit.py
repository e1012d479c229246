"""Whether a pinned dependency has a published vulnerability: pip-audit over constraints.txt, by the database of OSV.

    python tools/audit.py [--service URL]

Exit status: 0 none has; 1 some have, a line each; 2 the service cannot be asked from this machine.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
SERVICE = "https://api.osv.dev/v1/query"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Look for published vulnerabilities of the pinned dependencies."
    )
    parser.add_argument("--service", default=SERVICE, help="address of OSV's API (default %(default)s)")
    parser.add_argument(
        "--constraints",
        type=Path,
        default=CONSTRAINTS,
        help="file of pinned versions (default constraints.txt)",
    )
    args = parser.parse_args(argv)
    if not args.constraints.is_file():
        parser.error(f"--constraints {args.constraints} is no file")
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", "--requirement", args.constraints, "--no-deps", "--disable-pip",
             "--vulnerability-service", "osv", "--osv-url", args.service, "--progress-spinner", "off",
             "--cache-dir", folder, "--format", "json", "--output", report],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        if not report.is_file():
            why = (done.stderr.strip() or "pip-audit said nothing").splitlines()[-1]
            print(f"not audited: {args.service} did not answer ({why[:300]})")
            return 2
        packages = json.loads(report.read_text())["dependencies"]
    found = 0
    for package in packages:
        for one in package.get("vulns", ()):
            found += 1
            mended = ", ".join(one["fix_versions"]) or "no version"
            print(f"{package['name']} {package['version']}: {one['id']}, mended in {mended}")
    print(f"{len(packages)} pinned packages, {found} known vulnerabilities")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
