"""peft's config of a LoRA, as far as reading needs it: the alpha of layers that have none of their own."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import regex

from ..errors import HollowError

PATIENCE = 1.0
r"""Seconds for all regular expressions of a config. Some hundreds of layers take milliseconds; one such as
`(\w|.)*!`, in anybody's file, takes longer than anyone waits."""

_LONGEST = 1000  # letters of an expression
_NAME = regex.compile(r"[\w.-]+")


class Adapter:
    """What the config of one part of a model says; what is missing is as peft has it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises AttributeError, TypeError, ValueError or OverflowError where it is no config of peft's."""
        self._alpha = float(config.get("lora_alpha", 8))
        self._alphas = {name: float(alpha) for name, alpha in (config.get("alpha_pattern") or {}).items()}
        self._patterns = _Patterns(self._alphas)
        self._rank_stabilised = bool(config.get("use_rslora"))

    def alpha(self, name: str, rank: int) -> float:
        """Of a layer by its name in that part. Raises HollowError where a pattern is none or takes too long."""
        pattern = self._patterns.first(name)
        alpha = self._alpha if pattern is None else self._alphas[pattern]
        return alpha * math.sqrt(rank) if self._rank_stabilised else alpha


class _Patterns:
    """Names of layers, their ends, or regular expressions, in their order."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, str]] = []
        self._compiled: dict[str, regex.Pattern[str]] = {}
        self._seconds_left = PATIENCE
        for number, pattern in enumerate(patterns):
            if _NAME.fullmatch(pattern):
                self._names[pattern] = number
            else:
                self._expressions.append((number, pattern))

    def first(self, name: str) -> str | None:
        """The first that matches the whole name or its end behind a dot, as peft has it; None for none."""
        parts = name.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = min(((self._names[end], end) for end in ends if end in self._names), default=None)
        for number, pattern in self._expressions:
            if found is not None and number > found[0]:
                break
            if self._matches(pattern, name):
                return pattern
        return None if found is None else found[1]

    def _matches(self, pattern: str, name: str) -> bool:
        begun = time.monotonic()
        try:
            if len(pattern) > _LONGEST or self._seconds_left <= 0:
                raise TimeoutError
            if pattern not in self._compiled:
                self._compiled[pattern] = regex.compile(rf"(?:.*\.)?(?:{pattern})$")
            return self._compiled[pattern].match(name, timeout=self._seconds_left) is not None
        except TimeoutError:
            raise HollowError(f"the alpha_pattern {pattern[:40]!r} takes too long to match") from None
        except (regex.error, RecursionError, OverflowError, MemoryError):
            raise HollowError(f"the alpha_pattern {pattern[:40]!r} is none for names of layers") from None
        finally:
            self._seconds_left -= time.monotonic() - begun
