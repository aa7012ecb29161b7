"""`python -m e2e.lab`: the lab's command line. Errors are one line on standard error and status 1."""

import argparse
import fcntl
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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


@contextmanager
def only_one(lab: Lab) -> Iterator[None]:
    """Let one command at a time change the lab; says so while it waits for another."""
    lock = lab.paths.cache.with_name(f"{lab.paths.cache.name}.lock")  # beside the cache, which `clean` removes
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lab.console.print("waits for another lab command to end", highlight=False)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    lab = Lab(lab_paths(), Console(), arguments.provider, arguments.kubeconfig)
    run = {
        "up": lab.up,
        "down": lab.down,
        "clean": lab.clean,
        "build": lambda: lab.build(arguments.names),
        "load": lambda: lab.load(arguments.names),
    }
    try:
        if arguments.command == "status":
            lab.status()
        else:
            with only_one(lab):
                run[arguments.command]()
    except LabError as error:
        print(f"lab {arguments.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"lab {arguments.command}: interrupted; next: run it again, it goes on where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
