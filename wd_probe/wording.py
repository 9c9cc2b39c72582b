"""Numbers as people write them."""

import math


def percent(share: float | None, digits: int | None = None, unit: str = " %") -> str:
    """A share of 1 in per cent, as people write it; a dash for none.

    To three places in all and six after the point, what is too small for that in powers of ten, and
    what is nearly all with as many nines as it has; or to ``digits`` after the point.

    >>> [percent(share) for share in (0.0032, 0.1234567, 9e-7, 9e-9, 0.99986)]
    ['0.32 %', '12.3 %', '0.00009 %', '9.0e-07 %', '99.99 %']
    """
    if share is None or not math.isfinite(share):
        return "–"
    hundredfold = 100 * share
    if digits is not None:
        return f"{hundredfold:.{digits}f}{unit}"
    if 0 < float(f"{abs(hundredfold):.1e}") < 1e-5:
        return f"{hundredfold:.1e}{unit}"
    shown = float(f"{hundredfold:.3g}")
    if shown == 100 > hundredfold + 1e-6:
        return f"{hundredfold:.{math.ceil(-math.log10(100 - hundredfold))}f}{unit}"
    return f"{shown:.6f}".rstrip("0").rstrip(".") + unit


def number(value: float | None) -> str:
    """A plain number; a dash for none.

    >>> number(0.12345), number(math.nan)
    ('0.123', '–')
    """
    return "–" if value is None or value != value else f"{value:.3f}"


def plus_minus(mean: float, half_width: float, digits: int, unit: str = " %") -> str:
    """A mean share in per cent ± the half-width of its interval, if there is one.

    >>> plus_minus(0.974, 0.0031, 2), plus_minus(0.974, math.nan, 1)
    ('97.40 ± 0.31 %', '97.4 %')
    """
    known = [percent(x, digits, unit="") for x in (mean, half_width) if math.isfinite(x)]
    return " ± ".join(known) + unit if known else "–"


def half_life_cells(life: float | None, digits: int = 3) -> tuple[str, str]:
    """The scale of a half-life, to ``digits`` after the point, and the share taken off there."""
    if life is None or not math.isfinite(life):
        return "–", "–"
    return f"{life:.{digits}f}", percent(1 - life, digits - 2)


def half_life_told(life: float, digits: int = 3) -> str:
    """A half-life in words.

    >>> half_life_told(0.97)
    '0.970, 3.0 % taken off'
    """
    return "{}, {} taken off".format(*half_life_cells(life, digits))


def decimal(value: float) -> float:
    """A number without what binary arithmetic leaves on it, to twelve places in all.

    >>> 3 * 0.1, decimal(3 * 0.1)
    (0.30000000000000004, 0.3)
    """
    return float(f"{value:.12g}")
