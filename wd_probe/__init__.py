"""wd_probe: what does your weight decay really do?

Names are imported on first use, so that ``wdprobe --help`` need not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .auditing import AuditReport, TensorAudit, audit
    from .decay import WeightDecay
    from .distortion import LayerDistortion, feature_distortion
    from .errors import InputError, RunError, WdProbeError, WdProbeWarning
    from .layering import Layer, layers, layerwise_rates
    from .penalty import opposing
    from .probe import OpposingPenaltyProbe
    from .records import StepRecord, Tally
    from .zeroshot import ScanPoint, half_life, zero_shot_decay

__version__ = "0.1.0"

_HOME = {
    "AuditReport": "auditing",
    "InputError": "errors",
    "Layer": "layering",
    "LayerDistortion": "distortion",
    "OpposingPenaltyProbe": "probe",
    "RunError": "errors",
    "ScanPoint": "zeroshot",
    "StepRecord": "records",
    "Tally": "records",
    "TensorAudit": "auditing",
    "WdProbeError": "errors",
    "WdProbeWarning": "errors",
    "WeightDecay": "decay",
    "audit": "auditing",
    "feature_distortion": "distortion",
    "half_life": "zeroshot",
    "layers": "layering",
    "layerwise_rates": "layering",
    "opposing": "penalty",
    "zero_shot_decay": "zeroshot",
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
