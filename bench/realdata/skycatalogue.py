"""What Stellarium's deep-sky photographs show, from the catalogue and the list of textures that it comes with."""

import gzip
import json
import re
import struct
import zlib
from typing import NamedTuple

import numpy as np

CLASSES = ("galaxy", "globular cluster", "open cluster", "nebula", "planetary nebula")
# Stellarium's types of objects. Dark nebulae, quasars and remnants of supernovae are few or show nothing: left out.
CLASS_OF_TYPE = {
    **dict.fromkeys((0, 1, 2, 3), "galaxy"),
    7: "globular cluster",
    **dict.fromkeys((5, 6, 8, 9), "open cluster"),
    **dict.fromkeys((10, 13, 14, 15, 16, 17), "nebula"),
    11: "planetary nebula",
}
# What stands before the number in a picture's name, and the column of numbers in the catalogue that it means.
PREFIXES = {"n": "NGC", "ngc": "NGC", "ic": "IC", "m": "M", "sh2-": "Sh2", "rcw": "RCW", "p": "PGC", "u": "UGC"}
NUMBERS = ("NGC", "IC", "M", "C", "B", "Sh2", "VdB", "RCW", "LDN", "LBN", "Cr", "Mel", "PGC", "UGC")
NO_TEXT = 0xFFFFFFFF


class Field(NamedTuple):
    """A round part of the sky that a picture lies in: the unit vector to its centre, and its radius in degrees."""

    centre: np.ndarray
    radius_deg: float


class _Stream:
    """Reads what Qt's QDataStream wrote: big-endian, texts as a length in bytes and UTF-16."""

    def __init__(self, content: bytes) -> None:
        self._content, self._position = content, 0

    def at_end(self) -> bool:
        return self._position >= len(self._content)

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f">{form}", self._content, self._position)
        self._position += struct.calcsize(f">{form}")
        return values

    def take_text(self) -> str:
        (length,) = self.take("I")
        if length == NO_TEXT:
            return ""
        begin, self._position = self._position, self._position + length
        return self._content[begin : self._position].decode("utf-16-be")


def read_catalogue(content: bytes) -> dict[tuple[str, int], int]:
    """The type of each object of ``catalog.dat``, by catalogue and number: ``("NGC", 224)``.

    Raises:
        ValueError: It is no catalogue, or of another form.
    """
    try:
        stream = _Stream(gzip.decompress(content))
        stream.take_text(), stream.take_text()  # version and edition
        types: dict[tuple[str, int], int] = {}
        while not stream.at_end():
            kind, numbers = _take_object(stream)
            for catalogue, number in zip(NUMBERS, numbers, strict=True):
                if number:
                    types.setdefault((catalogue, number), kind)
    except (OSError, EOFError, zlib.error, struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"Stellarium's catalogue has another form than that of release 0.22: {error}") from error
    return types


def _take_object(stream: _Stream) -> tuple[int, tuple[int, ...]]:
    stream.take("I4d")  # number, position, magnitudes
    (kind,) = stream.take("I")
    stream.take_text()  # morphology
    stream.take("2di6d")  # axes, orientation, redshift, parallax, distance
    numbers = stream.take("14I")
    stream.take_text()  # Ced
    stream.take("2I")  # Arp, VV
    for _ in ("PK", "PNG", "SNRG", "ACO", "HCG", "ESO", "VdBH"):
        stream.take_text()
    stream.take("5I")  # DWB, Tr, St, Ru, VdBHa
    return kind, numbers


def class_of_picture(stem: str, types: dict[tuple[str, int], int]) -> str | None:
    """The class of what a picture of this name shows, ``n4535-vasey`` say; None where name or type says none."""
    found = re.match(r"(ngc|n|ic|m|sh2-|rcw|p|u)(\d+)", stem.lower())
    kind = types.get((PREFIXES[found[1]], int(found[2]))) if found else None
    return CLASS_OF_TYPE.get(kind)


def read_fields(textures: str) -> dict[str, Field]:
    """Where in the sky the pictures of ``textures.json`` lie, by file name.

    The file is no valid JSON, so only names and corners are looked for.
    """
    # The corners (right ascension and declination in degrees) stand after the name, within the same pair of braces.
    entry = re.compile(r'"imageUrl"\s*:\s*"([^"]+)".*?"worldCoords"\s*:\s*\[(\[.*?\]\s*\])\s*\]', re.DOTALL)
    fields = {}
    for name, corners in entry.findall(textures):
        numbers = json.loads(re.sub(r"(?<![\d])\.(?=\d)", "0.", corners))
        vectors = np.array([_unit_vector(*corner) for corner in numbers])
        centre = vectors.mean(0) / np.linalg.norm(vectors.mean(0))
        fields[name] = Field(centre, max(_angle_deg(centre, vector) for vector in vectors))
    return fields


def share_sky(one: Field, other: Field) -> bool:
    """Whether the circles around two pictures meet."""
    return _angle_deg(one.centre, other.centre) < one.radius_deg + other.radius_deg


def _unit_vector(right_ascension_deg: float, declination_deg: float) -> np.ndarray:
    ascension, declination = np.radians([right_ascension_deg, declination_deg])
    return np.array(
        [np.cos(declination) * np.cos(ascension), np.cos(declination) * np.sin(ascension), np.sin(declination)]
    )


def _angle_deg(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(one @ other, -1, 1))))
