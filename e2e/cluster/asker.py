"""The cluster tests' client: one user after another asks the service for an answer, and asks again until there is one.

Prints a JSON line for each try: when it began and ended (seconds of the machine's clock), the user's number, what came of it (the
HTTP status, the name of the error, or "abort" where the engine ended first), and the weight version that the answer names. Runs in
the runtime image, from a ConfigMap, until its pod is deleted; the standard library alone.
"""

from __future__ import annotations

import errno
import http.client
import itertools
import json
import sys
import time

RETRY_S = 1.0
TIMEOUT_S = 120.0
ASK = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}


def ask(host: str, port: int) -> tuple[str, str]:
    """Status, name of the error or "abort", and the version header of an answer."""
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/v1/completions", json.dumps(ASK), {"Content-Type": "application/json"})
        response = connection.getresponse()
        body = response.read()
        if response.status == 200 and json.loads(body)["choices"][0]["finish_reason"] == "abort":
            return "abort", ""
        return str(response.status), response.headers.get("X-Weight-Version", "")
    except (OSError, http.client.HTTPException) as error:
        return errno.errorcode.get(getattr(error, "errno", None) or 0, type(error).__name__), ""
    finally:
        connection.close()


def main() -> None:
    host, port = sys.argv[1], int(sys.argv[2])
    for user in itertools.count():
        answered = False
        while not answered:
            began = time.time()
            result, version = ask(host, port)
            line = {"user": user, "began": began, "ended": time.time(), "result": result, "version": version}
            print(json.dumps(line), flush=True)
            answered = result == "200"
            if not answered:
                time.sleep(RETRY_S)


if __name__ == "__main__":
    main()
