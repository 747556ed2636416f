"""Settings: flag before environment before file before default, and errors that name the place."""

from __future__ import annotations

import json
from dataclasses import replace

import click
import pytest

from localvlm.cli.main import cli as group
from localvlm.cli.options import YES_NO, Setting
from localvlm.config import config_file, directories, read_config
from localvlm.engine.fake import FakeEngine
from localvlm.errors import UsageError


@pytest.fixture
def settings(monkeypatch, tmp_path):
    """Writes the settings file."""
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))

    def write(text: str) -> str:
        config_file().parent.mkdir(parents=True, exist_ok=True)
        config_file().write_text(text)
        return str(config_file())

    return write


def kept(run) -> float:
    return json.loads(run.out)["keep"]


def test_home_moves_every_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    places = directories()
    assert {places.config.parent, places.data.parent, places.cache.parent, places.state.parent} == {tmp_path}
    monkeypatch.delenv("LOCALVLM_HOME")
    assert all("localvlm" in str(p) for p in vars(directories()).values())


def test_precedence(cli, settings, monkeypatch):
    assert kept(cli.ask("--json")) == 0.35
    settings("keep = 0.5")
    assert kept(cli.ask("--json")) == 0.5
    monkeypatch.setenv("LOCALVLM_KEEP", "0.25")
    assert kept(cli.ask("--json")) == 0.25
    assert kept(cli.ask("--json", "--keep=0.75")) == 0.75
    monkeypatch.setenv("LOCALVLM_KEEP", "")
    assert kept(cli.ask("--json")) == 0.5


def test_every_flag_has_a_variable_and_a_key():
    context = click.Context(group)
    commands = {name: group.get_command(context, name) for name in group.list_commands(context)}
    for name, command in commands.items():
        assert command.name == name
        for option in command.params:
            if option.param_type_name == "option" and option.name != "help":
                assert isinstance(option, Setting), f"{command.name} {option.opts}"
                assert f"LOCALVLM_{option.name.upper()}" in option.envvar
    assert "LOCALVLM_NGL" in next(p for p in commands["ask"].params if p.name == "gpu_layers").envvar


def test_flags_in_environment_and_file(cli, settings, monkeypatch):
    monkeypatch.setenv("LOCALVLM_JSON", "1")
    assert kept(cli.ask()) == 0.35
    monkeypatch.delenv("LOCALVLM_JSON")
    settings(
        'json = true\nkeep = "all"\nmax-tokens = 3\nmax_tokens = 3\nngl = 2\nmethod = "grid"'.replace(
            "max_tokens = 3\n", ""
        )
    )
    assert "-ngl 2" in cli.ask().err  # the fake has no GPU
    cli.scripts = {role: replace(script, gpus=("a card",)) for role, script in cli.scripts.items()}
    answer = json.loads(cli.ask().out)
    assert (answer["keep"], answer["method"], answer["tokens"]["generated"]) == (1.0, "grid", 3)


def test_words_for_yes_and_no_are_those_of_click():
    """The oldest click that the project takes does not tell its own."""
    states = getattr(click.BOOL, "bool_states", None)
    assert states is None or {word for word in states if word} == YES_NO


def loaded_with(monkeypatch, name: str) -> list:
    """What the load option ``name`` was of each VLM that is loaded from now on."""
    seen, load = [], FakeEngine.load

    def recording(self, model, mmproj, options):
        seen.append(getattr(options, name))
        return load(self, model, mmproj, options)

    monkeypatch.setattr(FakeEngine, "load", recording)
    return seen


def test_type_of_the_cache_reaches_the_engine(cli, settings, monkeypatch):
    seen = loaded_with(monkeypatch, "kv_type")
    cli.ask()
    settings('kv-type = "q8_0"')
    cli.ask()
    monkeypatch.setenv("LOCALVLM_KV_TYPE", "f16")
    cli.ask()
    cli.ask("--kv-type", "q8_0")
    assert seen == ["f16", "f16", "q8_0", "q8_0", "f16", "f16", "q8_0", "q8_0"]
    refused = cli.ask("--kv-type", "q4_0")
    assert (refused.code, len(seen)) == (2, 8)
    assert "q4_0" in refused.err


def test_pictures_are_kept_only_where_that_is_asked(cli, settings, monkeypatch):
    seen = loaded_with(monkeypatch, "image_cache")
    cli.ask()
    settings("image-cache = 3")
    cli.ask()
    assert seen == [0, 0, 3 << 20, 3 << 20]
    assert cli.ask("--image-cache", "-1").code == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kep = 0.5", "'kep'"),
        ("kep = 0.5", "did you mean 'keep'"),
        ("keep = 35", "35"),
        ("keep = true", "True"),
        ("max-tokens = 2.5", "whole number"),
        ("max-tokens = 0", "0"),
        ('temp = "hot"', "a number"),
        ('json = "yes"', "true or false"),
        ("method = 3", "text in quotes"),
        ('method = "best"', "best"),
        ("keep = ", "not valid TOML"),
        ("keep = 0.5\nkeep = 0.5", "not valid TOML"),
        ("pairs = 3", "[pairs.NAME]"),
        ('[pairs.a]\nmodle = "x"', "modle"),
        ("[ask]\nkeep = 0.5", "'ask'"),
    ],
)
def test_errors_name_file_and_key(cli, settings, text, words):
    path = settings(text)
    run = cli.ask()
    assert run.code == 2
    assert path in run.err
    assert words in run.err
    assert run.err.count("\n") == 1
    assert cli("ask", "--help").code == 0, "help must work whatever the file holds"


def test_verbose_is_a_level(cli, settings, monkeypatch):
    for text in ("verbose = true", "verbose = 1"):
        settings(text)
        assert "tokens:" in cli.ask().err
    settings("verbose = false")
    assert cli.ask().err == ""
    monkeypatch.setenv("LOCALVLM_VERBOSE", "2")
    assert "tokens:" in cli.ask().err


def test_bad_variables_are_named(cli, monkeypatch):
    monkeypatch.setenv("LOCALVLM_KEEP", "35")
    run = cli.ask()
    assert run.code == 2
    assert "LOCALVLM_KEEP" in run.err


def test_unreadable_files_are_named(settings, monkeypatch):
    path = settings("keep = 0.5")
    config_file().write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        read_config(["keep"])
    config_file().unlink()
    config_file().mkdir()
    with pytest.raises(UsageError, match=r"config\.toml"):
        read_config(["keep"])
    assert path


# ---- pairs


def pairs(cli, name="mine", **files: str) -> str:
    return f"[pairs.{name}]\n" + "".join(
        f'{key.replace("_", "-")} = "{cli.folder}/{value}.gguf"\n' for key, value in files.items()
    )


def test_a_pair_of_the_settings_file(cli, settings, monkeypatch):
    settings(pairs(cli, guide="guide", model="model"))
    answer = json.loads(cli("ask", "--json", "--pair", "mine", cli.image, "What?").out)
    assert answer["pair"] == "mine"
    answer = json.loads(cli("ask", "--json", cli.image, "What?").out)
    assert answer["pair"] == "mine", "an installed pair comes before the demo pair"
    run = cli("list", "--json")
    assert [p["name"] for p in json.loads(run.out)["pairs"]][:3] == ["mine", "demo", "demo-tiles"]
    assert cli("ls").out.startswith("PAIR")


def test_files_replace_members_of_a_pair_set_no_nearer(cli, settings, monkeypatch):
    other = cli.folder / "other.gguf"
    other.write_bytes(b"GGUF")
    cli.scripts["other"] = cli.scripts["model"]
    settings(pairs(cli, guide="guide", model="model"))

    def loaded(*flags: object) -> list[str]:
        assert cli("ask", *flags, cli.image, "What?").code == 0
        return [vlm.info.name for vlm in cli.engine.loaded]

    assert loaded("--pair", "mine", "--model", other) == ["guide", "other"]
    monkeypatch.setenv("LOCALVLM_PAIR", "mine")
    assert loaded("--model", other) == ["guide", "other"]
    monkeypatch.delenv("LOCALVLM_PAIR")
    monkeypatch.setenv("LOCALVLM_MODEL", str(other))
    assert loaded("--pair", "mine") == ["guide", "model"]


def test_the_demo_pair_is_the_last_resort_and_says_so(cli, monkeypatch):
    demo = {"guide": "guide", "guide-mmproj": "guide-mmproj", "model": "model", "mmproj": "model-mmproj"}
    lines = "".join(f'{key} = "{cli.folder}/{value}.gguf"\n' for key, value in demo.items())
    (cli.folder / "catalog.toml").write_text(f'[demo]\nsummary = "x"\n{lines}')
    monkeypatch.setattr("localvlm.catalog.models_folder", lambda: cli.folder)
    run = cli("ask", cli.image, "What?")
    assert run.code == 0
    assert run.err.startswith("demo pair: knows drawn scenes only")
    assert run.err.count("\n") == 1
    assert cli("ask", "-q", cli.image, "What?").err == ""
    assert cli("ask", "--pair", "demo", cli.image, "What?").err == ""
    (cli.folder / "guide.gguf").unlink()
    run = cli("ask", cli.image, "What?")
    assert run.code == 3
    assert "guide.gguf" in run.err


def test_a_pair_too_large_for_the_memory_is_not_the_default(cli, settings, monkeypatch):
    settings(pairs(cli, guide="guide", model="model"))
    monkeypatch.setattr("localvlm.catalog.HEADROOM", 1 << 60)
    from localvlm.catalog import default_entry
    from localvlm.errors import ModelNotFound

    try:
        assert default_entry(read_config([]).pairs).name == "demo"
    except ModelNotFound as error:
        assert "demo" in error.message  # not trained yet


def test_the_mmproj_most_alike_in_name_is_taken(tmp_path):
    from localvlm.catalog import vlm_files

    for name in ("big-7b-Q4_K_M", "small-2b-Q8_0", "mmproj-big-7b-f16", "mmproj-big-7b-bf16", "mmproj-small-2b-bf16"):
        (tmp_path / f"{name}.gguf").touch()
    assert vlm_files(tmp_path / "big-7b-Q4_K_M.gguf", None, "--mmproj").mmproj.name == "mmproj-big-7b-f16.gguf"
    (tmp_path / "mmproj-big-7b-instruct-f16.gguf").touch()
    assert vlm_files(tmp_path / "big-7b-Q4_K_M.gguf", None, "--mmproj").mmproj.name == "mmproj-big-7b-f16.gguf"
    (tmp_path / "big-7b-instruct.gguf").touch()
    assert (
        vlm_files(tmp_path / "big-7b-instruct.gguf", None, "--mmproj").mmproj.name == "mmproj-big-7b-instruct-f16.gguf"
    )
    assert vlm_files(tmp_path / "small-2b-Q8_0.gguf", None, "--mmproj").mmproj.name == "mmproj-small-2b-bf16.gguf"
