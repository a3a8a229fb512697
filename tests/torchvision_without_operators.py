"""Makes torchvision importable where its compiled part does not fit: a pytest plugin, to be loaded before anything imports it.

The package index has torchvision for torch with CUDA alone. Beside the CPU's torch its extension is not loaded, and its import fails,
because it describes operators (nms, roi_align, ...) that are not there. What processors of videos take from it (resizing, cropping,
normalising) is Python over torch's own operators. So the names of the missing ones are declared here, and nothing of them is run.
"""

import importlib.util
import re
from pathlib import Path

import torch

FOUND = importlib.util.find_spec("torchvision")
if FOUND is not None and FOUND.origin is not None:
    _described = (Path(FOUND.origin).parent / "_meta_registrations.py").read_text(encoding="utf-8")
    LIBRARY = torch.library.Library("torchvision", "FRAGMENT")
    for _name in re.findall(r'register_(?:fake|meta)\("(?:torchvision::)?(\w+)"', _described):
        if not hasattr(torch.ops.torchvision, _name):
            LIBRARY.define(f"{_name}() -> Tensor")


def pytest_configure() -> None:
    """The tests need it: without it they would be skipped for nothing."""
    if FOUND is None:
        raise SystemExit("These tests need torchvision: make videos")
