"""Questions to a server, without pauses, and answers as servers give them."""

from eval.transport import Asker, Patience, Site


OK = (200, {}, b'{"fine": 1}')


def asked(url, patience=None, key=None, ended=lambda: None):
    """Ask one question; returns the answers, the pauses that were made, and what was asked again."""
    pauses, answers = [], []

    async def sleep(seconds):
        pauses.append(seconds)

    asker = Asker(Site(url, key), "/x", 1, patience or Patience(seconds=20), ended, sleep=sleep)
    asker.ask([{}], lambda _, document: document, lambda _, document: answers.append(document))
    return answers, pauses, dict(asker.repeated)


def logprobs(values=(None, -1, -2, -3), tops=(None, {"a": -1}, {"a": -2}, {"a": -3})):
    tops = None if tops is None else list(tops)
    return {"choices": [{"text": "", "logprobs": {"token_logprobs": list(values), "top_logprobs": tops}}]}
