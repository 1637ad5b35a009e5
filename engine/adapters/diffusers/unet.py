"""diffusers' U-Nets: the forward of an accelerated one, which runs compiled networks.

    unet(x, t, encoder_hidden_states)
      ├─ what a compiled network takes ──► `Optimized`, one network per shape, made when first met
      └─ anything else                 ──► the original forward, the reason kept for `explain`

The module itself is not touched: its class, configuration, submodules and weights stay what they
are. The only change is the instance attribute ``forward``.
"""

from __future__ import annotations

import gc
import inspect
from collections import Counter
from collections.abc import Callable, Collection
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from stepfuse.engine.adapters.diffusers.listed import Listed
from stepfuse.engine.compile.optimize import Optimized, WeightsChanged
from stepfuse.engine.compile.state.python_state import PythonState
from stepfuse.engine.compile.timetable import CAPACITY
from stepfuse.engine.compile.weights.watched import turn_back
from stepfuse.kernels import torch_names

CLASSES = ("UNet2DModel", "UNet2DConditionModel")
# arguments that the compiled network is given; any other that is not None runs the original
_TAKEN = ("sample", "timestep", "encoder_hidden_states", "class_labels", "return_dict")
_CONDITION = ("encoder_hidden_states", "class_labels")
# attention that is a function of its inputs alone, so that one trace of it holds for ever
_STATELESS = (
    "AttnProcessor",
    "AttnProcessor2_0",
    "FusedAttnProcessor2_0",
    "SlicedAttnProcessor",
)
_MOST_LISTED = 256  # timesteps that are announced together: the training schedule is not
_UNKNOWN = "a timestep that a table may not have, outside 0..4095 or while a graph is captured"
# hooks of the U-Net itself, which run around its forward, whatever that is
_AROUND = ("_forward_hooks", "_forward_pre_hooks")


def is_unet(obj: Any) -> bool:
    """Whether ``obj`` is one of diffusers' U-Nets, found without importing diffusers."""
    return isinstance(obj, nn.Module) and _original_class(obj) is not None


def _original_class(obj: Any) -> Any:
    """diffusers' own class of a U-Net, or None."""
    for kind in type(obj).__mro__:
        if kind.__name__ in CLASSES and kind.__module__.partition(".")[0] == "diffusers":
            return kind
    return None


def obstacle(unet: nn.Module) -> str | None:
    """Why this U-Net cannot be given another forward, or None."""
    kind = _original_class(unet)
    if kind is None:
        return f"{type(unet).__name__} is none of {', '.join(CLASSES)}"
    if vars(type(unet)).get("forward", kind.forward) is not kind.forward:
        return f"{type(unet).__name__} has a forward of its own"
    held = vars(unet).get("forward")
    # removed hooks leave the class's own forward behind, bound
    if not (held is None or isinstance(held, Forward) or held == _class_forward(unet)):
        return f"its forward was replaced already, by a {type(held).__name__}"
    return None


def is_plain(unet: nn.Module) -> bool:
    """Whether no forward of ours is in this U-Net, not even under another."""
    return not any(isinstance(held, Forward) for held in vars(unet).values())


def _class_forward(unet: nn.Module) -> Callable[..., Any]:
    """The forward that the U-Net has without any of its own."""
    return MethodType(type(unet).forward, unet)


def forward_of(unet: nn.Module) -> Forward | None:
    """The forward that an accelerated U-Net has, None where it was not accelerated."""
    found = vars(unet).get("forward")
    return found if isinstance(found, Forward) else None


def install(unet: nn.Module, dtype: torch.dtype | None) -> Forward:
    """Give ``unet`` a forward that runs compiled networks; one that it has already is kept.

    Raises ValueError where `obstacle` names one.
    """
    reason = obstacle(unet)
    if reason is not None:
        raise ValueError(f"cannot accelerate the U-Net: {reason}")
    found = forward_of(unet)
    if found is None:
        found = Forward(unet, dtype, vars(unet).get("forward"))
    elif found.dtype != dtype:
        found = Forward(unet, dtype, found.hidden)
    vars(unet)["forward"] = found
    return found


def remove(unet: nn.Module) -> None:
    """Take the forward away again, if there is one.

    Raises RuntimeError where somebody put another over it.
    """
    found = forward_of(unet)
    if found is None:
        if not is_plain(unet):
            raise RuntimeError(
                "the forward of the U-Net was replaced after it was accelerated; undo that first "
                "(hooks for offloading: pipe.remove_all_hooks())"
            )
        return
    del vars(unet)["forward"]
    if found.hidden is not None:
        vars(unet)["forward"] = found.hidden
    found.forget()
    turn_back(unet)


class Forward:
    """``unet(sample, timestep, ...)`` through compiled networks where they give the same.

    Copies and pickles hold the U-Net and the settings, and compile again when they are called.
    """

    def __init__(self, unet: nn.Module, dtype: torch.dtype | None, hidden: Any = None) -> None:
        self.unet, self.dtype = unet, dtype
        self.hidden = hidden  # what lay in ``__dict__`` in the place of this
        self.originals: Counter[str] = Counter()  # calls of the original forward, by reason
        self._names = [*inspect.signature(type(unet).forward).parameters][1:]
        self._state: _State | None = None
        self._fast: Optimized | None = None
        self._announced: set[int] = set()
        self.listed = Listed()  # schedulers whose timesteps may come

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # by torch.compile, which wants the network itself
            return type(self.unet).forward(self.unet, *args, **kwargs)
        given = {**dict(zip(self._names, args, strict=False)), **kwargs}
        fast = self._ready(args, kwargs, given)
        if fast is None:
            return type(self.unet).forward(self.unet, *args, **kwargs)
        # these networks ask for no layout: one is compiled for all of them
        sample = given["sample"].contiguous()
        t = self._timesteps(fast, sample, given["timestep"])
        if t is None:
            self.originals[_UNKNOWN] += 1
            return type(self.unet).forward(self.unet, *args, **kwargs)
        condition = {n: given[n].contiguous() for n in _CONDITION if given.get(n) is not None}
        try:
            result = fast(sample, t, **condition)
        except WeightsChanged:
            fast.refresh()
            result = fast(sample, t, **condition)
        return self._output()(sample=result) if given.get("return_dict", True) else (result,)

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the original, which pipelines look up."""
        signature = inspect.signature(type(self.unet).forward)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    def refresh(self) -> None:
        """Read the weights again; changes that can be seen are read without this."""
        if self._fast is not None:
            self._fast.refresh()

    def forget(self) -> None:
        """Let go of what was compiled, and of every tensor of the U-Net that it holds."""
        if self._fast is not None:
            self._fast = None
            gc.collect()

    def explain(self) -> str:
        """What was compiled, and which calls ran the original forward and why."""
        lines = [self._fast.explain() if self._fast is not None else "nothing compiled yet"]
        for reason, count in self.originals.items():
            lines.append(f"original forward       {count} calls: {reason}")
        return "\n".join(lines)

    def _ready(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
    ) -> Optimized | None:
        """The compiled networks for a call they can take, or None and the reason counted."""
        reason = self._not_taken(args, kwargs, given) or _not_now(self.unet, given)
        if reason is None:
            if self._state is None or not self._state.holds():
                self._state = _State(self.unet)
            reason = self._state.reason
        if reason is not None:
            self.originals[reason] += 1
            return None
        if self._fast is None:
            ignored = [f"model.unet.{table}" for table in _AROUND]
            self._fast = Optimized(_Plain(self.unet), self.dtype, (), 8, ignored=ignored)
        return self._fast

    def _not_taken(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]
    ) -> str | None:
        """The argument that no compiled network takes; the original also words the errors."""
        if len(given) != len(args) + len(kwargs) or not {"sample", "timestep"} <= given.keys():
            return "arguments that do not fit"
        for name, argument in given.items():
            if name not in _TAKEN and argument is not None:
                return f"argument {name}"
        for name in ("sample", *_CONDITION):
            if not isinstance(given.get(name), Tensor | None):
                return f"{name} is not a tensor"
        sample, t = given["sample"], given["timestep"]
        if sample is None or sample.dim() != 4 or not len(sample):
            return "sample is not [N, C, H, W]"
        one = isinstance(t, int) or (isinstance(t, Tensor) and t.dim() < 2 and t.numel() == 1)
        if not one and not (isinstance(t, Tensor) and t.shape == sample.shape[:1]):
            return "timestep is neither an integer nor a tensor of one or N"
        return None

    def _timesteps(self, fast: Optimized, sample: Tensor, timestep: Any) -> Tensor | None:
        """``timestep`` as [N] on the device of ``sample``, its row in the table filled.

        None where there is a table and nobody can say whether it has a row of this timestep.
        """
        t = timestep if isinstance(timestep, Tensor) else torch.tensor(timestep, device="cpu")
        if sample.device.type != "cpu" and not t.is_floating_point():
            if not self._have_rows(fast, t, sample.device):
                return None
        elif t.numel() == 1 and t.device.type == "cpu" and not t.is_floating_point():
            value = int(t)
            if 0 <= value < CAPACITY:
                self._announce(fast, [value])
            return torch.full((len(sample),), value, device="cpu")
        if t.numel() == 1:
            t = t.to(sample.device).reshape(1).repeat(len(sample))
        return t if t.is_floating_point() else t.long()

    def _have_rows(self, fast: Optimized, t: Tensor, device: torch.device) -> bool:
        """Whether a ``device`` that reads t will find it in the table, or there is none.

        An entry of a scheduler's list is known, and announced with all of the list; any other that
        is on the device is read back, once there is a table.
        """
        capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        values = t.reshape(-1).tolist() if t.device.type == "cpu" else self.listed.values(t)
        if values is None:
            if not self._announced:
                return True
            if capturing:
                return False
            values = t.reshape(-1).tolist()
        if not all(0 <= value < CAPACITY for value in values):
            return not self._announced
        new = not self._announced.issuperset(values)
        if new and capturing:
            return not self._announced
        if new:
            listed = self.listed.beside(values, _MOST_LISTED)
            self._announce(fast, [*values, *(v for v in listed if 0 <= v < CAPACITY)])
        return True

    def _announce(self, fast: Optimized, values: Collection[int]) -> None:
        if not self._announced.issuperset(values):
            fast.prepare(values)
            self._announced.update(values)

    def _output(self) -> Callable[..., Any]:
        from diffusers.models.unets.unet_2d import UNet2DOutput
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        plain = "UNet2DModel" in (kind.__name__ for kind in type(self.unet).__mro__)
        chosen: Callable[..., Any] = UNet2DOutput if plain else UNet2DConditionOutput
        return chosen

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None, "_fast": None, "_announced": set()}


def _not_now(unet: nn.Module, given: dict[str, Any]) -> str | None:
    """What around this call wants the original."""
    if torch.is_grad_enabled() and _wants_gradient(unet, given):
        return "a gradient is wanted; call under torch.no_grad() for the compiled network"
    if (
        torch_names.len_dispatch_stack()
        or torch_names.peek_functorch() is not None
        or torch_names.tracing_state() is not None
    ):
        return "traced, recorded or transformed by somebody else"
    device = given["sample"].device.type
    if torch.is_autocast_enabled(device):
        return "autocast is on"
    if torch.get_default_device().type not in ("cpu", device):
        return "the default device is not that of the sample"
    return None


def _wants_gradient(unet: nn.Module, given: dict[str, Any]) -> bool:
    tensors = [*unet.parameters(), *(given.get(name) for name in ("sample", *_CONDITION))]
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


class _State:
    """Why the modules of a U-Net must run as they are, asked again when something has changed.

    What else a change means (another adapter, its scale, a switch of a submodule) is noticed by the
    compiled network, see `stepfuse.engine.compile.state.python_state`.
    """

    def __init__(self, unet: nn.Module) -> None:
        ignored = frozenset(f"unet.{table}" for table in _AROUND)
        self.holds = PythonState({"unet": unet}, contents=False, ignored=ignored).holds
        self.reason = _reason(unet)


def _reason(unet: nn.Module) -> str | None:
    inner = [module for module in unet.modules() if module is not unet]
    if any(module._forward_hooks or module._forward_pre_hooks for module in inner):
        return "a submodule has a forward hook"  # those of the U-Net itself run around its forward
    if any(m.training and getattr(m, "p", 0) and "Dropout" in _name(m) for m in inner):
        return "dropout is on; call unet.eval() for the compiled network"
    for module in inner:
        processor = getattr(module, "processor", None)
        if processor is not None and _name(processor) not in _STATELESS:
            return f"attention by {_name(processor)}"
    return None


def _name(obj: Any) -> str:
    return type(obj).__name__


class _Plain(nn.Module):
    """The U-Net by its class's forward, with a tensor for a result."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, **condition: Any) -> Tensor:
        """``sample`` [N, C, H, W], ``timestep`` [N] to the prediction [N, C', H, W]."""
        forward = type(self.unet).forward
        result: Tensor = forward(self.unet, sample, timestep, **condition, return_dict=False)[0]
        return result
