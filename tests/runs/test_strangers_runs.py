"""A run folder may be a stranger's: whatever it says, nothing is imported, requested, written elsewhere or given
away."""

import hashlib
import json
import re
import shutil
import socket
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import transformers.utils.hub
import yaml
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from tests.conftest import TINY_DATA, set_hash
from tracknet.api.run import load
from tracknet.api.train import train_run
from tracknet.config import compose
from tracknet.errors import UserError
from tracknet.models.backbone import BackboneConfig
from tracknet.models.pretrained import build_backbone
from tracknet.reporting import report  # noqa: F401 - matplotlib looks at the home folder when it is imported
from tracknet.runs.load import load_run
from tracknet.scripts import cli

# fp16 and bf16 runs say what this machine computes in instead.
pytestmark = pytest.mark.filterwarnings("ignore:.*this CPU computes in")
SECRET = "hunter2-of-this-machine"
VERBS = ("load", "evaluate", "predict", "merged", "onnx", "adapter", "backbone", "push", "resume")


@pytest.fixture(scope="module")
def trained(rallies, backbones, tmp_path_factory):
    """A run that was really trained, on a base that it names, with adapters and an optimizer to go on with."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(backbones["vit"], folder / "base")
    config = compose(
        "synthetic",
        "vit_tiny_heatmap",
        "qlora",
        [
            *TINY_DATA,
            f"data.root={rallies}",
            f"data.cache_dir={folder / 'cache'}",
            f"model.backbone.name={folder / 'base'}",
            "model.decoder.channels=32",
            "training.batch_size=4",
            "training.max_steps=1",
            "training.device=cpu",
        ],
    )
    run = folder / "runs" / "r"
    train_run(config, run)
    AcceleratorState._reset_state(reset_partial_state=True)
    shutil.copytree(run / "last", run / "best", dirs_exist_ok=True)
    return run


class Place:
    """A machine as far as a command sees it: a home, a working folder, a video, a run that somebody sent."""

    def __init__(self, folder: Path, trained: Path, video: Path):
        self.folder, self.run, self.video = folder, folder / "work/outputs/runs/sent", video
        shutil.copytree(trained, self.run)
        (folder / "home").mkdir()
        self.before = self.files()

    def files(self) -> dict[str, str]:
        """Return what lies here, by path, but for what a command is asked to write: ``out``, and reports and logs of
        the run."""
        found = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if not name.startswith(("out", "work/outputs/runs/sent/report", "work/outputs/logs")):
                found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        return found

    def change(self, **values) -> None:
        """Change settings of the run's ``config.yaml``, ``data__root`` for ``data.root``."""
        path = self.run / "config.yaml"
        config = yaml.safe_load(path.read_text())
        for name, value in values.items():
            *sections, last = name.split("__")
            section = config
            for inner in sections:
                section = section[inner]
            section[last] = value
        path.write_text(yaml.safe_dump(config))
        self.before = self.files()

    def change_state(self, change) -> None:
        """Change both checkpoints' ``state.json`` by a function."""
        for checkpoint in ("best", "last"):
            path = self.run / checkpoint / "state.json"
            state = json.loads(path.read_text())
            change(state)
            path.write_text(json.dumps(state))
        self.before = self.files()

    def do(self, verb: str, *more: str) -> int:
        """Run a command on the run and return its exit code; ``load`` by the API."""
        out = self.folder / "out" / verb
        if verb == "load":
            try:
                load(self.run, device="cpu", overrides=more)
            except UserError as error:
                print(error, file=sys.stderr)
                return 2
            return 0
        argv = {
            "evaluate": ["evaluate", "--run", self.run],
            "predict": ["predict", "--run", self.run, self.video, "--out", out],
            "push": ["push", "--run", self.run, "--repo", "owner/name", "--dry-run", out, "--self-contained"],
            "resume": ["train", "--resume", self.run, "training.max_steps=2"],
        }.get(verb, ["export", "--run", self.run, "--format", verb, "--out", out])
        return cli.main([*map(str, argv), *more])

    def written(self) -> list[str]:
        """Return what is there, gone or changed that should not be."""
        after = self.files()
        return sorted(name for name in self.before.keys() | after.keys() if self.before.get(name) != after.get(name))


@pytest.fixture
def place(tmp_path, trained, rallies, monkeypatch):
    """A place in which the hub could be asked, and every attempt to connect anywhere fails the test."""
    asked = []

    def connect(self, address):
        asked.append(address)
        raise ConnectionRefusedError("no connection in this test")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *more, **also: connect(None, host))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TRACKNET_SECRET", SECRET)
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/hostile_module.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'imported')!r}).touch()\nvalue = int\nHead = object\n"
    )
    place = Place(tmp_path, trained, next((rallies / "game4").rglob("clip.mp4")))
    monkeypatch.chdir(tmp_path / "work")
    yield place
    assert not asked and "hostile_module" not in sys.modules and not (tmp_path / "imported").exists()


INTERPOLATED = {
    "an import": {"seed": "${oc.coerce:hostile_module.value,1}"},
    "an import in a name": {"model__backbone__name": "${oc.create:hostile_module.value}"},
    "the environment": {"model__backbone__name": "${oc.env:TRACKNET_SECRET}"},
    "the environment in a path": {"data__root": "${oc.env:TRACKNET_SECRET}/x"},
    "a plain reference": {"data__cache_dir": "${data.root}"},
    "an escaped one": {"data__cache_dir": "\\${data.root}"},
}


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("values", INTERPOLATED.values(), ids=INTERPOLATED)
def test_a_configuration_that_would_be_resolved_is_refused(place, capsys, verb, values):
    place.change(**values)
    assert place.do(verb) == 2
    said = capsys.readouterr().err
    assert "a saved configuration is resolved" in said and SECRET not in said
    assert place.written() == []


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system ['true']", "!!python/name:hostile_module.value ''"])
def test_tags_are_refused(place, capsys, verb, tag):
    path = place.run / "config.yaml"
    path.write_text(re.sub(r"(?m)^seed: .*$", f"seed: {tag}", path.read_text()))
    place.before = place.files()
    assert place.do(verb) == 2
    assert "tags are not supported" in capsys.readouterr().err
    assert place.written() == []


@pytest.mark.parametrize(
    ("setting", "known"),
    [
        ("model__name", "vit_heatmap"),
        ("data__layout", "tracknet"),
        ("training__loss__name", "focal"),
        ("training__optimizer__name", "adamw"),
    ],
)
def test_names_are_looked_up_and_never_imported(place, capsys, setting, known):
    place.change(**{setting: "hostile_module.Head"})
    for verb in ("load", "evaluate", "push", "resume"):
        assert place.do(verb) == 2
        assert known in capsys.readouterr().err
    assert place.written() == []


ARCHITECTURES = {
    "code": ("auto_map", {"AutoModel": "modeling.Hostile"}),
    "a kernel": ("attn_implementation", "owner/kernel"),
    "a kernel, written as transformers does": ("_attn_implementation", "owner/kernel:attention"),
    "storage of its own": ("quantization_config", {"quant_method": "bitsandbytes"}),
    "code of a pipeline": ("custom_pipelines", {"x": {"impl": "modeling.Hostile"}}),
    "a foreign family": ("model_type", "clip"),
    "a family that is no text": ("model_type", ["vit"]),
    "layers without end": ("num_hidden_layers", 100_000),
    "a width without end": ("hidden_size", 2**40),
    "a negative width": ("hidden_size", -32),
    "a width that is text": ("hidden_size", "32"),
    "more than the file holds": ("mlp_ratio", 4096),
}


@pytest.mark.parametrize("verb", ["load", "evaluate", "merged", "push", "resume"])
@pytest.mark.parametrize(("key", "value"), ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_an_architecture_that_asks_for_more_is_refused_before_it_is_built(place, capsys, verb, key, value):
    def change(state):
        state["backbone"]["base"] = None  # so that the architecture is built as it says
        state["backbone"]["architecture"][key] = value

    place.change_state(change)
    assert place.do(verb) == 2
    said = capsys.readouterr().err
    assert "backbone.architecture" in said and (key in said or "supported are" in said or "parameters" in said)
    assert place.written() == []


def test_a_base_with_code_beside_it_is_refused(place, capsys, backbones):
    base = place.run / "base"
    shutil.copytree(backbones["vit"], base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "modeling.Hostile"}}))
    shutil.copy(place.folder / "modules/hostile_module.py", base / "modeling.py")
    place.change(model__backbone__name=str(base))
    for verb in ("load", "evaluate", "merged", "push", "resume"):
        assert place.do(verb) == 2
        assert "auto_map names code to fetch and run" in capsys.readouterr().err
    assert place.written() == []


def test_a_decoder_that_the_file_cannot_hold_is_not_built(place):
    place.change(model__decoder__channels=2048)
    with pytest.raises(UserError, match=r"parameters, and the run's model.safetensors can hold [\d,]+ at most"):
        load_run(place.run)


@pytest.mark.parametrize("has_base", [True, False])
def test_weights_that_are_missing_are_no_licence_to_build_anything(place, has_base):
    if not has_base:
        place.change_state(lambda state: state["backbone"].update(base=None))
    (place.run / "best/model.safetensors").unlink()
    with pytest.raises(UserError, match="can hold 0 at most" if has_base else "at most 0 are possible"):
        load_run(place.run)


@pytest.mark.parametrize("setting", ["r: 8192", "rank_pattern: {query: 8192}"])
def test_adapters_have_no_more_ranks_than_there_are_directions(place, setting):
    key, _, value = setting.partition(": ")
    place.change(**{f"training__lora__{key}": yaml.safe_load(value)})
    with pytest.raises(UserError, match=r"training\.lora.*4096"):
        load_run(place.run)


def test_a_base_that_was_random_is_not_built(place, capsys):
    place.change(model__backbone__weights="random", model__backbone__name="facebook/dinov2-small")
    assert place.do("load") == 2
    assert "the two files are not from the same run" in capsys.readouterr().err


def test_a_run_does_not_choose_where_games_are_rendered(place, capsys):
    root = place.folder / "elsewhere" / "games"
    place.change(data__root=str(root))
    for verb in ("evaluate", "resume"):
        assert place.do(verb) == 2
        assert f"tracknet synthesize --out {root}" in capsys.readouterr().err
        assert place.written() == []
    # Who is asked to, does: the folder is the user's then.
    assert place.do("evaluate", f"data.root={place.folder / 'out/games'}") == 0
    assert (place.folder / "out/games/game4").is_dir() and not root.exists()


@pytest.mark.parametrize("verb", ["evaluate", "onnx", "resume"])
def test_a_run_does_not_choose_where_frames_are_kept(place, capsys, verb):
    """But a cache of ours, which it names because it was trained here, is used."""
    chosen = place.folder / "elsewhere" / "frames"
    place.change(data__cache_dir=str(chosen))
    assert place.do(verb) == 0
    assert f"data.cache_dir={chosen} is not a cache on this machine" in " ".join(capsys.readouterr().out.split())
    assert not chosen.exists()
    kept = place.folder / "home/.cache/tracknet/frames"
    assert list(kept.glob("*.frames")) and (kept / "CACHEDIR.TAG").read_text().startswith(
        "Signature: 8a477f597d28d172789f"
    )


def test_a_cache_of_ours_and_one_that_the_user_names_are_used(place, capsys):
    ours, named = place.folder / "out/ours", place.folder / "out/named"
    assert place.do("evaluate", f"data.cache_dir={named}") == 0
    assert list(named.glob("*.frames")) and not (place.folder / "home/.cache").exists()
    shutil.copytree(named, ours)
    place.change(data__cache_dir=str(ours))
    assert place.do("evaluate") == 0
    assert "is not a cache on this machine" not in capsys.readouterr().out
    assert not (place.folder / "home/.cache").exists() and place.written() == []


def test_a_report_does_not_leave_the_run(place, capsys):
    (place.folder / "elsewhere").mkdir()
    (place.run / "report").symlink_to(place.folder / "elsewhere")
    place.before = place.files()
    assert place.do("evaluate") == 2
    assert "report/ is a symbolic link" in capsys.readouterr().err
    assert place.written() == []


def test_a_file_in_place_of_the_report_is_said_before_scoring(place, capsys, monkeypatch):
    (place.run / "report").write_text("a file")
    place.before = place.files()
    assert place.do("evaluate") == 2
    said = capsys.readouterr()
    assert "report is not a folder" in said.err and "Scoring" not in said.out
    assert not (place.folder / "home/.cache").exists() and place.written() == []


@pytest.mark.parametrize("verb", ["merged", "onnx", "adapter", "push"])
def test_what_is_published_names_neither_other_data_nor_other_runs(place, trained, verb):
    """No path and nothing of the environment, in no file of it, be it text or not; and it still loads."""
    base = trained.parent.parent / "base"
    place.change(
        training__init_from=str(place.folder / "home/own-run"),
        data__mix=[{"layout": "tracknet", "root": str(place.folder / "home/other-games"), "games": [], "weight": 1.0}],
    )
    assert place.do(verb) == 0
    out = place.folder / "out" / verb
    private = [str(place.folder), str(base), str(trained), str(place.video.parents[2]), "/tmp/", SECRET]
    for path in (p for p in out.rglob("*") if p.is_file()):
        content = path.read_bytes()
        assert not [text for text in private if text.encode() in content], path
    config = (out / "config.yaml").read_text()
    assert "own-run" in config and "other-games" in config  # their last part may be said
    if verb == "adapter":
        with pytest.raises(
            UserError, match=r"keeps no copy of its frozen base weights \(base\).*model\.backbone\.name=<folder>"
        ):
            load(out, device="cpu")
        load(out, device="cpu", overrides=[f"model.backbone.name={base}"])
    elif verb == "onnx":
        assert (
            cli.main(
                [
                    "predict",
                    "--run",
                    str(out),
                    str(place.video),
                    "--engine",
                    "onnx",
                    "--out",
                    str(place.folder / "out/p"),
                ]
            )
            == 0
        )
    else:
        load(out, device="cpu")


def test_a_hash_that_fits_other_weights_helps_nobody(place):
    """Whoever changes a run can change its hashes too: names, shapes and values are checked all the same."""
    path = place.run / "best/model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name].flatten()[:-1].clone()}, path)
    set_hash(place.run / "best", path.name)
    with pytest.raises(UserError, match=rf"does not match the model in config.yaml: {re.escape(name)} is "):
        load_run(place.run)


class _Pickled:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickled_weights_are_not_read_and_the_way_out_is_named(backbones, tmp_path):
    shutil.copytree(backbones["vit"], tmp_path / "b")
    (tmp_path / "b/model.safetensors").unlink()
    torch.save({"x": _Pickled(tmp_path / "ran")}, tmp_path / "b/pytorch_model.bin")
    with pytest.raises(UserError, match=r"only as pytorch_model\.bin.*write model\.safetensors once.*save_pretrained"):
        build_backbone(BackboneConfig(str(tmp_path / "b")))
    assert not (tmp_path / "ran").exists()


LONG = "a" * 5000


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (LONG, "longer than the system allows"),
        (f"/x/{LONG}", "longer"),
        (f"a/{LONG}", "longer"),
        ("x/" * 3000, "longer"),
        ("~nobody-of-this-name/x", "no such user"),
        ("a\0b", "no such folder|config.yaml not found"),
        ("/\udcff", "no such folder|config.yaml not found"),
        ("/\ud800", "no such folder|config.yaml not found"),
    ],
    ids=["long", "long path", "long hub id", "deep", "user", "null", "no UTF-8", "half a pair"],
)
def test_names_that_no_file_can_have_are_one_message(name, words):
    for attempt in (lambda: load(name), lambda: build_backbone(BackboneConfig(name))):
        with pytest.raises(UserError, match=words) as caught:
            attempt()
        assert len(str(caught.value)) < 1000


def test_a_run_in_ones_home_is_found(place, monkeypatch):
    (place.folder / "home/r").symlink_to(place.run)
    load("~/r", device="cpu")
    assert cli.main(["evaluate", "--run", "~/r"]) == 0 and (place.run / "report").is_dir()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.decoder.channels=2080", "up to 2048"),
        ("data.sequence.length=257", "from 1 to 256"),
        ("evaluation.batch_size=65537", "from 1 to 65536"),
        ("data.preprocess.resize=[8200,288]", "at most 8192"),
        ("data.num_workers=257", "from 0 to 256"),
        ("training.batch_size=65537", "at most 65536"),
        ("training.loss.radius=1e-300", "from 1e-06 to 1e+06"),
        ("training.loss.radius=1e300", "from 1e-06 to 1e+06"),
        ("training.lora.r=4097", "at most 4096"),
    ],
)
def test_what_a_configuration_asks_a_machine_for_has_bounds(override, words):
    with pytest.raises(
        UserError, match=f"{re.escape(override.partition('=')[0])}.*{re.escape(words)}|training.lora: r=4097"
    ):
        compose("synthetic", "vit_tiny_heatmap", "qlora", [override])
