r"""Exact parser of one number as people write it: no floats, no exceptions, at most ``MAX_DIGITS`` digits.

Parsed: thousands (``1,234``, ``1 234``, ``1'234``, ``1{,}234``, ``1\,234``, ``1.234,56``), any minus
sign, signs of currency, ``.75``, ``3/4``, ``2 1/2``, ``\frac{3}{4}``, ``1.8e1``, ``1.8 \times 10^1``,
``50%`` (as 50), ``2 million``.
No number: dates, times, ranges, powers, sums without a result, division by zero, ``12,5`` (125 or 12.5?).
"""

import re
from fractions import Fraction
from typing import NamedTuple


MAX_DIGITS = 100  # of a numerator, a denominator or an exponent's power of ten
_CURRENCY = "$\u20ac\u00a3\u00a5\u20b9"
_CHARACTERS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63\uff0d", "-"),
        **dict.fromkeys("\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff", None),
        **{chr(0xFF10 + digit): str(digit) for digit in range(10)},
        "\uff0c": ",", "\uff0e": ".", "\uff05": "%", "\uff1a": ":", "\uff04": "$",
        "\uffe1": "\u00a3", "\uffe5": "\u00a5",
        "\u2044": "/", "\u2215": "/", "\u2019": "'", "\u00b7": "\u00d7", "\u22c5": "\u00d7",
        "\u00bd": " 1/2", "\u00bc": " 1/4", "\u00be": " 3/4", "\r": "\n",
    }
)  # fmt: skip
_LATEX = (
    ("\\!", ""), ("{,}", ","), ("\\,", " "), ("\\;", " "), ("\\:", " "), ("\\ ", " "), ("\\(", " "), ("\\)", " "),
    ("\\[", " "), ("\\]", " "), ("\\%", "%"), ("\\$", "$"), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"),
    ("\\cfrac", "\\frac"), ("\\times", "\u00d7"), ("\\cdot", "\u00d7"), ("\\div", "\u00f7"), ("\\left", " "),
    ("\\right", " "), ("\\approx", "="), ("\u2248", "="), ("\\pi", "\u03c0"), ("\\sqrt", "\u221a"),
)  # fmt: skip
_SIGNED_MONEY = re.compile(rf"([-+])\s?[{_CURRENCY}]")
_MONEY = str.maketrans(dict.fromkeys(_CURRENCY, " "))

# Every pattern below is matched at one place, on runs that are possessive or bounded: none can backtrack far.
_SIGN = re.compile(r"[-+]\s?(?=[\d.\\])")
_RUN = re.compile(r"\.?\d[\d,.']*+", re.ASCII)
_LONGEST = 3 * MAX_DIGITS
_SPACED = re.compile(r"(?: \d{3}(?!\d)){1,30}(?:\.\d{1,99}(?!\d))?", re.ASCII)
_PLAIN = re.compile(r"\d*\.?\d+|\d+", re.ASCII)
_COMMAS = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d{1,2}(?:,\d{2})*,\d{3}(?:\.\d*)?", re.ASCII)
_APOSTROPHES = re.compile(r"\d{1,3}(?:'\d{3})+(?:\.\d*)?", re.ASCII)
_DOTS = re.compile(r"\d{1,3}(?:\.\d{3})+,\d+|\d{1,3}(?:\.\d{3}){2,}", re.ASCII)
_PART = r"\s?\{\s?(-?[\d,.]{1,130})\s?\}"
_FRAC = re.compile(rf"\\frac(?:{_PART}{_PART}|\s?(\d)\s?(\d)(?!\d))", re.ASCII)
_DIVISOR = re.compile(r" ?/ ?(?=\.?\d)", re.ASCII)
_MIXED = re.compile(r" {1,2}(\d{1,4}) ?/ ?(\d{1,4})(?!\d|/|[.,]\d)", re.ASCII)
_EXPONENT = re.compile(r"[eE]([-+]?\d{1,4})(?![\w.])|\s?[\u00d7*xX]\s?10\s?\^\s?\{?\s?([-+]?\d{1,4})\s?\}?", re.ASCII)
_SCALE = re.compile(r"\s(hundred|thousand|million|billion|trillion)\b", re.IGNORECASE)
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
_PERCENT = re.compile(r"\s?%")
# What makes a number part of something else: an operator and a further number, a time, a range, a power, a root.
_GOES_ON = re.compile(
    r" ?(?:[-+*/\u00d7\u00f7:] ?[-(]? ?\.?\d|\^(?! ?\{? ?\\circ)|[\u03c0\u221a]|\*\*\d)| (?:to|or) [-+]?\.?\d|"
    r"(?:,|;| and) ?[-+]?\d[\d.,]{0,40} {0,2}(?:\Z|[.!?\n])"
)


class Reading(NamedTuple):
    """A number found in a text: its value, None where it is no single number, and the place behind it."""

    value: Fraction | None
    end: int


def tidied(text: str) -> str:
    """Replace spellings that look alike by one: minus signs, spaces, full-width digits, LaTeX's marks, currency."""
    text = text.translate(_CHARACTERS)
    for spelling, plain in _LATEX:
        text = text.replace(spelling, plain)
    return _SIGNED_MONEY.sub(r"\1", text).translate(_MONEY)


def read(text: str, at: int = 0) -> Reading | None:
    """Read the number that begins at ``at`` in a tidied text; None where none begins."""
    sign = _SIGN.match(text, at)
    unsigned = _unsigned(text, sign.end() if sign else at)
    if unsigned is None:
        return None
    value, end = unsigned
    if _GOES_ON.match(text, end):
        value = None
    negative = sign is not None and sign.group().startswith("-")
    return Reading(-value if value is not None and negative else value, end)


def value_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number, apart from blanks, a full stop and currency signs; else None."""
    plain = tidied(text).strip()
    reading = read(plain)
    return reading.value if reading is not None and not plain[reading.end :].strip(" .,'") else None


def spell(value: Fraction) -> str:
    """Spell a value in the shortest exact way: ``18``, ``0.75``, ``1/3``."""
    if value.denominator == 1:
        return str(value.numerator)
    rest, twos, fives = value.denominator, 0, 0
    while rest % 2 == 0:
        rest, twos = rest // 2, twos + 1
    while rest % 5 == 0:
        rest, fives = rest // 5, fives + 1
    places = max(twos, fives)
    if rest != 1 or places > MAX_DIGITS:
        return f"{value.numerator}/{value.denominator}"
    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    return f"{'-' if value < 0 else ''}{digits[:-places]}.{digits[-places:]}"


def _unsigned(text: str, at: int) -> Reading | None:
    if latex := _FRAC.match(text, at):
        top, bottom = latex.group(1) or latex.group(3), latex.group(2) or latex.group(4)
        return _scaled(text, latex.end(), _ratio(_decimal(top), _decimal(bottom)))
    token = _RUN.match(text, at)
    if token is None:
        return None
    run = token.group().rstrip(".,'")
    end = at + len(run)
    if len(run) <= 3 and run.isdecimal() and (groups := _SPACED.match(text, end)):
        run, end = run + groups.group().replace(" ", ""), groups.end()
    return _with_parts(text, end, _decimal(run))


def _with_parts(text: str, end: int, value: Fraction | None) -> Reading:
    """Extend a number by the fraction, divisor or power of ten that follows it."""
    if mixed := _MIXED.match(text, end):
        return Reading(_plus(value, _ratio(Fraction(mixed[1]), Fraction(mixed[2]))), mixed.end())
    if latex := _FRAC.match(text, end):
        below = _unsigned(text, latex.start())
        return Reading(_plus(value, below.value if below else None), latex.end())
    if slash := _DIVISOR.match(text, end):
        token = _RUN.match(text, slash.end())
        run = token.group().rstrip(".,'") if token else ""
        return _scaled(text, slash.end() + len(run), _ratio(value, _decimal(run)))
    return _scaled(text, end, value)


def _scaled(text: str, end: int, value: Fraction | None) -> Reading:
    power = 0
    if exponent := _EXPONENT.match(text, end):
        power, end = int(exponent[1] or exponent[2]), exponent.end()
    elif word := _SCALE.match(text, end):
        power, end = _SCALES[word[1].lower()], word.end()
    if percent := _PERCENT.match(text, end):
        end = percent.end()
    if abs(power) > MAX_DIGITS:
        return Reading(None, end)
    return Reading(None if value is None else _capped(value * Fraction(10) ** power), end)


def _decimal(run: str) -> Fraction | None:
    """Parse digits with their separators; None where these make no number, or one with too many digits."""
    run, sign = run.lstrip("-"), -1 if run.startswith("-") else 1
    if len(run) > _LONGEST:
        return None
    if _PLAIN.fullmatch(run):
        plain = run
    elif _COMMAS.fullmatch(run):
        plain = run.replace(",", "")
    elif _APOSTROPHES.fullmatch(run):
        plain = run.replace("'", "")
    elif _DOTS.fullmatch(run):
        plain = run.replace(".", "").replace(",", ".")
    else:
        return None
    if sum(character.isdecimal() for character in plain) > MAX_DIGITS:
        return None
    return sign * Fraction(plain)


def _ratio(top: Fraction | None, bottom: Fraction | None) -> Fraction | None:
    return None if top is None or not bottom else _capped(top / bottom)


def _plus(integer: Fraction | None, part: Fraction | None) -> Fraction | None:
    """Add a proper fraction to a whole number; None where either is something else."""
    if integer is None or part is None or integer.denominator != 1 or not 0 <= part < 1:
        return None
    return integer + part


def _capped(value: Fraction) -> Fraction | None:
    limit: int = 10**MAX_DIGITS
    return value if abs(value.numerator) < limit and value.denominator < limit else None
