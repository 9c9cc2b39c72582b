"""The closed choices that options and arguments name; nothing here loads torch."""

from typing import Literal, get_args

#: baseline: no decay. l1, l2: λ·sign(θ) or λθ goes into the gradient. wd: θ' = θ − ηU − cθ (Eq. 1).
#: rwd: (1 − c)(θ − ηU) (Eq. 7). pwd: θ is decayed before the forward pass (Algorithm 2). lpwd: pwd
#: with a rate for each layer (Algorithm 3). Beyond the paper, cautious: wd, but only where U and θ
#: agree in sign (arXiv 2510.12402). corrected: wd whose c is ηλ·η/η_max (arXiv 2506.02285).
Method = Literal["baseline", "l1", "l2", "wd", "rwd", "pwd", "lpwd", "cautious", "corrected"]
#: The methods that :class:`wd_probe.WeightDecay` knows.
METHODS: tuple[Method, ...] = get_args(Method)
#: What c is: the paper's experiments and torch multiply by the live learning rate, Eq. 1 does not.
Convention = Literal["lr*rate", "rate"]
#: How layer-wise rates rise, see :func:`wd_probe.layerwise_rates`.
Scale = Literal["eq9", "max2", "mean", "falling"]
#: How η goes on, by timm's names.
Schedule = Literal[
    "none", "constant", "cosine", "tanh", "poly", "step", "multistep", "wsd", "rsqrt", "plateau"
]
#: How gradients are clipped, by timm's names.
ClipMode = Literal["norm", "value", "agc"]
#: What a scan decays one at a time.
By = Literal["none", "layer", "kind"]
#: Where to compute.
Device = Literal["auto", "cuda", "mps", "cpu"]
#: What autocast computes in.
AmpDtype = Literal["bfloat16", "float16"]
