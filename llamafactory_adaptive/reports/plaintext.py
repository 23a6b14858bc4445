"""Escaping of untrusted text for the place where it is shown: a terminal, Markdown, a plot.

Names in plans, adapters and error messages may come from files that somebody else wrote. Control characters could move
the cursor or recolour a terminal, right-to-left marks reorder a line, and markup could become links; all of these are
turned into visible characters.
"""

import re
import sys


LONGEST = 160
_IN_MARKDOWN = re.compile(r"[^\w \-]")


def plain(text: str, longest: int = LONGEST) -> str:
    """Format ``text`` as one line: characters that do not print are escaped, and what is too long is cut."""
    shown = "".join(letter if letter.isprintable() else _escape(letter) for letter in text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}..."


def plain_lines(text: str) -> str:
    """Format a message of several lines: line ends stay, all other characters that do not print are escaped."""
    return "\n".join(plain(line, len(line)) for line in text.split("\n"))


def tell(text: str) -> None:
    """Print a message to standard error at once, under the program's name."""
    print(f"llamafactory-adaptive: {plain_lines(text)}", file=sys.stderr, flush=True)


def markdown(text: str) -> str:
    """Escape ``text`` for Markdown: letters, digits, blanks, ``_`` and ``-`` stay, all else becomes references.

    In CommonMark a character reference has no structure: it never opens a link, a tag, a comment or a table cell.
    """
    return _IN_MARKDOWN.sub(lambda character: f"&#{ord(character[0])};", plain(text))


def plot_label(text: str, longest: int = 40) -> str:
    """Escape ``text`` for matplotlib, where a pair of ``$`` would enclose a formula."""
    return plain(text, longest).replace("$", r"\$")


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
