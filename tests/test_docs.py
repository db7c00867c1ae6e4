"""Consistency of the documentation with the code."""

import importlib.util
import re
from pathlib import Path

from tracknet.config import BUILT_IN
from tracknet.scripts.cli import VERBS

ROOT = Path(__file__).parent.parent


def test_the_configuration_reference_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_configuration", ROOT / "docs/make_configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.render()
    assert module.TARGET.read_text(encoding="utf-8") == page, "run: python docs/make_configuration.py"
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.split("|")[-2].strip() for line in rows), "every key has a description"


def test_tables_are_those_of_the_measurements():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks/tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sum("<!-- table: " in (ROOT / page).read_text(encoding="utf-8") for page in module.PAGES) >= 3
    for page in module.PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        assert module.render(text) == text, f"{page}: run python benchmarks/tables.py"


def test_every_verb_and_every_yaml_is_among_the_commands():
    page = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    assert all(f"| `tracknet {verb}` |" in page for verb in VERBS)
    assert all(f"`{path.stem}`" in page for path in BUILT_IN.glob("*/*.yaml"))


def test_the_readme_is_one_idea_a_screen():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 110 and all(len(line) <= 100 for line in lines if not line.startswith("|"))


def test_links_between_the_documents_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_dependency_is_justified():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    page = (ROOT / "docs/dependencies.md").read_text(encoding="utf-8")
    for requirement in [
        *project["dependencies"],
        *(r for extra in project["optional-dependencies"].values() for r in extra),
    ]:
        assert f"`{re.split('[><=]', requirement)[0]}`" in page, requirement


def test_the_quantization_guide_covers_every_key():
    from dataclasses import fields

    from tracknet.quantization.adapters import LoraConfig
    from tracknet.quantization.apply import QuantizationConfig
    from tracknet.training.config import MemoryConfig

    for edition in ("quantization.md", "quantization.ja.md"):
        page = (ROOT / "docs" / edition).read_text(encoding="utf-8")
        for section in (QuantizationConfig, LoraConfig, MemoryConfig):
            for field in fields(section):
                assert re.search(rf"^\| .*`(\w+\.)?{field.name}`", page, re.M), f"{edition}: {field.name}"
