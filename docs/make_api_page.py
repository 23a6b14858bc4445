"""Write docs/python-api.md from the docstrings of the public names: ``python docs/make_api_page.py``."""

import inspect
import re
import textwrap
from pathlib import Path

import llamafactory_adaptive
from llamafactory_adaptive.api.plans import PrintablePlan
from llamafactory_adaptive.api.scoring import ModuleScores
from llamafactory_adaptive.api.search import RankSearch
from llamafactory_adaptive.ranks.plan import RankPlan


PAGE = Path(__file__).with_name("python-api.md")
QUOTES = "\"'"
STATIC = ("calibration_batches", "score_modules", "plan_ranks", "attach_adapter", "lora_config", "check_adapter")
HEAD = """# Python API

Made by `docs/make_api_page.py` from the docstrings; change them there.

For users of PEFT, TRL and the plain `transformers.Trainer`. LLaMA-Factory is not needed: `pip install .` brings the
core alone, for torch 2.6, transformers 5.5 and PEFT 0.18 or newer. Runnable scripts:
[`examples/python`](../examples/python).

## Ranks before training

```python
from llamafactory_adaptive import attach_adapter, calibration_batches, check_adapter, plan_ranks, score_modules

batches = calibration_batches(rows, batch_size=8, pad_id=tokenizer.pad_token_id)  # rows: input_ids, labels
scores = score_modules(model, batches, method="sensitivity", transform="log")
plan = plan_ranks(scores, lora_rank=16)
print(plan.table())

model = attach_adapter(model, plan)         # or SFTTrainer(..., peft_config=lora_config(plan))
trainer = SFTTrainer(model=model, ...)      # any trainer
trainer.train()
trainer.save_model("out")
check_adapter("out", plan)
```

## Ranks while training

```python
from transformers import Trainer
from llamafactory_adaptive import rank_search

search = rank_search(model, method="igu", lora_rank=16)
trainer = search.trainer(Trainer)(model=search.model, args=args, train_dataset=rows, callbacks=[search.callback])
trainer.train()
trainer.save_model("out")
plan = search.finalize("out")
```

## With your own optimizer, loss or launcher

A plan fixes the ranks before training, so a model from `attach_adapter` trains under anything that trains a PEFT
model. Where this package is not installed, an `adapter_config.json` is enough, which
`lora_config(plan).save_pretrained(folder)` writes, and for a YAML
[`plan --peft`](how-to.md#train-the-ranks-in-another-trainer-or-in-pefts-benchmark). A search takes part in training,
and what it cannot work with is refused before the first step:

* **Optimizers.** The Trainer must make the optimizer (`optim=...`, `optimizer_cls_and_kwargs=...` or your own
  `create_optimizer`), as the search adds parameters to the adapter when the Trainer is built. Some
  searches also change the optimizer's states: `method="tsq"` for components that come back, `method="igu"` with
  `returns="zero"` or, with `importance="shrink"`, `mend_strength=True`. These
  need Adam, AdamW, NAdam, RAdam, SGD, Adagrad or RMSprop of torch, FusedAdam of apex, or Adam, AdamW or Lion of
  bitsandbytes, or a class derived from one of these.
* **Losses.** Any loss can be trained. Only `importance="integrated"` makes extra passes, which use the loss that
  the model itself returns: a Trainer with its own `compute_loss` or `compute_loss_func` is refused, TRL's
  `SFTTrainer` with its default loss is not. The other kinds of `importance` follow the gradients of whatever loss
  is trained.
* **Several processes.** Run the same script under `torchrun` or `accelerate launch`; every process calls
  `trainer.save_model` and `search.finalize`. FSDP 1, and several GPUs in one process, are refused.
* **DeepSpeed**, by `deepspeed=...` or by `accelerate launch --use_deepspeed`: the same rules hold for both ways.
  `importance="integrated"` needs ZeRO-2 or less; searches that change the optimizer's states, see above, need
  ZeRO.
* **4- and 8-bit bases** of bitsandbytes are scored, planned and searched as they are.

A wrong argument is one `AdaptiveConfigError` (`llamafactory_adaptive.errors`) that names each argument, its value,
what is allowed and a value to try.
"""


def page() -> str:
    """Build the whole page."""
    parts = [HEAD, "## Functions\n"]
    parts += [entry(getattr(llamafactory_adaptive, name), name) for name in (*STATIC, "rank_search")]
    parts.append("## What they return\n")
    parts += [
        entry(ModuleScores, "ModuleScores", ("score",)),
        entry(RankPlan, "RankPlan", ("ranks", "budget", "save")).rstrip() + "\n",
        member(PrintablePlan.table, "table"),
        entry(RankSearch, "RankSearch", ("plan", "trainer", "finalize")),
    ]
    return "\n".join(parts)


def entry(thing: object, name: str, members: tuple[str, ...] = ()) -> str:
    """Write one function or class, its docstring turned into Markdown."""
    shown = "" if inspect.isclass(thing) else f"```python\n{name}{signature(thing)}\n```\n\n"
    text = f"### `{name}`\n\n{shown}{markdown(inspect.getdoc(thing) or '')}\n"
    return "\n".join([text, *(member(inspect.getattr_static(thing, each), each) for each in members)])


def member(thing: object, name: str) -> str:
    """Write a method or property of a class."""
    head = f"`.{name}`" if isinstance(thing, property) else f"`.{name}{signature(thing)}`".replace("self, ", "", 1)
    return f"#### {head.replace('(self)', '()')}\n\n{markdown(inspect.getdoc(thing) or '')}\n"


def signature(thing: object) -> str:
    """Write arguments and result without the modules of their types, one argument a line where they are many."""
    inspected = inspect.signature(thing)  # type: ignore[arg-type]
    arguments = [bare(str(each)) for each in inspected.parameters.values()]
    result = f" -> {bare(inspect.formatannotation(inspected.return_annotation)).strip(QUOTES)}"
    one_line = f"({', '.join(arguments)}){result}"
    return one_line if len(one_line) < 90 else "(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def bare(text: str) -> str:
    """Cut the modules off type names, and the ``~`` off type variables."""
    return re.sub(r"(?:\w+\.)+([A-Za-z_]\w*)", r"\1", text.replace("~", ""))


def markdown(doc: str) -> str:
    """Turn a Google docstring into Markdown: sections become bold words, their entries lists."""
    doc = re.sub(r":(?:func|meth|class):`~?([\w.]+)`", r"`\1`", doc).replace("``", "`")
    blocks = re.split(r"^(Args|Attributes|Returns|Raises):$", doc, flags=re.MULTILINE)
    text = blocks[0].strip()
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        lines = textwrap.dedent(body.strip("\n")).rstrip().split("\n")
        listed = title != "Returns"
        joined: list[str] = []
        for line in lines:
            if line.startswith(" ") or (joined and not listed):
                joined[-1] += " " + line.strip()
            else:
                joined.append(line.strip())
        if listed:
            joined = [re.sub(r"^([\w*, ]+): ", r"* `\1`: ", line) for line in joined]
        text += f"\n\n**{title}**\n\n" + "\n".join(joined)
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
