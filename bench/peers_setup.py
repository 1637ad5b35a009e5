"""Make the libraries we compare with importable, whatever torchvision build stands beside torch.

diffusers and denoising-diffusion-pytorch import torchvision for image helpers that a sampler never
calls. A torchvision whose compiled extension was built for another torch still has those helpers,
but its ``__init__`` goes on to describe the missing C++ operators to the dispatcher, and that
raises "operator torchvision::nms does not exist". Empty modules in place of the two descriptions
leave everything that is plain Python working.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

_DESCRIPTIONS = ("torchvision._meta_registrations", "torchvision._autograd_registrations")


def prepare() -> None:
    """Let ``import torchvision`` succeed where only its C++ operators are missing."""
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return  # not installed: the peers' own message is the better one
    except RuntimeError:
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in _DESCRIPTIONS:
            sys.modules[name] = ModuleType(name)
        importlib.import_module("torchvision")
