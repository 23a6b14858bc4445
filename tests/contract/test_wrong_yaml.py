"""Every kind of wrong setting: one clear message that names key, value, allowed range and a value to try."""

import json
from pathlib import Path

import pytest

from llamafactory_adaptive import _bootstrap
from llamafactory_adaptive.errors import AdaptiveConfigError
from tests.helpers.tiny import settings


_bootstrap.install()
from llamafactory_adaptive.bridge.arguments import our_keys, to_mapping  # noqa: E402
from llamafactory_adaptive.bridge.validation import parse_config  # noqa: E402
from llamafactory_adaptive.methods import methods  # noqa: E402


ZERO3 = str(Path(__file__).parents[2] / "examples" / "deepspeed" / "ds_z3_config.json")
IGU = {"adaptive_method": "igu", "adaptive_calibration_samples": None, "adaptive_calibration_batch_size": None}
WRONG = [
    ({"adaptive_methd": "igu"}, "adaptive_methd: 'igu' is invalid: neither LLaMA-Factory nor this plugin has such a key; "
     "try adaptive_method"),
    ({"learning_rat": 1.0}, "learning_rat: 1.0 is invalid: neither LLaMA-Factory nor this plugin has such a key; try "
     "learning_rate"),
    ({"adaptive_method": "sensitvity"}, "adaptive_method: 'sensitvity' is invalid: must be one of "
     f"{', '.join(sorted(methods()))}; try adaptive_method: sensitivity"),
    ({"adaptive_budget_unit": "parms"}, "adaptive_budget_unit: 'parms' is invalid: must be one of params, ranks; "
     "try adaptive_budget_unit: params"),
    ({"adaptive_min_rank": -1}, "adaptive_min_rank: -1 is invalid: must be at least 0; try adaptive_min_rank: 1"),
    ({"adaptive_granularity": "head"}, "adaptive_granularity: 'head' is invalid: must be one of module, type, layer"),
    ({"adaptive_granularity": "type", **IGU}, "adaptive_method: igu chooses components one by one "
     "while it trains; try leaving it out, or adaptive_method: sensitivity"),
    ({"adaptive_init": "eva", **IGU}, "adaptive_init: 'eva' is invalid: adaptive_method: igu starts the factors that "
     "it trains by itself; try adaptive_init: default, or adaptive_method: sensitivity"),
    ({**IGU, "adaptive_method": "svd", "adaptive_interval": 5}, "adaptive_interval: 5 is invalid: adaptive_method: svd "
     "cuts the ranks once, where adaptive_final_ratio says; try leaving it out, or adaptive_method: igu"),
    ({**IGU, "adaptive_method": "svd", "optim": "adafactor"}, "optim: 'adafactor' is invalid: the rotation of the "
     "factors at the cut needs fresh optimizer states, and where this optimizer keeps them per weight is not known"),
    ({**IGU, "adaptive_method": "elalora", "optim": "adafactor"}, "optim: 'adafactor' is invalid: new components need "
     "fresh optimizer states, and where this optimizer keeps them per weight is not known"),
    ({"adaptive_method": "by_type"}, "by_type_ranks: '' is invalid: must be types and numbers from 0 on, type:number, "
     "each type once, with commas between them; try by_type_ranks: q_proj:4,down_proj:16"),
    ({"adaptive_min_rank": 5}, "adaptive_min_rank: 5 is invalid: must be at most lora_rank (4), or the budget is "
     "overspent; try adaptive_min_rank: 1"),
    ({"adaptive_max_rank": 3}, "adaptive_max_rank: 3 is invalid: must be at least lora_rank (4), or the budget "
     "cannot be spent; try adaptive_max_rank: 16"),
    ({"adaptive_max_rank": "many"}, "adaptive_max_rank: 'many' is invalid: must be a whole number, at least 1; "
     "try leaving adaptive_max_rank out"),
    ({"adaptive_calibration_samples": 2.5}, "adaptive_calibration_samples: 2.5 is invalid: must be a whole "
     "number, between 1 and 1,000,000; try adaptive_calibration_samples: 128"),
    ({"lora_rank": 0}, "lora_rank: 0 is invalid: must be a whole number of at least 1; try lora_rank: 8"),
    ({"lora_alpha": "big"}, "lora_alpha: 'big' is invalid: must be a whole number of at least 1; try "
     "lora_alpha: 8"),
    ({"sensitivity_classes": 4, "sensitivity_allocation": "pra"}, "sensitivity_classes: 4 is invalid: must be "
     "an odd number between 1 and 99; try sensitivity_classes: 3"),
    ({"sensitivity_energy": "nan"}, "sensitivity_energy: 'nan' is invalid: must be a number, between 1e-06 and 1; "
     "try sensitivity_energy: 0.85"),
    ({"adaptive_method": "uniform", "sensitivity_energy": 0.9}, "sensitivity_energy: 0.9 is invalid: it belongs to "
     "adaptive_method: sensitivity, and this run uses uniform; try adaptive_method: sensitivity"),
    ({"adaptive_plan": "/no/such/plan.json"}, "adaptive_plan: '/no/such/plan.json' is invalid: there is no such "
     "file; try writing one with `llamafactory-adaptive plan`"),
    ({"adaptive_calibration_dataset": "nope"}, "adaptive_calibration_dataset: 'nope' is invalid: it is not in"),
    ({"adaptive_calibration_dataset": "tiny_test_split"}, "its split is 'test'; scores may use training data only"),
    ({"adaptive_calibration_dataset": "tiny_eval", "eval_dataset": "tiny_eval"}, "adaptive_calibration_dataset: "
     "'tiny_eval' is invalid: it is the eval_dataset; scores may use training data only"),
    ({"use_dora": True}, "use_dora: True is invalid: DoRA magnitudes are not served right at mixed ranks; try "
     "use_dora: false"),
    ({"use_rslora": True}, "use_rslora: True is invalid: rsLoRA scales by sqrt(rank)"),
    ({"use_unsloth": True}, "use_unsloth: True is invalid: Unsloth takes one rank for all modules"),
    ({"pissa_init": True}, "pissa_init: True is invalid: PiSSA changes the base weights per rank"),
    ({"stage": "ppo"}, "stage: 'ppo' is invalid: ranks are planned for pt, sft, rm, dpo and kto; try stage: dpo"),
    ({"quantization_bit": 3}, "quantization_bit: 3 is invalid: bitsandbytes knows 4 and 8; try quantization_bit: 4"),
    ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_method: 'hqq' is invalid: only "
     "bitsandbytes quantisation is supported; try quantization_method: bnb"),
    ({"model_name_or_path": "/no/such/model"}, "model_name_or_path: '/no/such/model' is invalid: there is no such "
     "folder; try a folder or a hub name"),
    ({"dataset": None}, "dataset: None is invalid: training needs one"),
    ({"dataset": "tiny_sft,nope"}, "dataset: 'nope' is invalid: it is not in"),
    ({"eval_dataset": "nope"}, "eval_dataset: 'nope' is invalid: it is not in"),
    ({"dataset": "tiny_lost"}, "dataset: 'tiny_lost' is invalid: its file"),
    ({"dataset_dir": "/nowhere"}, "dataset_dir: '/nowhere' is invalid: there is no /nowhere/dataset_info.json"),
    ({"template": "lama3"}, "template: 'lama3' is invalid: LLaMA-Factory has no such template; try template: llama3"),
    ({"deepspeed": "/no/such.json"}, "deepspeed: '/no/such.json' is invalid: there is no such file"),
    ({"stage": "sftt"}, "stage: 'sftt' is invalid: must be one of pt, sft, rm, ppo, dpo, kto; try stage: pt"),
    ({"fsdp": "full_shard", "fsdp_config": {"version": 2}}, "fsdp_state_dict_type: None is invalid: sharded checkpoints"),
    ({"adapter_name_or_path": "x", "create_new_adapter": True, "quantization_bit": 4}, "create_new_adapter: True is "
     "invalid: the old adapter cannot be merged into a quantised base or under ZeRO-3"),
    ({"adaptive_interval": 5}, "adaptive_interval: 5 is invalid: adaptive_method: sensitivity fixes ranks before "
     "training and prunes nothing; try leaving it out, or adaptive_method: igu"),
    ({"adaptive_best_model_from": "final"}, "adaptive_best_model_from: 'final' is invalid: adaptive_method: sensitivity "
     "fixes ranks before training, so every evaluation counts; try leaving it out, or adaptive_method: igu"),
    ({**IGU, "adaptive_best_model_from": "end"}, "adaptive_best_model_from: 'end' is invalid: must be one of final, "
     "start; try adaptive_best_model_from: "),
    ({**IGU, "adaptive_calibration_samples": 8}, "adaptive_calibration_samples: 8 is invalid: adaptive_method: igu "
     "finds ranks during training and calibrates nothing; try leaving it out, or adaptive_method: sensitivity"),
    ({**IGU, "igu_second_stage": "lora"}, "igu_second_stage: 'lora' is invalid: it is read only where adaptive_plan "
     "gives the ranks; try leaving igu_second_stage out, or adaptive_plan: <path>"),
    ({**IGU, "adaptive_init_rank": 4}, "adaptive_init_rank: 4 is invalid: the start must be over-ranked: above "
     "lora_rank (4), at most adaptive_max_rank (16); try adaptive_init_rank: 8"),
    ({**IGU, "adaptive_init_rank": 17}, "adaptive_init_rank: 17 is invalid: the start must be over-ranked"),
    ({**IGU, "adaptive_max_rank": 4}, "adaptive_max_rank: 4 is invalid: the start must be over-ranked: above "
     "lora_rank (4), at most adaptive_max_rank (4); try adaptive_max_rank: 8"),
    ({**IGU, "adaptive_warmup_ratio": 0.8}, "adaptive_warmup_ratio: 0.8 is invalid: with adaptive_final_ratio 0.3 "
     "it leaves no step to prune in; try adaptive_warmup_ratio: 0.35"),
    ({**IGU, "adaptive_interval": 0}, "adaptive_interval: 0 is invalid: must be at least 1; try "
     "adaptive_interval: 10"),
    ({**IGU, "adaptive_interval": 5, "adaptive_interval_epochs": 0.2}, "adaptive_interval_epochs: 0.2 is invalid: "
     "adaptive_interval (5) says the same in steps, and only one of both can hold; try leaving adaptive_interval out"),
    ({**IGU, "adaptive_interval_epochs": 0}, "adaptive_interval_epochs: 0 is invalid: must be between 0.001 and 100; "
     "try leaving adaptive_interval_epochs out"),
    ({**IGU, "adaptive_interval_epochs": 0.2, "streaming": True, "max_steps": 9}, "adaptive_interval_epochs: 0.2 is "
     "invalid: a stream has no known length, so the steps of an epoch are not known; try adaptive_interval: 10 in its "
     "place, or streaming: false"),
    ({"adaptive_interval_epochs": 0.2}, "adaptive_interval_epochs: 0.2 is invalid: adaptive_method: sensitivity fixes "
     "ranks before training and prunes nothing; try leaving it out, or adaptive_method: igu"),
    ({**IGU, "adaptive_max_overhead": 0.2}, "adaptive_max_overhead: 0.2 is invalid: only igu_importance: integrated "
     "makes extra passes that could be thinned out; try leaving it out"),
    ({**IGU, "igu_importance": "shrnk"}, "must be one of shrink, integrated, off; try igu_importance: shrink"),
    ({**IGU, "adapter_name_or_path": "x"}, "adapter_name_or_path: 'x' is invalid: ranks are found on a new "
     "adapter, whose live tensors are larger than the old one's; try create_new_adapter: true"),
    ({**IGU, "torch_compile": True}, "torch_compile: True is invalid: masks and path positions change"),
    ({**IGU, "auto_find_batch_size": True, "deepspeed": ZERO3}, "is invalid: a search that begins anew with smaller"),
    ({**IGU, "auto_find_batch_size": True, "ray_num_workers": 2}, "auto_find_batch_size: false, or one process"),
    ({**IGU, "igu_importance": "integrated", "stage": "dpo"}, "stage: 'dpo' is invalid: extra passes need the loss "
     "that the model itself returns; try igu_importance: shrink"),
    ({**IGU, "igu_importance": "integrated", "use_dft_loss": True}, "use_dft_loss: True is invalid: extra passes use "
     "the model's own loss; try igu_importance: shrink"),
    ({**IGU, "igu_importance": "integrated", "deepspeed": ZERO3}, "ds_z3_config.json' is invalid: extra "
     "passes need whole weights on every process"),
    ({"val_size": 0.5, "dataset": "tiny_sft,tiny_eval", "adaptive_calibration_dataset": "tiny_eval"}, "val_size holds "
     "rows of the merged training set out"),
]  # fmt: skip


def message(args):
    with pytest.raises(AdaptiveConfigError) as caught:
        parse_config(args)
    return str(caught.value)


@pytest.mark.parametrize(("change", "expected"), WRONG, ids=[list(change)[-1] for change, _ in WRONG])
def test_one_wrong_setting_is_one_clear_message(change, expected, tiny_llama, data_dir, tmp_path):
    text = message(settings(tiny_llama, data_dir, tmp_path / "out", **change))
    assert expected in text
    assert "\n" not in text
    assert not (tmp_path / "out").exists()


def test_all_problems_come_at_once_and_numbered(tiny_llama, data_dir, tmp_path):
    text = message(settings(tiny_llama, data_dir, tmp_path, adaptive_min_rank=-1, use_dora=True, lora_rnk=3,
                            sensitivity_metric="bth"))  # fmt: skip
    assert text.startswith("4 problems in the configuration:\n  1. lora_rnk: ")
    assert "try sensitivity_metric: both" in text
    assert [line.strip()[:2] for line in text.splitlines()[1:]] == ["1.", "2.", "3.", "4."]


def test_a_target_that_matches_nothing_names_what_would(tiny_llama, data_dir, tmp_path):
    from llamafactory_adaptive.bridge.target_shapes import target_shapes

    args = settings(tiny_llama, data_dir, tmp_path, lora_target="W_pack")
    with pytest.raises(AdaptiveConfigError, match=r"no module of the model has such a name; try lora_target: all, or "
                                                  r"some of down_proj,gate_proj"):  # fmt: skip
        target_shapes(args)
    with pytest.raises(
        AdaptiveConfigError, match=r"embed_tokens is a Embedding, not a linear layer.*additional_target"
    ):
        target_shapes({**args, "lora_target": "q_proj,embed_tokens"})


def test_defaults_and_values_of_a_right_yaml(tiny_llama, data_dir, tmp_path):
    config = parse_config(settings(tiny_llama, data_dir, tmp_path, seed=7, sensitivity_energy="0.9", lora_alpha=12))
    assert (config.method, config.budget_unit, config.min_rank, config.max_rank) == ("sensitivity", "params", 1, 16)
    assert config.options["energy"] == 0.9
    assert config.options["top_fraction"] == 0.5
    assert config.scale == 3.0
    assert config.calibration.seed == 7


def test_command_line_flags_mean_the_same_as_yaml():
    words = ["--finetuning_type", "adaptive", "--lora_rank", "6", "--adaptive_min_rank=2", "--do_train", "True",
             "--sensitivity_metric", "local", "--model_name_or_path", "x", "--output_dir", "y"]  # fmt: skip
    mapping = to_mapping(words)
    assert mapping["finetuning_type"] == "adaptive"
    assert (mapping["lora_rank"], mapping["adaptive_min_rank"], mapping["sensitivity_metric"]) == (6, 2, "local")
    assert "lora_alpha" not in mapping


def test_flags_that_nobody_has_are_named_and_abbreviations_are_no_flags():
    for flag in ("--adaptve_method", "--adaptive_meth", "--lora_ran"):
        with pytest.raises(AdaptiveConfigError, match="neither LLaMA-Factory nor this plugin has such a key"):
            to_mapping(["--finetuning_type", "adaptive", flag, "uniform"])


def test_a_value_is_no_key():
    words = ["--finetuning_type", "lora", "--output_dir", "adaptive_baseline", "--dataset", "adaptive_set"]
    assert our_keys(words) == []
    assert our_keys([*words, "--adaptive_method", "igu"]) == ["adaptive_method"]


def test_text_booleans_mean_booleans():
    assert to_mapping({"create_new_adapter": "false", "do_train": "True", "x": "falsehood"}) == {
        "create_new_adapter": False, "do_train": True, "x": "falsehood",
    }  # fmt: skip


def test_what_upstream_accepts_is_not_refused(tiny_llama, data_dir, tmp_path, monkeypatch):
    for change in (
        {"val_size": 0.2, "dataset": "tiny_sft,tiny_eval", "adaptive_calibration_dataset": "tiny_eval,tiny_sft"},
        {"adaptive_calibration_dataset": "tiny_test_split", "dataset": "tiny_test_split"},
        {"report_to": ["none"], "lr_scheduler_type": "cosine", "optim": "adamw_torch", "ddp_timeout": 180000000},
        {
            "resume_from_checkpoint": None,
            "eval_strategy": "no",
            "flash_attn": "sdpa",
            "fsdp": "",
            "quantization_bit": 4,
        },
        {"dataset": ["tiny_sft", "tiny_eval"], "lora_target": ["q_proj", "v_proj"]},
        {"dataset_dir": "ONLINE", "dataset": "some/hub"},
        {"dataset_dir": {"inline": {"hf_hub_url": "a/b"}}, "dataset": "inline"},
    ):
        assert parse_config(settings(tiny_llama, data_dir, tmp_path, **change)).lora_rank == 4
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    assert to_mapping(["--lora_rank", "3", "--from_a_wrapper", "1"]) == {"lora_rank": 3}


def test_the_output_folder_is_the_hosts(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_mapping({"output_dir": "~/saves"})["output_dir"] == str(tmp_path / "saves")


def test_zero_is_a_seed(tiny_llama, data_dir, tmp_path):
    assert parse_config(settings(tiny_llama, data_dir, tmp_path, seed=0)).calibration.seed == 0


def test_a_broken_dataset_table_and_an_unwritable_cache_are_user_errors(tiny_llama, tmp_path, monkeypatch):
    (tmp_path / "dataset_info.json").write_text('{"a": 1,}')
    assert "is not valid JSON" in message(settings(tiny_llama, tmp_path, tmp_path / "out"))
    from llamafactory_adaptive.planning.cache import cache_folder

    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLAMAFACTORY_ADAPTIVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(AdaptiveConfigError, match=r"LLAMAFACTORY_ADAPTIVE_CACHE: .*the cache cannot be written"):
        cache_folder()


TABLE = {"known": {"hf_hub_url": "me/rows"}, "held_out": {"hf_hub_url": "me/rows", "split": "test"},
         "local": {"file_name": "sft.json"}, "text": "sft.json"}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            {"dataset": "known,lost"},
            "dataset: 'lost' is invalid: it is not in dataset_dir; try one of held_out, known",
        ),
        ({"eval_dataset": "lost"}, "eval_dataset: 'lost' is invalid: it is not in dataset_dir"),
        (
            {"adaptive_calibration_dataset": "lost"},
            "adaptive_calibration_dataset: 'lost' is invalid: it is not in",
        ),
        ({"adaptive_calibration_dataset": "held_out"}, "its split is 'test'; scores may use training data only"),
        ({"dataset": "local"}, "dataset: 'local' is invalid: its entry in dataset_dir names nothing on a hub"),
        ({"dataset": "text"}, "dataset: 'text' is invalid: its entry in dataset_dir is no mapping"),
        ({"dataset_dir": {}}, "dataset: 'known' is invalid: it is not in dataset_dir; try an entry for it there"),
    ],
)
def test_a_table_of_data_sets_in_the_settings_themselves(change, said, tiny_llama, tmp_path):
    given = settings(tiny_llama, tmp_path, tmp_path / "out") | {"dataset": "known", "dataset_dir": TABLE}
    parse_config(given)
    assert said in message(given | change)


def test_the_digest_follows_weights_data_and_tokenised_folders(tiny_llama, data_dir, tmp_path):
    from llamafactory_adaptive.bridge.fingerprint import identity

    args = settings(tiny_llama, data_dir, tmp_path)
    assert identity(args) == identity({**args, "output_dir": "x", "learning_rate": 3.0})
    assert identity(args) != identity({**args, "dataset": "tiny_eval"})
    assert identity(args) != identity({**args, "quantization_bit": 4})
    folder = tmp_path / "tokens" / "train"
    folder.mkdir(parents=True)
    tokenized, digests = {**args, "tokenized_path": str(folder.parent)}, []
    for text in ("a", "b"):
        (folder / "data.arrow").write_text(text)
        digests.append(identity(tokenized))
    assert digests[0] != digests[1]


def test_help_names_unit_and_range():
    import dataclasses

    from llamafactory_adaptive.bridge.arguments import adaptive_finetuning_arguments

    fields = {entry.name: entry for entry in dataclasses.fields(adaptive_finetuning_arguments())}
    assert "Allowed: one of params, ranks." in fields["adaptive_budget_unit"].metadata["help"]
    assert "Unit: samples." in fields["adaptive_calibration_samples"].metadata["help"]
    assert json.dumps(fields["sensitivity_energy"].default) == "0.85"
