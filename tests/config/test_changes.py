"""Settings of a run that may be changed, from the metadata of their fields."""

from tracknet.config import Config
from tracknet.config.changes import changeable_settings, find_unchangeable

SAFE = ["training.device=cpu", "training.oom_retries=1", "model.backbone.name=x", "training.int8_kernel=triton"]


def test_the_same_holds_for_resuming_and_loading_where_it_is_said():
    for occasion in ("resume", "load"):
        assert find_unchangeable(Config, occasion, SAFE) is None
        assert find_unchangeable(Config, occasion, [*SAFE, "model.decoder.channels=8"]) == "model.decoder.channels=8"


def test_each_occasion_has_its_own():
    for override in ("training.epochs=3", "training.memory_optimization.use_cpu_offload=true", "data.num_workers=2"):
        assert find_unchangeable(Config, "resume", [override]) is None
    for override in ("evaluation.threshold=0.3", "data.split.test_games=[1]", "training.precision=fp32"):
        assert find_unchangeable(Config, "load", [override]) is None
        assert find_unchangeable(Config, "resume", [override]) == override
    assert find_unchangeable(Config, "load", ["training.epochs=3"]) == "training.epochs=3"


def test_old_names_are_judged_by_what_they_are_called_now():
    assert find_unchangeable(Config, "load", ["evaluation.subcell=centroid"]) is None
    assert find_unchangeable(Config, "resume", ["training.quantization.int8_kernel=bitsandbytes"]) is None


def test_sections_end_with_a_dot_and_settings_with_an_equals_sign():
    names = list(changeable_settings(Config, "load"))
    assert "data." in names and "evaluation." in names and "training.device=" in names and len(set(names)) == len(names)
