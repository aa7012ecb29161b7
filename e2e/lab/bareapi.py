"""A bare API server: etcd, kube-apiserver and (optionally) the controller manager on loopback, without kubelet or scheduler.

For tests of what talks to Kubernetes and needs no running pod. Imports the standard library and the lab's own modules.
"""

import json
import secrets
import shutil
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from e2e.lab.errors import LabError
from e2e.lab.waiting import wait_until

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
REQUEST_TIMEOUT_S = 30.0
LOG_TAIL_CHARS = 2000

AUDIT_LOG = "audit.log"
AUDIT_POLICY = {
    "apiVersion": "audit.k8s.io/v1",
    "kind": "Policy",
    "omitStages": ["RequestReceived", "ResponseStarted"],
    "rules": [{"level": "Metadata", "userGroups": ["system:serviceaccounts"]}, {"level": "None"}],
}

CONTROLLER_FLAGS = (
    "--kube-api-qps=500",  # at the default 20 the default service account of a new namespace takes 10 s
    "--kube-api-burst=1000",
    "--leader-elect=false",
    "--use-service-account-credentials=false",
    "--concurrent-gc-syncs=5",
)


@dataclass(frozen=True, kw_only=True)
class BareApiServer:
    """A running API server and the credentials of its administrator (group system:masters)."""

    url: str
    token: str
    ca_path: Path
    kubeconfig: Path
    directory: Path
    """Logs of the processes and their data; goes away with the test session's temporary folder."""

    def audit(self) -> Iterator[dict[str, Any]]:
        """Every request of a service account that was answered, oldest first, as the API server's audit log has it."""
        with (self.directory / AUDIT_LOG).open() as lines:
            yield from (json.loads(line) for line in lines if line.endswith("\n"))

    def request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """One call as the administrator; the answer's JSON. Raises urllib.error.HTTPError for a status of 400 or more."""
        return json.loads(self._send(method, path, body))

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        context = ssl.create_default_context(cafile=str(self.ca_path))
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S, context=context) as answer:
            return answer.read()

    def service_account_token(self, namespace: str, name: str) -> str:
        """A fresh token of a service account, for tests of what a Role allows."""
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        answer = self.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token", body)
        return answer["status"]["token"]

    def is_ready(self) -> bool:
        """Whether /readyz answers 200; False while it does not answer at all."""
        try:
            self._send("GET", "/readyz", None)
        except (FileNotFoundError, ssl.SSLError, urllib.error.URLError, ConnectionError):
            return False  # FileNotFoundError: the server has not written its certificate yet
        return True

    def write_kubeconfig(self, path: Path, token: str) -> Path:
        """Write a kubeconfig for `token` (another identity than the administrator's) to `path`."""
        path.write_text(json.dumps(_kubeconfig(self.url, token, self.ca_path)))
        path.chmod(0o600)
        return path


def _kubeconfig(url: str, token: str, ca_path: Path) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "bare",
        "clusters": [{"name": "bare", "cluster": {"server": url, "certificate-authority": str(ca_path)}}],
        "users": [{"name": "bare", "user": {"token": token}}],
        "contexts": [{"name": "bare", "context": {"cluster": "bare", "user": "bare"}}],
    }


@contextmanager
def _process(name: str, argv: Sequence[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server with its output in `directory`/`name`.log; ended by its own pid on the way out.

    Where setpriv is there it also ends with this process, however that dies: a killed test run leaves no API server.
    """
    guard = ["setpriv", "--pdeathsig", "TERM", "--"] if shutil.which("setpriv") else []
    with (directory / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [*guard, *argv], stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd=directory
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_ports(count: int) -> list[int]:
    """Distinct free loopback ports; all are held until the last is known, so that none is named twice."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _tail(directory: Path, name: str) -> str:
    path = directory / f"{name}.log"
    text = path.read_text(errors="replace") if path.exists() else ""
    return text[-LOG_TAIL_CHARS:].replace("\n", " | ")


def _etcd_argv(kube: Path, directory: Path, client_port: int, peer_port: int) -> list[str]:
    client, peer = f"http://127.0.0.1:{client_port}", f"http://127.0.0.1:{peer_port}"
    return [
        str(kube), "etcd", "--name=bare", f"--data-dir={directory / 'etcd'}", "--unsafe-no-fsync", "--log-level=warn",
        f"--listen-client-urls={client}", f"--advertise-client-urls={client}", f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}", f"--initial-cluster=bare={peer}",
    ]  # fmt: skip


def _apiserver_argv(kube: Path, directory: Path, port: int, etcd_port: int) -> list[str]:
    return [
        str(kube), "kube-apiserver", f"--secure-port={port}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
        f"--etcd-servers=http://127.0.0.1:{etcd_port}", f"--cert-dir={directory}", "--authorization-mode=RBAC",
        f"--token-auth-file={directory / 'tokens.csv'}", "--service-cluster-ip-range=10.96.0.0/16",
        "--service-account-issuer=https://kubernetes.default.svc", f"--service-account-key-file={directory / 'sa.pub'}",
        f"--service-account-signing-key-file={directory / 'sa.key'}", "--allow-privileged=true",
        # The servers' own endpoints object would race the shutdown of the session.
        "--endpoint-reconciler-type=none", "--enable-priority-and-fairness=false", "--max-requests-inflight=0",
        "--shutdown-delay-duration=0s",
        f"--audit-policy-file={directory / 'audit-policy.json'}", f"--audit-log-path={directory / AUDIT_LOG}",
    ]  # fmt: skip


def _controller_argv(kube: Path, directory: Path, port: int, flags: Sequence[str]) -> list[str]:
    return [
        str(kube), "kube-controller-manager", f"--kubeconfig={directory / 'kubeconfig'}", "--bind-address=127.0.0.1",
        f"--secure-port={port}", f"--cert-dir={directory}", f"--service-account-private-key-file={directory / 'sa.key'}",
        f"--root-ca-file={directory / 'apiserver.crt'}", *CONTROLLER_FLAGS, *flags,
    ]  # fmt: skip


def _write_files(directory: Path, token: str) -> None:
    key, public = str(directory / "sa.key"), str(directory / "sa.pub")
    try:
        subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
        subprocess.run(["openssl", "rsa", "-in", key, "-pubout", "-out", public], check=True, capture_output=True)
    except FileNotFoundError:
        raise LabError(
            "openssl is not on PATH", cure="install openssl; the API server signs tokens with its key"
        ) from None
    tokens = directory / "tokens.csv"
    tokens.write_text(f'{token},admin,admin,"system:masters"\n')
    tokens.chmod(0o600)
    (directory / "audit-policy.json").write_text(json.dumps(AUDIT_POLICY))


@contextmanager
def run_bare_api_server(
    kube: Path, directory: Path, *, controllers: bool = True, controller_flags: Sequence[str] = ()
) -> Iterator[BareApiServer]:
    """Run the servers of the multi-call binary `kube` in an empty `directory` until the block ends.

    `controllers=False` leaves the controller manager out: no Job makes pods, nothing is garbage-collected, and a namespace
    has no default service account. `controller_flags` are added to the controller manager's. Ready when it answers /readyz
    and (with controllers) namespace `default` has its service account. Raises LabError with the log's end after 60 s.
    """
    token = secrets.token_hex(16)
    _write_files(directory, token)
    etcd_port, peer_port, port, controller_port = _free_ports(4)
    server = BareApiServer(
        url=f"https://127.0.0.1:{port}", token=token, ca_path=directory / "apiserver.crt",
        kubeconfig=directory / "kubeconfig", directory=directory,
    )  # fmt: skip
    server.write_kubeconfig(server.kubeconfig, token)
    with ExitStack() as stack:
        stack.enter_context(_process("etcd", _etcd_argv(kube, directory, etcd_port, peer_port), directory))
        argv = _apiserver_argv(kube, directory, port, etcd_port)
        api = stack.enter_context(_process("kube-apiserver", argv, directory))
        _wait_for(server.is_ready, api, "kube-apiserver", directory)
        if controllers:
            argv = _controller_argv(kube, directory, controller_port, controller_flags)
            manager = stack.enter_context(_process("kube-controller-manager", argv, directory))
            _wait_for(lambda: _has_service_account(server), manager, "kube-controller-manager", directory)
        yield server


def _has_service_account(server: BareApiServer) -> bool:
    """Whether the controllers did their first work."""
    try:
        server.request("GET", "/api/v1/namespaces/default/serviceaccounts/default")
    except urllib.error.HTTPError as error:
        if error.code != HTTPStatus.NOT_FOUND:
            raise
        return False
    return True


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str, directory: Path) -> None:
    """Wait until `ready` holds; raises LabError at once when the process ends, with the end of its log."""
    cure = f"read {directory / name}.log"

    def ask() -> bool:
        if process.poll() is not None:
            raise LabError(f"{name} ended with {process.returncode}: {_tail(directory, name)}", cure=cure)
        return ready()

    wait_until(f"{name} is ready", ask, bool, timeout_s=START_TIMEOUT_S, cure=cure)
