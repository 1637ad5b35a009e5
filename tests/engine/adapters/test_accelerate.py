"""`accelerate` and `restore`: which adapter is asked, and what is said where none is."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest
import torch
from tests.engine.adapters.guided_diffusion_case import diffusion
from tests.engine.adapters.lucidrains_case import bump

import stepfuse as sf
from stepfuse.engine import adapters
from stepfuse.engine.adapters import guided_diffusion, lucidrains


@pytest.mark.parametrize("make", [bump, diffusion], ids=["lucidrains", "guided_diffusion"])
def test_round_trip(make: Any) -> None:
    obj = make()
    before = dict(vars(obj))
    assert sf.accelerate(obj, optimize=False) is obj
    assert vars(obj) != before
    assert "p_sample_loop" in adapters.explain(obj)
    assert sf.restore(obj) is obj
    assert vars(obj) == before


def test_every_adapter_has_the_same_names() -> None:
    for name in adapters._LIBRARIES:
        module = adapters._module(name)
        assert module.SUPPORTED
        assert all(isinstance(line, str) for line in module.SUPPORTED)
        assert module.supports(object()) is False
        assert callable(module.accelerate)
        assert callable(module.restore)
        assert callable(module.explain)


@pytest.mark.parametrize("obj", [object(), torch.nn.Linear(1, 1), 3, None, "pipeline", bump])
@pytest.mark.parametrize("call", [sf.accelerate, sf.restore, adapters.explain])
def test_unknown_objects(call: Any, obj: Any) -> None:
    """One TypeError with everything that is supported, by every library."""
    with pytest.raises(TypeError) as caught:
        call(obj)
    message = str(caught.value)
    assert f"{type(obj).__module__}.{type(obj).__qualname__}" in message
    for line in (*lucidrains.SUPPORTED, *guided_diffusion.SUPPORTED):
        assert line in message
    for line in adapters._module("diffusers").SUPPORTED:
        assert line in message


@pytest.mark.parametrize("make", [bump, diffusion], ids=["lucidrains", "guided_diffusion"])
def test_unknown_options(make: Any) -> None:
    obj = make()
    before = dict(vars(obj))
    with pytest.raises(TypeError, match=r"no option 'speed' for .*accepted: optimize, dtype"):
        sf.accelerate(obj, optimize=False, speed=11)
    assert vars(obj) == before


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is skipped, and the message says so."""
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "diffusers" else found(name, *rest),
    )
    monkeypatch.delitem(sys.modules, "diffusers", raising=False)
    with pytest.raises(TypeError, match=r"objects of diffusers \(which is not installed\)"):
        sf.accelerate(object())
    sf.restore(sf.accelerate(bump(), optimize=False))


def test_nothing_is_imported_before_it_is_needed() -> None:
    """An object of one library does not bring in another."""
    code = (
        "import sys, stepfuse as sf\n"
        "from stepfuse.engine.adapters import guided_diffusion, lucidrains\n"
        "class D: pass\n"
        "d = D()\n"
        "assert not lucidrains.supports(d) and not guided_diffusion.supports(d)\n"
        "loaded = {'diffusers', 'transformers', 'denoising_diffusion_pytorch'} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
