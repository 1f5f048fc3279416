"""ICC profiles, built from their published numbers: what cameras, phones and printers put into pictures."""

import struct
from collections.abc import Mapping, Sequence
from itertools import product

WHITE = (0.9642, 1.0, 0.8249)  # D50
ADOBE_RGB = ((0.60974, 0.31111, 0.01947), (0.20528, 0.62567, 0.06087), (0.14919, 0.06322, 0.74457)), 2.19921875
DISPLAY_P3 = ((0.51512, 0.24120, -0.00105), (0.29198, 0.69225, 0.04189), (0.15710, 0.06657, 0.78407)), 2.2
"""The red, green and blue of a colour space as XYZ, and its gamma (that of Display P3 nearly)."""


def rgb_profile(space: tuple[Sequence[tuple[float, float, float]], float]) -> bytes:
    """Of three colours and a gamma."""
    colours, gamma = space
    tags = {f"{name}XYZ": _xyz(colour) for name, colour in zip("rgb", colours, strict=True)}
    return _profile("mntr", "RGB ", "XYZ ", tags | {f"{name}TRC": _curve(gamma) for name in "rgb"})


def gray_profile(gamma: float) -> bytes:
    """Of a gamma."""
    return _profile("mntr", "GRAY", "XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile(inks: Mapping[str, tuple[int, int, int]]) -> bytes:
    """Of the CIE Lab colours of paper and inks, by letters such as "", "c" and "cm"; others are black."""
    header = struct.pack(">4sI4B9i", b"mft1", 0, 4, 3, 2, 0, *(65536 * (n % 4 == 0) for n in range(9)))
    ramp = bytes(range(256))
    grid = b""
    for on in product((0, 1), repeat=4):
        light, a, b = inks.get("".join(ink for ink, there in zip("cmyk", on, strict=True) if there), (0, 0, 0))
        grid += bytes((round(light * 2.55), a + 128, b + 128))
    return _profile("prtr", "CMYK", "Lab ", {"A2B0": header + 4 * ramp + grid + 3 * ramp})


def _xyz(values: Sequence[float]) -> bytes:
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(value * 65536) for value in values))


def _curve(gamma: float) -> bytes:
    return struct.pack(">4sIIH2x", b"curv", 0, 1, round(gamma * 256))


def _srgb_curve() -> bytes:
    """As a table of 1024 values, which is how the profile that most cameras write has it."""
    values = [number / 1023 for number in range(1024)]
    light = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
    return struct.pack(">4sII1024H", b"curv", 0, 1024, *(round(value * 65535) for value in light))


def _profile(kind: str, space: str, connection: str, tags: Mapping[str, bytes]) -> bytes:
    tags = {"wtpt": _xyz(WHITE), "desc": struct.pack(">4sII1s78x", b"desc", 0, 1, b"\0"), **tags}
    table, data, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(data), len(value))
        data += value + bytes(-len(value) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12x4s4s24x3i48x",
        start + len(data),
        b"lcms",
        0x02400000,
        *(word.encode() for word in (kind, space, connection)),
        b"acsp",
        b"\0\0\0\0",
        *(round(value * 65536) for value in WHITE),
    )
    return header + table + data


SRGB = _profile(
    "mntr",
    "RGB ",
    "XYZ ",
    {
        "rXYZ": _xyz((0.43607, 0.22249, 0.01392)),
        "gXYZ": _xyz((0.38515, 0.71687, 0.09708)),
        "bXYZ": _xyz((0.14307, 0.06061, 0.71410)),
        **{f"{name}TRC": _srgb_curve() for name in "rgb"},
    },
)
"""sRGB, by its published colours and curve."""
