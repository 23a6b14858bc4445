"""Every option of ``python -m eval.run``, with its help."""

import argparse
from pathlib import Path

from eval import gates
from eval.protocols import PROTOCOLS, TEMPLATES
from eval.results import RESULTS_FILE
from eval.transport import Patience


DEFAULT_SEED = 1234  # lm-evaluation-harness's own for drawing examples
DEFAULT_TASKS = "gsm8k,boolq,arc_easy,arc_challenge"


def build_parser() -> argparse.ArgumentParser:
    """Build the parser with every option and its help."""
    parser = argparse.ArgumentParser(prog="python -m eval.run", description="Serve models with vLLM and score them.",
                                     allow_abbrev=False)  # fmt: skip
    add = parser.add_argument
    models = parser.add_argument_group("models")
    models.add_argument("--base", required=True, metavar="MODEL", help="folder or hub name; named 'base' in the table")
    for kind, what in (("adapter", "a LoRA adapter of the base"), ("merged", "a merged model; also the form in which "
                       "an adapter of the same NAME takes likelihood tasks on a CPU")):  # fmt: skip
        models.add_argument(f"--{kind}", action="append", default=[], metavar="NAME=DIR", help=what)
    models.add_argument("--base-tokenizer", metavar="NAME|DIR", help="tokenizer and chat template for the base too: "
                        "those of this --adapter or --merged, or of a folder; e.g. --base-tokenizer mine")  # fmt: skip
    models.add_argument("--no-base-row", action="store_true", help="serve the base, but do not ask it; e.g. --adapter "
                        "mine=saves/mine --no-base-row")  # fmt: skip
    add("--tasks", default=DEFAULT_TASKS, help=f"comma separated (default: {DEFAULT_TASKS}; also aqua, copa)")
    add("--protocol", choices=PROTOCOLS, required=True, help="how questions are put and answers read")
    add(
        "--template",
        choices=TEMPLATES,
        default="none",
        help="training: the tokenizer's own chat template; none: raw text",
    )
    add("--limit", type=int, metavar="N", help="only the first N rows of each task")
    add("--seeds", default=str(DEFAULT_SEED), help=f"comma separated, for drawing examples (default: {DEFAULT_SEED})")
    _add_settings(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data-dir", type=Path, metavar="DIR", help="DIR/TASK/SPLIT.jsonl in place of the hub")
    data.add_argument("--split", default="dev", help="file of --data-dir that is scored (default: dev)")
    data.add_argument("--train-file", type=Path, action="append", default=[], metavar="FILE",
                      help="refuse rows that stand in this training or calibration file")  # fmt: skip
    data.add_argument("--plan", type=Path, metavar="FILE", help="the same for the calibration data a rank plan names")
    data.add_argument("--dataset-dir", type=Path, metavar="DIR", help="folder of the dataset_info.json of --plan")
    server = parser.add_argument_group("server")
    server.add_argument("--base-url", metavar="URL", help="a server that runs already; it is left running")
    server.add_argument("--port", type=int, help="port of our server (default: a free one)")
    server.add_argument("--dtype", help="of our server (default: float32 on a CPU, else the model's own)")
    server.add_argument("--startup-timeout", type=float, default=900.0, metavar="SECONDS")
    server.add_argument("--server-args", default="", metavar="WORDS", help="further words for vLLM's command line, "
                        "e.g. --server-args=\"--tensor-parallel-size 2\"")  # fmt: skip
    server.add_argument("--concurrency", type=int, default=64, metavar="N", help="requests under way at a time")
    server.add_argument("--request-timeout", type=float, default=Patience.seconds, metavar="SECONDS", help="for one "
                        "answer (default: 3600), e.g. --request-timeout 600")  # fmt: skip
    server.add_argument("--max-retries", type=int, default=Patience.retries, metavar="N", help="how often a question "
                        "is asked again when the server is busy or fails (default 5), e.g. 8")  # fmt: skip
    add("--out", type=Path, required=True, metavar="DIR", help=f"folder for {RESULTS_FILE}, table, chart and logs; a "
        "run that was broken off there goes on with the same command")  # fmt: skip
    add("--strip-thinking", action="store_true", help="drop <think> blocks before an answer is read")
    gates.add_arguments(parser)
    add("--log-samples", action="store_true", help="also write samples.jsonl: every prompt, answer and metric")
    return parser


def _add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("how questions are put and answers made")
    add = group.add_argument
    add("--num-fewshot", type=int, metavar="N", help="examples before each question, in place of each task's own "
        "number, e.g. --num-fewshot 8")  # fmt: skip
    add("--system-prompt", metavar="TEXT", help="system message of the chat template, e.g. --system-prompt 'Answer "
        "briefly.'")  # fmt: skip
    add("--chat-template-kwargs", metavar="JSON", help="what the chat template is told besides, e.g. "
        "--chat-template-kwargs '{\"enable_thinking\": false}'")  # fmt: skip
    add("--max-gen-toks", type=int, metavar="N", help="tokens of an answer at most, in place of each task's own "
        "number, e.g. --max-gen-toks 2048")  # fmt: skip
    add("--num-beams", type=int, default=1, metavar="N", help="beam search in place of greedy decoding")
    add("--temperature", type=float, default=0.0, metavar="T", help="sample in place of greedy decoding, e.g. "
        "--temperature 0.8")  # fmt: skip
    add("--top-p", type=float, default=1.0, metavar="P", help="of sampling: the likeliest tokens that hold this "
        "share, e.g. --top-p 0.95")  # fmt: skip
    add("--repeats", type=int, default=1, metavar="N", help="ask each question with a generated answer N times, each "
        "with another seed; needs --temperature, e.g. --repeats 16 --temperature 0.8")  # fmt: skip
