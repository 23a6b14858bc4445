"""Sentences of pages."""


def says(document, sentence):
    """Whether a page holds a sentence, wherever its lines are broken."""
    return sentence in " ".join(document.split())
