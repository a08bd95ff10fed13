"""One alphabet for all voices: ARPAbet without stress, and SIL for a pause."""

from __future__ import annotations

Phone = tuple[str, float, float]
"""Name, start and end in seconds."""

VOWELS = frozenset("AA AE AH AO AW AY EH ER EY IH IY OW OY UH UW".split())
CONSONANTS = frozenset("B CH D DH F G HH JH K L M N NG P R S SH T TH V W Y Z ZH".split())
PHONES = VOWELS | CONSONANTS | {"SIL"}
BILABIALS = frozenset("PBM")

# flite writes lower-case ARPAbet and a few symbols more.
_FLITE = {
    "pau": "SIL",
    "ax": "AH",
    "axr": "ER",
    "ix": "IH",
    "dx": "T",
    "el": "L",
    "em": "M",
    "en": "N",
    "nx": "N",
    "hv": "HH",
}

# hibari writes the phonemes of its teacher, where capitals are diphthongs.
_HIBARI = {
    "A": "EY",
    "I": "AY",
    "O": "OW",
    "W": "AW",
    "Y": "OY",
    "Q": "OW",
    "a": "AE",
    "æ": "AE",
    "ɑ": "AA",
    "ɒ": "AA",
    "ɔ": "AO",
    "ə": "AH",
    "ɐ": "AH",
    "ᵊ": "AH",
    "ʌ": "AH",
    "ɛ": "EH",
    "e": "EH",
    "ɜ": "ER",
    "ɚ": "ER",
    "ɪ": "IH",
    "ᵻ": "IH",
    "i": "IY",
    "ʊ": "UH",
    "u": "UW",
    "o": "OW",
    "b": "B",
    "d": "D",
    "f": "F",
    "ɡ": "G",
    "h": "HH",
    "j": "Y",
    "k": "K",
    "l": "L",
    "m": "M",
    "n": "N",
    "ŋ": "NG",
    "p": "P",
    "ɹ": "R",
    "r": "R",
    "ɾ": "T",
    "s": "S",
    "ʃ": "SH",
    "t": "T",
    "T": "T",
    "ʔ": "T",
    "ð": "DH",
    "θ": "TH",
    "v": "V",
    "w": "W",
    "z": "Z",
    "ʒ": "ZH",
    "ʧ": "CH",
    "ʤ": "JH",
    "x": "K",
}
_BREAKS = set(",.;:!?—…")


def from_flite(symbol: str) -> str:
    """ARPAbet of a symbol of flite; ValueError for an unknown one."""
    name = _FLITE.get(symbol, symbol.upper())
    if name not in PHONES:
        raise ValueError(f"unknown flite phone {symbol!r}")
    return name


def from_hibari(symbol: str) -> str | None:
    """ARPAbet of a character of hibari's phoneme string, SIL for a punctuation mark.

    None for what is no sound of its own: stress and length marks, spaces, quotes.
    """
    if symbol in _BREAKS:
        return "SIL"
    return _HIBARI.get(symbol)


def tidy(spans: list[Phone]) -> list[Phone]:
    """Merge neighbouring pauses, the vowel + R of an ER, and drop empty spans; times are kept."""
    tidied: list[Phone] = []
    for name, start, end in spans:
        if end - start < 1e-4:
            continue
        if tidied and name == "SIL" and tidied[-1][0] == "SIL":
            tidied[-1] = ("SIL", tidied[-1][1], end)
        elif tidied and name == "R" and tidied[-1][0] == "ER":
            tidied[-1] = ("ER", tidied[-1][1], end)
        else:
            tidied.append((name, start, end))
    return tidied
