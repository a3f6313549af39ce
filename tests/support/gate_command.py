"""The command as tests call it, within their own process, and what it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mxref.verification.cli import main


def gate(*arguments: str) -> int:
    return main(["gate", "--device", "cpu", *arguments])


def verdict() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(Path("gate-report/gate.json").read_text(encoding="utf-8"))
    return data
