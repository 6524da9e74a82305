"""`crd-fast doctor`: what this machine has, and how to get what is missing."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from crd_fast import native
from crd_fast.errors import ExtensionMissingError

_OPTIONAL = {
    "train": ("diffusers", "transformers", "peft"),
    "rewards": ("rapidocr", "onnxruntime"),
    "serve": ("fastapi", "uvicorn"),
    "triton": ("triton",),
    "fp8": ("torchao",),
    "xformers": ("xformers",),
}


def report() -> tuple[str, bool]:
    """A text of one fact a line, and whether the core works (extension built, torch new enough)."""
    lines = [
        f"crd-fast     {_version('crd-fast') or 'not installed'}",
        f"python       {platform.python_version()}",
    ]
    lines.append(f"torch        {torch.__version__}, {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            lines.append(
                f"cuda:{index}       {properties.name}, {memory:.0f} GiB, sm_{properties.major}{properties.minor}"
            )
    else:
        lines.append("cuda         no device: everything runs on the CPU")
    healthy = True
    try:
        lines.append(f"extension    built, uses {native.instruction_set()}")
    except ExtensionMissingError as error:
        healthy = False
        lines.append(f"extension    MISSING: {error}")
    for extra, packages in _OPTIONAL.items():
        found = {package: _version(package) for package in packages}
        text = ", ".join(f"{package} {version}" for package, version in found.items() if version)
        absent = [package for package, version in found.items() if version is None]
        if absent:
            text += f'{"; " if text else ""}missing {", ".join(absent)}: pip install "crd-fast[{extra}]"'
        lines.append(f"{extra:<12} {text}")
    return "\n".join(lines), healthy


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
