"""Every public callable: a valid call, or why there is none."""

from __future__ import annotations

from collections.abc import Callable

from tests.api import exports, generating, inverse, kernels, networks, sampling, schedules
from tests.api.case import Call

CALLS: dict[str, Callable[[], Call]] = {
    **schedules.CALLS,
    **sampling.CALLS,
    **inverse.CALLS,
    **networks.CALLS,
    **kernels.CALLS,
    **exports.CALLS,
    **generating.CALLS,
}

_RECORD = "made by this library for its callers to read"
_PASS = "filled in by a pass, and read by `explain`"
_LOOP = "called by the sampler in its loop, with tensors of its own, and recorded there"
_MODEL = "its arguments are those of the user's model, whose errors are its own"

_STORED = "reads or writes what a checkpoint's file has of it; test_checkpoint.py tries it"
LEFT_OUT = {
    "Normalization.from_json": _STORED,
    "Normalization.to_json": _STORED,
    "SamplingDefaults.from_json": _STORED,
    "SamplingDefaults.to_json": _STORED,
    "SamplingDefaults.with_own": "asked by samplers, with arguments that they check",
    "Bound": _RECORD,
    "Bound.rate_distortion": "it has no arguments",
    "Bound.standard_error": "it has no arguments",
    "RateDistortion": _RECORD,
    "group_norm_silu.least_eps": "asked by a pass over a graph, with the dtype of a node",
    "Step": _RECORD,
    "inverse.Blur.bare": "it has no arguments",
    "inverse.Operator": "a base, of which there are no objects",
    "Step.of": "made by the sampler",
    "export.Exported": _RECORD,
    "export.Metadata": _RECORD,
    "export.Report": _RECORD,
    "export.Report.markdown": "it has no arguments",
    "export.Report.rows": "it has no arguments",
    "export.Report.summary": "it has no arguments",
    "export.Report.table": "it has no arguments",
    "export.Report.to_json": "it has no arguments",
    "CFG.combine": _LOOP,
    "CFG.outputs": _LOOP,
    "CFG.is_active": _LOOP,
    "CFG.scale_at": _LOOP,
    "ClassifierGuidance.check_table": _LOOP,
    "ClassifierGuidance.gradient": _LOOP,
    "ClassifierGuidance.outputs": _LOOP,
    "ClassifierGuidance.without_autograd": "it has no arguments",
    "DPS.check_steps": _LOOP,
    "DPS.check_table": _LOOP,
    "DPS.cotangent": _LOOP,
    "DPS.measured_shape": _LOOP,
    "DPS.outputs": _LOOP,
    "DPS.scale_at": _LOOP,
    "DPS.steered": _LOOP,
    "DPS.without_autograd": "it has no arguments",
    "PiGDM.cotangent": _LOOP,
    "PiGDM.steered": _LOOP,
    "Guidance": "a protocol, which tests/engine/sampling/test_guidance_protocol.py tries",
    "Guidance.outputs": _LOOP,
    "Outputs": "made by a guidance, and looked at when the sampler gets it",
    "ClassifierGuidance.is_active": _LOOP,
    "ClassifierGuidance.scale_at": _LOOP,
    "OnnxDenoiser.takes_batch": _LOOP,
    "TensorRTDenoiser.takes_batch": _LOOP,
    "OnnxDenoiser.run": "called by its operator, with tensors that forward has checked",
    "PassContext": _RECORD,
    "PassReport": _PASS,
    "PassReport.count": _PASS,
    "Optimized": "made by optimize, which checks the same arguments",
    "Optimized.compile": _MODEL,
    "Optimized.watched_instead": "it has no arguments",
    "Optimized.forward": _MODEL,
}
