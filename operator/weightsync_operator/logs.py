"""Log lines for people or for programs; both can tell which resource a line is about. Standard library only."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

resource: ContextVar[tuple[str, str] | None] = ContextVar("resource", default=None)
"""(namespace, name) of the WeightSync that this task works on."""

TEXT, JSON = "text", "json"
FORMATS = (TEXT, JSON)
_TEXT_LINE = "%(asctime)s %(levelname)s %(name)s %(message)s"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message; namespace and name of a resource; exception."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        about = _about(record)
        if about is not None:
            line["namespace"], line["name"] = about
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def _about(record: logging.LogRecord) -> tuple[str, str] | None:
    """Of this task, else as Kopf notes it on its own records."""
    kopfs = getattr(record, "k8s_ref", None)
    if resource.get() is None and kopfs:
        return kopfs.get("namespace") or "", kopfs.get("name") or ""
    return resource.get()


def configure(log_format: str) -> None:
    """Log to standard error from INFO up."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if log_format == JSON else logging.Formatter(_TEXT_LINE))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    logging.getLogger("kopf.objects").setLevel(logging.WARNING)  # every event of every child
