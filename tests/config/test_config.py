"""Composition of configurations from YAML files and overrides, and their error messages."""

from pathlib import Path

import pytest
import yaml

from tracknet.config import BUILT_IN, Config, compose, config_names, is_override, load_config, save_config
from tracknet.config.errors import suggest_for_flag
from tracknet.errors import UserError


def base(*overrides, training="default"):
    return compose("synthetic", "vit_tiny_heatmap", training, overrides)


@pytest.mark.parametrize("data", config_names("data"))
@pytest.mark.parametrize("model", config_names("model"))
@pytest.mark.parametrize("training", config_names("training"))
def test_every_combination_composes(data, model, training):
    compose(data, model, training)


def test_the_guides_int8_keys_and_defaults():
    training = base(training="int8").training
    q = training.quantization
    assert (q.enabled, q.load_in_8bit, q.llm_int8_threshold, q.llm_int8_has_fp16_weight, q.llm_int8_skip_modules) == (
        True,
        True,
        6.0,
        False,
        [],
    )
    assert (training.batch_size, training.epochs, training.precision) == (16, 20, "fp16")
    assert (training.optimizer.lr, training.scheduler.warmup_epochs) == (3e-4, 2)


def test_the_guides_qlora_keys_and_defaults():
    training = base(training="qlora").training
    q, lora = training.quantization, training.lora
    assert (q.load_in_4bit, q.bnb_4bit_compute_dtype, q.bnb_4bit_use_double_quant, q.bnb_4bit_quant_type) == (
        True,
        "bf16",
        True,
        "nf4",
    )
    assert (
        lora.enabled,
        lora.r,
        lora.lora_alpha,
        lora.target_modules,
        lora.lora_dropout,
        lora.bias,
        lora.task_type,
    ) == (True, 16, 32, [], 0.1, "none", "FEATURE_EXTRACTION")
    assert (training.batch_size, training.epochs, training.precision) == (8, 30, "bf16")
    assert (training.optimizer.lr, training.scheduler.warmup_epochs) == (1e-4, 5)
    assert (
        training.adaptive_micro_batch,
        training.min_micro_batch_size,
        training.mb_backoff_factor,
        training.oom_retries,
    ) == (True, 1, 2, 5)


def test_the_defaults_of_full_fine_tuning():
    training = base().training
    assert (training.batch_size, training.epochs, training.precision, training.grad_clip) == (32, 20, "fp16", 1.0)
    optimizer = training.optimizer
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay) == ("adamw", 5e-4, 0.05)
    assert training.scheduler.name == "cosine" and training.scheduler.warmup_epochs == 3
    assert training.quantization is None and training.lora is None


@pytest.mark.parametrize("training", ["int8", "qlora"])
def test_the_modes_write_out_every_key_of_the_guide(training):
    written = yaml.safe_load((BUILT_IN / "training" / f"{training}.yaml").read_text())
    assert {"gradient_checkpointing", "use_cpu_offload", "use_disk_offload"} <= set(written["memory_optimization"])
    assert {"adaptive_micro_batch", "min_micro_batch_size", "mb_backoff_factor", "oom_retries"} <= set(written)


def test_overrides_reach_their_key_with_its_type():
    config = base("training.optimizer.lr=3e-4", "training.batch_size=8", "data.preprocess.resize=[256,144]")
    assert config.training.optimizer.lr == 3e-4
    assert config.training.batch_size == 8
    assert config.data.preprocess.resize == (256, 144)


def test_null_switches_a_part_off_and_a_key_switches_it_on():
    assert base("training.lora=null", training="qlora").training.lora is None
    assert base("training.lora.r=8").training.lora.r == 8


def test_a_saved_configuration_reloads_equal(tmp_path):
    config = base(
        "data.split.train_games=[1,name]", "data.augment.crop=[256,144]", "training.lora=null", training="qlora"
    )
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


def test_a_folder_of_ones_own_comes_first(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine.yaml").write_text("batch_size: 3\n")
    assert compose("synthetic", "vit_tiny_heatmap", "mine", config_dir=tmp_path).training.batch_size == 3


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.batch_sise=3", ["training.batch_sise", "batch_size"]),
        ("trainig.batch_size=3", ["trainig", "did you mean 'training'"]),
        ("training.batch_size=abc", ["training.batch_size", "Integer"]),
        ("training.batch_size=0", ["training.batch_size", "at least 1"]),
        ("training.precision=fp17", ["training.precision", "fp16", "bf16"]),
        ("training.optimizer.name=sgd", ["training.optimizer.name", "adamw8bit"]),
        ("training.quantization.load_in_8bit=true", ["load_in_8bit", "load_in_4bit"]),
        ("training.lora.r=0", ["training.lora", "r=0"]),
        ("training.mb_backoff_factor=1", ["mb_backoff_factor"]),
        ("data.preprocess.resize=[512]", ["data.preprocess.resize", "a list of 2 numbers"]),
        ("data.preprocess.resize=512", ["data.preprocess.resize", "a list of 2 numbers"]),
        ("data.split.train_games=game1", ["data.split.train_games", "expected a list"]),
        ("training.quantization=false", ["training.quantization", "section", "training.quantization=null"]),
        ("training.optimizer=adam", ["training.optimizer", "section", "training.optimizer.name"]),
        ("training.lr=1e-3", ["unknown setting 'training.lr'", "did you mean 'training.optimizer.lr'"]),
        ("lora.r=3", ["unknown section 'lora'", "did you mean 'training.lora.r'"]),
        ("training.foo.bar=3", ["unknown setting 'training.foo"]),
        ("data.augment.crop.foo=3", ["data.augment.crop"]),
        ("evaluation.threshold=2", ["evaluation.threshold=2.0: must be between 0 and 1"]),
        ("evaluation.tolerance_px=nan", ["evaluation.tolerance_px=nan"]),
        ("training.quantization.llm_int8_threshold=nan", ["llm_int8_threshold=nan"]),
        ("training.loss.radius=nan", ["training.loss.radius=nan"]),
        ("training.scheduler.warmup_epochs=nan", ["training.scheduler.warmup_epochs=nan"]),
        ("training.grad_clip=nan", ["training.grad_clip=nan"]),
        ("data.augment.noise=nan", ["data.augment.noise"]),
        ("data.split.val_games=[1]", ["train_games", "share game 1"]),
        ("data.occluded=maybe", ["data.occluded", "ignore"]),
        ("model.backbone=null", ["backbone"]),
        ("training.optimizer.lr=[", ["training.optimizer.lr"]),
        ("data.split.test_games=[game1]", ["test_games", "share game 1"]),
        ("data.augment.crop=[66,50]", ["data.augment.crop", "nearest is [64, 48]"]),
        ("data.augment.crop=[1024,288]", ["data.augment.crop=[1024, 288]", "larger than the frame"]),
        ("data.augment.crop=[512,320]", ["data.augment.crop=[512, 320]", "larger than the frame"]),
        ("data.augment.brightness=-1", ["data.augment.brightness"]),
        ("data.num_workers=-1", ["data.num_workers"]),
        ("training.optimizer.lr=nan", ["training.optimizer.lr"]),
        ("training.optimizer.lr=inf", ["training.optimizer.lr"]),
        ("training.optimizer.betas=[2,3]", ["training.optimizer.betas"]),
        ("training.min_micro_batch_size=99", ["min_micro_batch_size=99", "batch_size"]),
        ("seed=-1", ["seed=-1"]),
        ("data.split.test_games=[27,game27]", ["contains a game twice"]),
    ],
)
def test_a_wrong_override_says_what_and_where(override, words):
    with pytest.raises(UserError) as error:
        base(override, training="qlora")
    for word in words:
        assert word in str(error.value)


def test_true_means_the_strongest_checkpointing():
    for value, level in (("true", "full"), ("false", "none")):
        config = base(f"training.memory_optimization.gradient_checkpointing={value}", training="qlora")
        assert config.training.memory_optimization.checkpointing == level


@pytest.mark.parametrize("budget", ["free", "lean", "25%", "12.5 %", "6GB", "800 MiB"])
def test_a_budget_is_a_word_a_share_or_a_size(budget):
    assert base(f"training.memory_optimization.budget={budget}").training.memory_optimization.budget == budget


@pytest.mark.parametrize("budget", ["6", "0%", "0GB", "half", "-5%", "25%%"])
def test_other_budgets_are_refused(budget):
    with pytest.raises(UserError, match="budget=.*must be free, lean, a size such as 6GB, or a share"):
        base(f"training.memory_optimization.budget={budget}")


def test_a_saved_configuration_is_whole(tmp_path):
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match=r"config\.yaml: damaged \(data, model"):
        load_config(tmp_path / "config.yaml")


def test_a_wrong_name_lists_the_right_ones():
    with pytest.raises(UserError, match="did you mean 'int8'") as error:
        base(training="int-8")
    assert "qlora" in str(error.value)


def test_a_broken_yaml_names_its_file(tmp_path):
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "bad.yaml").write_text("batch_size: [3\n")
    with pytest.raises(UserError, match=r"bad\.yaml"):
        compose("synthetic", "vit_tiny_heatmap", "bad", config_dir=tmp_path)


def test_paths_and_flags_are_no_overrides():
    assert is_override("training.lora.r=8") and is_override("seed=3")
    assert not is_override("--json=x") and not is_override("out/a=b.mp4") and not is_override("rally.mp4")


def test_every_yaml_header_shows_its_command():
    for path in Path(BUILT_IN).glob("*/*.yaml"):
        header = path.read_text().split("\n")[:4]
        assert any("tracknet " in line and line.startswith("#") for line in header), path


@pytest.mark.parametrize("stride", [0, 4])
def test_windows_of_scoring_leave_no_frame_out(stride):
    with pytest.raises(UserError, match=rf"evaluation\.stride={stride}"):
        compose("tracknet", "vit_tiny_heatmap", "default", [f"evaluation.stride={stride}"])


@pytest.mark.parametrize(
    ("text", "hint", "value"),
    [
        ("00001", "data.root", "00001"),
        ("off", "data.root", "off"),
        ("null", "data.root", "null"),
        ("1e3", "data.root", "1e3"),
        ("2024-11-26", "data.root", "2024-11-26"),
        ("0x10", "data.root", "0x10"),
        ("a: b", "data.root", "a: b"),
        ("[00001,00010,07,7]", "data.split.train_games", ["00001", "00010", "07", 7]),
        ("[yes,1_000,0o17,1:30,-0]", "data.split.train_games", ["yes", "1_000", "0o17", "1:30", "-0"]),
        ("['1']", "data.split.train_games", ["1"]),
        ("off", "data.cache", None),
    ],
)
def test_names_and_paths_are_text_however_they_look(tmp_path, text, hint, value):
    """YAML 1.1 reads 00010 as 8 and off as false; a folder of that name would not be found."""
    name = hint.rpartition(".")[2]
    if value is None:
        with pytest.raises(UserError, match=r"data\.cache.*off"):
            base(f"{hint}={text}")
        return
    config = base(f"{hint}={text}")
    assert getattr(config.data if name == "root" else config.data.split, name) == value
    if hint == "data.root" and text == "a: b":
        return  # in a file, this is a mapping
    (tmp_path / "data").mkdir()
    section = f"root: {text}" if name == "root" else f"split:\n  {name}: {text}"
    if hint == "data.root" and text == "null":
        section = "root: 'null'"
    (tmp_path / "data/mine.yaml").write_text(section + "\n")
    config = compose("mine", "vit_heatmap", "default", (), tmp_path)
    assert getattr(config.data if name == "root" else config.data.split, name) == value
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config


RESOLVERS = [
    "${oc.coerce:some.module.x,1}",
    "${oc.env:HOME}",
    "${oc.decode:x}",
    "${oc.create:{a:1}}",
    "${oc.env:${seed}}",
    "x${ oc.env : HOME }",
]


@pytest.mark.parametrize("value", [*RESOLVERS, "${data.root}"])
@pytest.mark.parametrize("key", ["seed", "data.root", "training.batch_size", "data.split.train_games[0]", "model.name"])
def test_a_saved_configuration_resolves_nothing(tmp_path, monkeypatch, key, value):
    """Otherwise an untrusted run could import modules and read environment variables."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some/__init__.py").write_text("")
    (tmp_path / "some/module.py").write_text(f"open({str(tmp_path / 'imported')!r}, 'w')\nx = int\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "config.yaml"
    save_config(base(), path)
    content = yaml.safe_load(path.read_text())
    *sections, last = key.removesuffix("[0]").split(".")
    place = content
    for section in sections:
        place = place[section]
    place[last] = [value] if key.endswith("[0]") else value
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(UserError, match="a saved configuration is resolved") as error:
        load_config(path)
    assert key in str(error.value) and not (tmp_path / "imported").exists()


@pytest.mark.parametrize("value", RESOLVERS)
def test_in_files_of_ones_own_references_are_read_and_resolvers_are_not(tmp_path, value):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("root: /somewhere\ncache_dir: ${data.root}/cache\n")
    assert compose("mine", "vit_heatmap", "default", (), tmp_path).data.cache_dir == "/somewhere/cache"
    (tmp_path / "data/mine.yaml").write_text(f"root: '{value}'\n")
    with pytest.raises(UserError, match="only references to other settings"):
        compose("mine", "vit_heatmap", "default", (), tmp_path)
    with pytest.raises(UserError, match="only references to other settings"):
        base(f"data.root={value}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: !!bool x", "tag"),
        ("seed: !!float q", "tag"),
        ("seed: !!timestamp x", "tag"),
        ("seed: !!python/name:os.system ''", "tag"),
        ("data:\n  root: !!binary x", "tag"),
        ("seed: 1\nseed: 2", "twice"),
        ("? [a]\n: 1", "not a name"),
        ("seed: &a [*a]", "deeply"),
        ("data: " + "[" * 5000, "YAML|deeply"),
        ("{" * 900, "YAML|deeply"),
        ("seed: \x00", "YAML"),
        ("- 1", "expected 'key: value'"),
        (
            (
                "a: &a [1,1,1,1,1,1,1,1,1]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
                "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]"
            ),
            "aliases",
        ),
        ("seed: " + "9" * 5000, "seed"),
        ("preprocess: null", "section and cannot be null"),
        ("preprocess: 512", "section"),
        ("coco: ball", "section"),
        ("coco: null", "section and cannot be null"),
        ("synthetic: [1]", "section"),
        ("mix: 5", "list"),
        ("split: {train_games: 5}", "list"),
        ("num_workers: many", "Integer"),
        ("a" * 2_000_000, "bytes"),
    ],
)
def test_yaml_that_is_no_configuration_is_one_message(tmp_path, text, words):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        compose("mine", "vit_heatmap", "default", (), tmp_path)
    assert "mine.yaml" in str(error.value) and len(str(error.value)) < 5000


@pytest.mark.parametrize(
    "override", ["data.preprocess=null", "data.preprocess=512", "data.coco=ball", "data.coco=null", "seed=!!bool x"]
)
def test_sections_take_settings(override):
    with pytest.raises(UserError, match="section|tag"):
        base(override)


def test_a_file_whose_name_has_an_equals_sign_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_override("a=b.mp4") and is_override("seed=3")
    for name in ("a=b.mp4", "seed=3"):
        (tmp_path / name).touch()
    assert not is_override("a=b.mp4") and is_override("seed=3")  # with the name of a section it is still a setting


@pytest.mark.parametrize(
    ("flag", "setting"),
    [
        ("--epochs", "training.epochs"),
        ("--num-epochs", "training.epochs"),
        ("--batch-size", "training.batch_size"),
        ("--lr", "training.optimizer.lr"),
        ("--learning-rate", "training.optimizer.lr"),
        ("--bs", "training.batch_size"),
        ("--workers", "data.num_workers"),
        ("--device=cpu", "training.device"),
        ("--resize", "data.preprocess.resize"),
        ("--verbose", None),
        ("--resum", None),
        ("--foo", None),
    ],
)
def test_a_flag_that_is_a_setting_is_told_its_name(flag, setting):
    said = suggest_for_flag(flag, Config)
    assert said == (f"; settings are written without dashes: {setting}=…" if setting else "")


def test_the_guides_advice_on_accuracy_works_as_it_is_written(tmp_path):
    """The guide gives these keys without the one that sets the number of bits."""
    (tmp_path / "training").mkdir()
    (tmp_path / "training/mine.yaml").write_text(
        "quantization:\n  llm_int8_threshold: 4.0\nlora:\n  r: 32\n  lora_alpha: 64\noptimizer:\n  lr: 2.0e-4\n"
    )
    training = compose("synthetic", "vit_tiny_heatmap", "mine", (), tmp_path).training
    assert (
        training.quantization.enabled and training.quantization.load_in_8bit and not training.quantization.load_in_4bit
    )
    assert (training.quantization.llm_int8_threshold, training.lora.r, training.optimizer.lr) == (4.0, 32, 2e-4)
    assert base("training.quantization.load_in_4bit=true").training.quantization.load_in_8bit is False
    with pytest.raises(UserError, match="neither load_in_8bit nor load_in_4bit"):
        base("training.quantization.load_in_8bit=false")
    with pytest.raises(UserError, match="bnb_4bit_quant_type is a setting of 4-bit storage"):
        base("training.quantization.bnb_4bit_quant_type=fp4")
