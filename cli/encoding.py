"""Terminals and files that are not UTF-8 are given what they can show."""

import codecs
import io
import json
import sys

#: In the place of what an encoding lacks; of the same width where it stands in tables.
_PLAIN = {
    "λ": "lambda", "η": "eta", "θ": "theta", "β": "beta", "ε": "eps", "φ": "phi", "Σ": "sum",
    "û": "u", "ᵢ": "i", "₀": "0", "·": "-", "•": "*", "×": "x", "±": "+-", "²": "2", "–": "-",
    "—": "-", "−": "-", "…": "...", "→": "->", "≥": ">=", "≤": "<=", "≈": "~", "√": "sqrt",
    "█": "#", "▏": "#", "▎": "#", "▍": "#", "▌": "#", "▋": "#", "▊": "#", "▉": "#",
}  # fmt: skip


def _plainly(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    return "".join(_PLAIN.get(c, "?") for c in error.object[error.start : error.end]), error.end


def write_plainly() -> None:
    """Let no character end a command: what stdout and stderr cannot show is told in ASCII."""
    codecs.register_error("wd_probe.plainly", _plainly)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="wd_probe.plainly")


def json_for(encoding: str | None, text: str) -> str:
    """JSON that says the same in an encoding: what it lacks is escaped."""
    try:
        text.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(json.loads(text))
    return text
