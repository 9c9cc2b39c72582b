"""wd_probe: what does your weight decay really do?

Names are imported on first use, so that ``wdprobe --help`` need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .decay.auditing import AuditReport, TensorAudit, audit
    from .decay.methods import WeightDecay
    from .errors import InputError, RunError, WdProbeError, WdProbeWarning
    from .integrations.own_loop import OpposingPenaltyProbe
    from .integrations.watching import watch
    from .layering import Layer, layers, layerwise_rates
    from .probe.formulas import opposing
    from .probe.records import StepRecord, Tally
    from .shrink.distortion import LayerDistortion, feature_distortion
    from .shrink.scan import ScanPoint, half_life, zero_shot_decay

__version__ = "0.1.0"

_HOME = {
    "AuditReport": "decay.auditing",
    "InputError": "errors",
    "Layer": "layering",
    "LayerDistortion": "shrink.distortion",
    "OpposingPenaltyProbe": "integrations.own_loop",
    "RunError": "errors",
    "ScanPoint": "shrink.scan",
    "StepRecord": "probe.records",
    "Tally": "probe.records",
    "TensorAudit": "decay.auditing",
    "WdProbeError": "errors",
    "WdProbeWarning": "errors",
    "WeightDecay": "decay.methods",
    "audit": "decay.auditing",
    "feature_distortion": "shrink.distortion",
    "half_life": "shrink.scan",
    "layers": "layering",
    "layerwise_rates": "layering",
    "opposing": "probe.formulas",
    "watch": "integrations.watching",
    "zero_shot_decay": "shrink.scan",
}

__all__ = [
    "AuditReport",
    "InputError",
    "Layer",
    "LayerDistortion",
    "OpposingPenaltyProbe",
    "RunError",
    "ScanPoint",
    "StepRecord",
    "Tally",
    "TensorAudit",
    "WdProbeError",
    "WdProbeWarning",
    "WeightDecay",
    "audit",
    "feature_distortion",
    "half_life",
    "layers",
    "layerwise_rates",
    "opposing",
    "watch",
    "zero_shot_decay",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'wd_probe' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
