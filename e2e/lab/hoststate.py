"""What a cluster changes in the machine's kernel (settings, packet filter), noted before and put back after.

dockerd forwards packets and adds chains; the kubelet in the node writes settings that no namespace holds. Imports the standard
library alone.
"""

import json
import subprocess
from pathlib import Path

SETTINGS = (
    "net/ipv4/ip_forward",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
)
FILTERS = ("iptables", "ip6tables")
TABLES = ("filter", "nat")
PROC_SYS = Path("/proc/sys")


def save_host_state(path: Path) -> None:
    """Note settings and forward policies in `path`, unless an earlier `up` did so and no `down` came since."""
    if path.exists():
        return
    settings = {name: (PROC_SYS / name).read_text().strip() for name in SETTINGS if (PROC_SYS / name).exists()}
    policies = {program: _forward_policy(program) for program in FILTERS}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "forward_policies": policies}, indent=2) + "\n")


def restore_host_state(path: Path, *, remove_chains: bool) -> None:
    """Put back what `save_host_state` noted and remove the note; `remove_chains` also removes Docker's chains and rules."""
    if not path.exists():
        return
    saved = json.loads(path.read_text())
    for name, value in saved["settings"].items():
        if (PROC_SYS / name).read_text().strip() != value:
            (PROC_SYS / name).write_text(value)
    if remove_chains:
        for program, policy in saved["forward_policies"].items():
            for table in TABLES:
                _remove_docker_rules(program, table)
            if policy is not None:
                _filter(program, "-P", "FORWARD", policy)
    path.unlink()


def docker_rule_removals(listing: str) -> list[list[str]]:
    """The arguments that undo Docker's part of an `iptables -S` listing: rules of other chains first, then its own chains."""
    lines = [line.split() for line in listing.splitlines()]
    own = [words[1] for words in lines if words[:1] == ["-N"] and words[1].startswith("DOCKER")]
    jumps = [words for words in lines if words[:1] == ["-A"] and words[1] not in own]
    removals = [["-D", *words[1:]] for words in jumps if _is_dockers(words, own)]
    return removals + [["-F", chain] for chain in own] + [["-X", chain] for chain in own]


def _is_dockers(words: list[str], own_chains: list[str]) -> bool:
    interfaces = {words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-i", "-o")}
    return bool(set(words) & set(own_chains)) or any(name.startswith(("br-", "weightsync")) for name in interfaces)


def _remove_docker_rules(program: str, table: str) -> None:
    for removal in docker_rule_removals(_filter(program, "-t", table, "-S")):
        _filter(program, "-t", table, *removal)


def _forward_policy(program: str) -> str | None:
    """ACCEPT or DROP; None where the kernel or the machine has no such filter."""
    for line in _filter(program, "-S", "FORWARD").splitlines():
        if line.startswith("-P FORWARD "):
            return line.split()[2]
    return None


def _filter(program: str, *words: str) -> str:
    """Run iptables; empty when it is absent or refuses, since what cannot be listed was not changed by us either."""
    try:
        return subprocess.run([program, *words], check=False, capture_output=True, text=True).stdout
    except FileNotFoundError:
        return ""
