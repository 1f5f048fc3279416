"""What becomes of signs that a terminal or a file behind it cannot show, as Δ on Windows where output is redirected."""

import codecs
import io
import sys

_SPELLED = {"Δ": "d", "‖": "|", "→": "->", "…": "...", "–": "-", "×": "x", "±": "+/-"}
_NAME = "hollow.spelled"


def spell_out_signs() -> None:
    """Let stdout and stderr spell what their encoding lacks: our own signs in others, those of names as \\u732b."""
    codecs.register_error(_NAME, _spelled)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_NAME)


def _spelled(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    signs = error.object[error.start : error.end]
    return "".join(_SPELLED.get(sign) or sign.encode("ascii", "backslashreplace").decode() for sign in signs), error.end
