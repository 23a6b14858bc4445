"""Docstrings begin with a verb in the imperative: "Return the largest rank.", not "The largest rank."."""

import ast

from tests.helpers.processes import ROOT


ROOTS = ("llamafactory_adaptive", "eval")
FEWEST_WORDS = 4
# With these the docstring of a function, method or property may begin, in alphabetical order.
VERBS = [
    "Add",
    "Adjust",
    "Allocate",
    "Answer",
    "Append",
    "Apply",
    "Ask",
    "Attach",
    "Average",
    "Back-propagate",
    "Begin",
    "Bind",
    "Build",
    "Call",
    "Check",
    "Choose",
    "Claim",
    "Clear",
    "Close",
    "Collect",
    "Combine",
    "Compare",
    "Complete",
    "Compute",
    "Convert",
    "Copy",
    "Count",
    "Create",
    "Cut",
    "Declare",
    "Decode",
    "Describe",
    "Distribute",
    "Divide",
    "Do",
    "Draw",
    "Drop",
    "Encode",
    "End",
    "Escape",
    "Estimate",
    "Extend",
    "Fetch",
    "Fill",
    "Find",
    "Flush",
    "Format",
    "Forward",
    "Gather",
    "Generate",
    "Give",
    "Group",
    "Handle",
    "Hash",
    "Identify",
    "Import",
    "Index",
    "Interrupt",
    "Join",
    "Keep",
    "Kill",
    "List",
    "Load",
    "Lock",
    "Look",
    "Lower",
    "Make",
    "Map",
    "Mark",
    "Measure",
    "Merge",
    "Move",
    "Multiply",
    "Observe",
    "Open",
    "Pad",
    "Pair",
    "Parse",
    "Pass",
    "Plot",
    "Print",
    "Provide",
    "Put",
    "Quantise",
    "Raise",
    "Read",
    "Recommend",
    "Reduce",
    "Refuse",
    "Register",
    "Remove",
    "Rename",
    "Replace",
    "Reset",
    "Resolve",
    "Restart",
    "Restore",
    "Restrict",
    "Return",
    "Rewrite",
    "Rotate",
    "Round",
    "Run",
    "Save",
    "Scale",
    "Score",
    "Select",
    "Send",
    "Set",
    "Shuffle",
    "Spell",
    "Split",
    "Start",
    "Stop",
    "Store",
    "Strip",
    "Suggest",
    "Sum",
    "Summarise",
    "Tell",
    "Terminate",
    "Tokenise",
    "Update",
    "Validate",
    "Verify",
    "Wait",
    "Warn",
    "Wrap",
    "Write",
    "Yield",
]


def docstrings(*kinds):
    """Yield the words of every docstring of these kinds of nodes, with its file, line and first line."""
    for path in (path for root in ROOTS for path in sorted((ROOT / root).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, kinds) and (text := ast.get_docstring(node)):
                location = f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"
                yield text.split(), f"{location}: {text.splitlines()[0]}"


def test_functions_begin_with_a_verb_in_the_imperative():
    functions = list(docstrings(ast.FunctionDef, ast.AsyncFunctionDef))
    assert functions
    other = [shown for words, shown in functions if words[0].rstrip(".,:;") not in VERBS]
    assert not other, "no verb of VERBS is first here:\n" + "\n".join(other)


def test_no_docstring_is_shorter_than_a_sentence():
    every = docstrings(ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    short = [shown for words, shown in every if len(words) < FEWEST_WORDS]
    assert not short, f"fewer than {FEWEST_WORDS} words:\n" + "\n".join(short)


def test_verbs_are_in_order_and_none_is_there_twice():
    assert sorted(set(VERBS)) == VERBS
