"""What makes two jobs the same, as text that can be compared."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from stepfuse.engine.generate.settings import Settings

FORMAT = 1


def canonical(identity: Mapping[str, Any]) -> str:
    """JSON that is the same for equal settings: sorted, without spaces, ASCII."""
    return json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(identity: Mapping[str, Any]) -> str:
    """sha256 of `canonical`."""
    return hashlib.sha256(canonical(identity).encode("ascii")).hexdigest()


def differences(there: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """What is asked for and is otherwise there, a line each; what is not asked for is left out."""
    ours, theirs = _flat(asked), _flat(there)
    return [
        f"{name}: {theirs.get(name, 'nothing')!r} there, {value!r} asked for"
        for name, value in sorted(ours.items())
        if theirs.get(name) != value
    ]


def of_settings(settings: Settings) -> dict[str, Any]:
    """The part of the identity that stands in the settings word by word."""
    recipe = settings.recipe
    return {
        "seed": settings.seed,
        "features": settings.features,
        "batch_size": settings.batch_size,
        "shard_size": settings.shard_size,
        "threads": settings.threads,
        "output": {"name": settings.format, "rounding": settings.rounding},
        "sampling": {
            name: getattr(recipe, name)
            for name in ("method", "steps", "spacing", "eta", "guidance", "optimize")
        }
        | recipe.solver(),
    }


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping) and value:
        found: dict[str, Any] = {}
        for key, inner in value.items():
            found |= _flat(inner, f"{name}.{key}" if name else str(key))
        return found
    return {name: value}
