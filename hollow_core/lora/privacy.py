"""Metadata without what names a place on somebody's disk."""

import json
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

# What stands before a path in a text; a letter or digit does not, as in "and/or" and "https://host/a", nor does the
# "<" of a tag that ends.
_BEFORE = r"(?:^|(?<=[\s\"'`=(\[{,;|]))"
_NEXT = r"(?=[\w.~$%@{(-])"  # how the name behind a slash begins
_ROOTS = "home|users|root|mnt|media|volumes|tmp|var|opt|srv|private|workspace|content|kaggle|data"
_PATH = re.compile(
    rf"{_BEFORE}(?:~?/|~\\){_NEXT}|(?<=:)/(?=\w)"  # /models, ~/models, ~\models, "path:/models"
    rf"|{_BEFORE}~[a-z_][\w-]*[\\/]"  # ~jane/models
    rf"|(?<![\w./%-])/(?:{_ROOTS})/|{_BEFORE}\\(?:{_ROOTS})\\"  # wherever it stands
    rf"|(?<![^\W_])[a-z]:[\\/]+{_NEXT}"  # C:\models, d:/models
    rf"|(?<!\\)\\\\[\w.$?-]+[\\/]|{_BEFORE}//[\w.-]+/"  # \\server\models, \\?\C:\models, //server/models
    r"|(?<!\w)(?:file|smb|cifs|nfs|afp|sftp|scp|ssh):[\\/]"  # file:///models
    r"|%[a-z_]\w*%[\\/]|\$[{(]?(?:env:)?[a-z_]\w*[})]?[\\/]",  # %APPDATA%\models, $HOME/models
    re.IGNORECASE,
)
_PICTURE = re.compile(r"data:image/[\w.+-]+;base64,[A-Za-z0-9+/]*={0,2}")
_ENCODINGS = 3  # how often a text may have been percent-encoded
_MOST = 4_000_000  # letters of all values: more than trainers write, and as many as are looked through in seconds


def holds_path(text: str) -> bool:
    """Whether a text holds an absolute path, of Linux, macOS or Windows, on a server, from a variable, as a URL, or
    percent-encoded."""
    if _PICTURE.fullmatch(text):
        return False
    for _ in range(1 + _ENCODINGS):
        if ("/" in text or "\\" in text) and _PATH.search(text):
            return True
        encoded, text = text, unquote(text)
        if encoded == text:
            break
    return False


def without_paths(metadata: Mapping[str, str]) -> dict[str, str]:
    """The same without entries that hold an absolute path. Where a value is JSON, only those of its entries go, and of
    texts in it that are JSON again only theirs; what holds none stays letter by letter. Values beyond `_MOST` letters
    in all are left out unread."""
    kept, room = {}, _MOST
    for key, value in sorted(metadata.items(), key=lambda entry: (len(entry[1]), entry[0])):
        room -= len(value)
        if room >= 0 and not holds_path(key) and (clean := _clean_text(value)) is not _GONE:
            kept[key] = clean
    return kept


_GONE: Any = object()


class _Pairs(list[tuple[str, Any]]):
    """A JSON object with all of its entries, of which two may have the same name."""


def _clean_text(text: str) -> Any:
    """The text, or _GONE."""
    if text.lstrip()[:1] in ("{", "[", '"'):
        try:
            parsed = json.loads(text, object_pairs_hook=_Pairs)
            clean = _clean(parsed)
            if clean is _GONE:
                return _GONE
            return text if clean == parsed else json.dumps(_plain(clean))
        except ValueError:
            pass
        except RecursionError:  # nested deeper than any tool writes
            return _GONE
    return _GONE if holds_path(text) else text


def _clean(value: Any) -> Any:
    """A parsed value without what holds a path; _GONE where nothing is left."""
    if isinstance(value, str):
        return _clean_text(value)
    if isinstance(value, _Pairs):
        kept = _Pairs(
            (key, clean) for key, each in value if not holds_path(key) and (clean := _clean(each)) is not _GONE
        )
        return kept if kept or not value else _GONE
    if isinstance(value, list):
        items = [clean for each in value if (clean := _clean(each)) is not _GONE]
        return items if items or not value else _GONE
    return value


def _plain(value: Any) -> Any:
    if isinstance(value, _Pairs):
        return {key: _plain(each) for key, each in value}
    return [_plain(each) for each in value] if isinstance(value, list) else value
