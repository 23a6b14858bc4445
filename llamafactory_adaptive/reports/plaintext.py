"""Text from elsewhere, made harmless for the place a person reads it in: a terminal, Markdown, a plot.

Names in plans, adapters and error messages may come from files that somebody else wrote. Control characters could move
the cursor or recolour a terminal, right-to-left marks reorder a line, markup turn into links; here all of them become
visible characters.
"""

import re
import sys


LONGEST = 160
_IN_MARKDOWN = re.compile(r"[^\w \-]")


def plain(text: str, longest: int = LONGEST) -> str:
    """Show ``text`` on one line: what does not print appears as its escape, what is too long is cut."""
    shown = "".join(letter if letter.isprintable() else _escape(letter) for letter in text[: longest + 1])
    return shown if len(text) <= longest else f"{shown[:longest]}..."


def plain_lines(text: str) -> str:
    """Show a message of several lines; line ends stay, everything else that does not print appears as its escape."""
    return "\n".join(plain(line, len(line)) for line in text.split("\n"))


def tell(text: str) -> None:
    """Say something to the user at once, on standard error and under the program's name."""
    print(f"llamafactory-adaptive: {plain_lines(text)}", file=sys.stderr, flush=True)


def markdown(text: str) -> str:
    """Write ``text`` for Markdown: letters, digits, blanks, ``_`` and ``-`` as they are, the rest as references.

    CommonMark gives a character reference no structure: it never opens a link, a tag, a comment or a table cell.
    """
    return _IN_MARKDOWN.sub(lambda character: f"&#{ord(character[0])};", plain(text))


def plot_label(text: str, longest: int = 40) -> str:
    """Write ``text`` for matplotlib, where a pair of ``$`` would begin a formula."""
    return plain(text, longest).replace("$", r"\$")


def _escape(letter: str) -> str:
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
