"""Files that a reader finds whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: bytes) -> None:
    """Write aside and rename."""
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_bytes(content)
    os.replace(aside, path)


def write_text(path: Path, text: str) -> None:
    write_whole(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, sort_keys=True) + "\n")
