"""`python -m e2e.lab`: the lab's command line. Errors are one line on standard error and status 1."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from e2e.lab.errors import LabError
from e2e.lab.lab import Lab
from e2e.lab.paths import lab_paths


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    """The command and its options."""
    parser = argparse.ArgumentParser(
        prog="python -m e2e.lab", description="A Kubernetes cluster with WeightSync's images."
    )
    parser.add_argument("--provider", choices=("kind", "existing"), default="kind")
    parser.add_argument("--kubeconfig", type=Path, help="for the provider existing; default $KUBECONFIG")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("up", help="packages, tools, Docker, images, cluster, devices; repeat it freely")
    commands.add_parser("down", help="delete the cluster and stop what the lab started; the cache stays")
    commands.add_parser("status", help="what is there")
    commands.add_parser("clean", help="after down: remove the cache folder and .lab/")
    for name, text in (
        ("build", "build tools and images"),
        ("load", "rebuild changed images and put them on the node"),
    ):
        commands.add_parser(name, help=text).add_argument("names", nargs="*", help="default: all")
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    lab = Lab(lab_paths(), Console(), arguments.provider, arguments.kubeconfig)
    try:
        if arguments.command in ("build", "load"):
            getattr(lab, arguments.command)(arguments.names)
        else:
            getattr(lab, arguments.command)()
    except LabError as error:
        print(f"lab {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lab {arguments.command}: interrupted; next: run it again, it goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
