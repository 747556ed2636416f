"""`localvlm pull`, `list`, `show` and `rm`, and models by their names on a hub, against a server on this machine."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import sys
import threading
from pathlib import Path

import pytest

from localvlm import catalog
from localvlm.answers import VlmFiles
from localvlm.cli.output import print_table
from localvlm.cost import LlmShape
from localvlm.errors import ModelNotFound
from localvlm.planning.shapes import VlmShape
from tests import zoo
from tests.hub_server import Fault, HubServer

pytestmark = pytest.mark.loopback
DEMO = Path(catalog.models_folder()) / "demo"
GUIDE, MODEL = "ggml-org/tiny-guide-GGUF", "ggml-org/tiny-model-GGUF"


@pytest.fixture(scope="module")
def contents() -> dict[str, bytes]:
    names = ("guide", "guide-mmproj", "model", "model-mmproj")
    return {name: (DEMO / f"{name}.gguf").read_bytes() for name in names}


@pytest.fixture
def hub(contents, cli, monkeypatch):
    """A server with both demo VLMs, which the command line takes for the hub."""
    with HubServer() as server:
        server.add(GUIDE, {"guide-Q8_0.gguf": contents["guide"], "mmproj-guide-F16.gguf": contents["guide-mmproj"]})
        model = {"model-Q8_0.gguf": contents["model"], "mmproj-model-F16.gguf": contents["model-mmproj"]}
        server.add(MODEL, {**model, "model-Q2_K.gguf": contents["model"] + bytes(32)}, licence="apache-2.0")
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cli.folder / "hub"))
        yield server


@pytest.fixture
def tiny(cli, monkeypatch):
    """A catalogue with a pair on the hub."""
    lines = f'summary = "tiny"\nguide = "{GUIDE}"\nmodel = "{MODEL}:Q8_0"\nlicence = "MIT"\nrun = false\n'
    folder = cli.folder / "catalogue"
    folder.mkdir()
    (folder / "catalog.toml").write_text(f"[tiny]\n{lines}gb = {{ guide = 0.25, model = 0.5 }}\n")
    monkeypatch.setattr("localvlm.catalog.models_folder", lambda: folder)


def test_the_catalogue_is_whole(cli):
    """Of pairs on the hub: both VLMs by repository and quantization, what they are, and that nobody has run them."""
    on_hub = [entry for entry in catalog.entries() if entry.references]
    assert len(on_hub) >= 10
    for entry in on_hub:
        assert set(entry.references) == {"guide", "model"}, entry.name
        assert all(wanted.quant for wanted in entry.references.values())
        assert {"licence", "tokens", "good-at"} <= set(entry.about)
        assert set(entry.about.get("gb", {})) <= {"guide", "model"}
        assert not entry.run
        assert f"{entry.summary}; not run by us" in cli("show", entry.name).out


def test_a_model_without_its_projector_is_told(cli, hub):
    """What is there, what is missing and what to do, in `show` and where it is asked; with a projector it is whole."""
    assert cli("pull", f"{MODEL}:Q8_0").code == 0
    projector = next((cli.folder / "hub").rglob("mmproj-*.gguf"))
    kept = cli.folder / "mmproj.bin"
    kept.write_bytes(projector.read_bytes())
    projector.unlink()
    shown = cli("show", MODEL)
    assert shown.code == 0
    assert "'model-Q8_0.gguf' is here without a projector" in shown.out
    assert f"localvlm pull {MODEL}, or pass a projector with --mmproj" in shown.out
    assert re.search(r"architecture +llama, 12 layers", shown.out)
    told = json.loads(cli("show", MODEL, "--json").out)
    assert (told["lacking"], told["model"]["projector"]) == ([MODEL], None)
    other = cli("show", f"{MODEL}:Q2_K").out
    assert "lacks quantization Q2_K; here: model-Q8_0.gguf" in other
    assert cli("show", "nobody/nothing").out.count("is not here") == 1
    for refused, words in ((MODEL, "is here without a projector"), (f"{MODEL}:Q2_K", "; here: model-Q8_0.gguf")):
        run = cli("ask", "--model", refused, cli.image, "What?")
        assert (run.code, words in run.err) == (3, True)
        assert f"run `localvlm pull {refused}`" in run.err
    wanted = catalog.reference(MODEL)
    found = catalog.located({"model": wanted, "mmproj": kept})
    assert (found["model"].name, found["mmproj"]) == ("model-Q8_0.gguf", kept)


def test_tables_fit_a_terminal_of_80_columns(cli, capsys, monkeypatch):
    """The last column is wrapped below itself; what is no terminal has a row a line."""
    lines = cli("list").out.splitlines()
    assert max(map(len, lines)) > 80
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    print_table([tuple(line.split("  ", 1)) for line in ("a  " + "word " * 40, "b  short")])
    shown = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in shown)
    assert [line[0] for line in shown] == ["a", " ", " ", "b"]
    assert " ".join(shown[:-1]).split() == ["a", *["word"] * 40]


def test_a_file_without_a_projector_is_shown(cli, contents):
    alone = cli.folder / "alone"
    alone.mkdir()
    (alone / "model.gguf").write_bytes(contents["model"])
    shown = cli("show", str(alone / "model.gguf"))
    assert (shown.code, "'model.gguf' is here without a projector" in shown.out) == (0, True)
    assert "localvlm ask --model FILE --mmproj FILE" in shown.out


def test_a_pair_is_pulled_listed_shown_used_and_removed(cli, hub, tiny):
    listed = cli("list").out.splitlines()
    assert re.match(r"tiny +750 MB +not pulled +tiny; not run by us", listed[1])
    assert len(listed) == 2
    run = cli("ask", "--pair", "tiny", cli.image, "What?")
    assert run.code == 3
    assert "`localvlm pull tiny`" in run.err
    assert len(hub.requests) == 0, "only pull uses the network"

    run = cli("pull", "tiny")
    assert run.code == 0, run.err
    paths = run.out.splitlines()
    names = ["guide-Q8_0.gguf", "mmproj-guide-F16.gguf", "model-Q8_0.gguf", "mmproj-model-F16.gguf"]
    assert [Path(path).name for path in paths] == names
    assert "not run by us" in run.err
    assert "--pair tiny" in run.err
    assert "licence apache-2.0" in run.err
    served = hub.served
    assert cli("pull", "tiny").out.splitlines() == paths
    assert hub.served == served

    asked = len(hub.requests)
    listed = cli("ls").out
    assert re.search(r"tiny +\d+ MB +installed", listed)
    assert f"{MODEL}:Q8_0" in listed
    told = json.loads(cli("show", "tiny", "--json").out)
    assert told["guide"]["family"] == "llava"
    assert told["guide"]["image_tokens"]["640x480"] == 144
    assert told["licence"] == "MIT"
    assert told["lacking"] == told["notes"] == []
    cli.scripts = {Path(p).stem: cli.scripts[r] for p, r in zip(paths[::2], ("guide", "model"), strict=True)}
    assert cli("ask", "--pair", "tiny", "--exit-at", "off", cli.image, "What?").out == "dark red\n"
    assert cli("ask", "--model", f"{MODEL}:Q8_0", "--guide", f"hf.co/{GUIDE}", cli.image, "What?").out == "dark red\n"

    run = cli("rm", "tiny")
    assert run.code == 2
    assert "--yes" in run.err
    run = cli("rm", "-y", "tiny")
    assert run.code == 0
    assert "freed" in run.err
    assert not [path for path in (cli.folder / "hub").rglob("*") if path.suffix == ".gguf"]
    assert "not pulled" in cli("list").out
    assert len(hub.requests) == asked
    assert cli("rm", "-y", "tiny").code == 3


def test_a_model_by_its_repository_and_quantization(cli, hub):
    run = cli("pull", f"{MODEL}:Q2_K", "-q")
    assert run.code == 0
    assert run.err == ""
    assert [Path(path).name for path in run.out.splitlines()] == ["model-Q2_K.gguf", "mmproj-model-F16.gguf"]
    assert cli("pull", MODEL).code == 0
    models = {m["name"]: m for m in json.loads(cli("list", "--json").out)["models"]}
    assert set(models) == {f"{MODEL}:Q2_K", f"{MODEL}:Q8_0"}
    assert models[f"{MODEL}:Q8_0"]["sees"]
    freed = cli("rm", "-y", f"{MODEL}:Q2_K").err
    assert "mmproj" not in freed, "the other quantization needs it"
    assert "model-Q8_0" not in freed
    assert "mmproj" in cli("rm", "-y", MODEL).err


def test_what_is_half_fetched_stays_while_another_model_of_its_repository_does(cli, hub):
    assert cli("pull", f"{MODEL}:Q2_K").code == cli("pull", MODEL).code == 0
    (blobs,) = (cli.folder / "hub").glob("models--*/blobs")
    part = blobs / f"{'0' * 64}.incomplete"
    part.write_bytes(bytes(3_000_000))
    run = cli("rm", "-y", f"{MODEL}:Q2_K")
    assert run.code == 0
    assert "not fetched whole" not in run.err
    assert part.exists()
    run = cli("rm", "-y", MODEL)
    assert run.code == 0
    assert re.search(rf"3 MB +{MODEL} +a file that was not fetched whole", run.err)
    assert not part.exists()


def test_nobody_is_waited_for_where_nothing_of_a_quantization_is_here(cli, hub):
    assert cli("pull", f"{MODEL}:Q2_K").code == 0
    (blobs,) = (cli.folder / "hub").glob("models--*/blobs")
    (blobs / f"{'0' * 64}.incomplete").write_bytes(b"part")
    run = cli("rm", "-y", f"{MODEL}:Q8_0")
    assert (run.code, "is in the cache" in run.err) == (3, True)


@pytest.mark.parametrize("name", [MODEL, f"{MODEL}:Q2_K"])
def test_a_repository_of_one_half_fetched_file_goes(cli, hub, name):
    assert cli("rm", "-y", name).code == 3
    folder = cli.folder / "hub" / f"models--{MODEL.replace('/', '--')}"
    part = folder / "blobs" / f"{'0' * 64}.incomplete"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(3_000_000))
    run = cli("rm", "-y", name)
    assert (run.code, folder.exists()) == (0, False)
    assert run.err.endswith("3 MB freed\n")


def test_what_another_process_fetches_is_not_removed(cli, hub, tmp_path):
    from localvlm.hub_cache import locked

    hub.faults += [Fault(cut=1 << 20), Fault(status=404)]
    assert cli("pull", MODEL).code == 7
    (part,) = (tmp_path / "hub").rglob("*.incomplete")
    with locked(part.with_suffix("")):
        run = cli("rm", "-y", MODEL)
        assert (run.code, part.exists()) == (8, True)
        assert f"{MODEL}: a file stays, as another process is fetching it" in run.err
    assert cli("rm", "-y", MODEL).code == 0
    assert not part.exists()


def test_a_file_by_its_address(cli, hub):
    run = cli("pull", f"{hub.endpoint}/{MODEL}/blob/main/mmproj-model-F16.gguf")
    assert run.code == 0, run.err
    assert run.out.endswith("mmproj-model-F16.gguf\n")
    assert run.out.count("\n") == 1
    run = cli("ask", "--model", f"{MODEL}:Q8_0", cli.image, "What?")
    assert run.code == 3
    assert f"localvlm pull {MODEL}:Q8_0" in run.err


def test_an_address_means_the_files_of_its_revision(cli, hub, contents):
    old, _ = (Path(path) for path in cli("pull", f"{MODEL}:Q8_0").out.splitlines())
    names = {"mmproj-model-F16.gguf": contents["model-mmproj"], "model-Q8_0.gguf": contents["model"] + bytes(32)}
    hub.add(MODEL, names)
    new, _ = (Path(path) for path in cli("pull", f"{MODEL}:Q8_0").out.splitlines())
    folder = new.parents[2]
    (folder / "refs" / "v1").write_text(old.parent.name)
    (folder / "refs" / "pr").mkdir()
    (folder / "refs" / "pr" / "7").write_text(old.parent.name)

    def located(revision: str, kind: str = "resolve", file: str = "/model-Q8_0.gguf") -> Path:
        return catalog.located({"model": catalog.reference(f"{hub.endpoint}/{MODEL}/{kind}/{revision}{file}")})["model"]

    for revision, expected in (("main", new), (new.parent.name, new), (old.parent.name, old), ("v1", old)):
        assert located(revision) == expected
        assert located(revision, "tree", "") == expected
    assert located("pr%2F7") == old
    for revision in ("v2", "0" * 40, "..%2Fv1", "%2Fv1", "x" * 300):
        with pytest.raises(ModelNotFound) as raised:
            located(revision, "tree", "")
        (address,) = re.findall(r"https://\S+(?=`)", raised.value.hint)
        assert catalog.reference(address) == catalog.reference(f"{hub.endpoint}/{MODEL}/tree/{revision}")
    run = cli("rm", "-y", f"{hub.endpoint}/{MODEL}/resolve/v1/model-Q8_0.gguf")
    assert (run.code, old.exists(), new.is_file()) == (0, False, True)
    assert cli("rm", "-y", f"{hub.endpoint}/{MODEL}/resolve/v1/model-Q8_0.gguf").code == 3


def test_a_projector_by_its_name(cli, hub):
    paths = [Path(path) for path in cli("pull", MODEL).out.splitlines()]
    for name in (MODEL, f"{hub.endpoint}/{MODEL}/resolve/main/mmproj-model-F16.gguf"):
        found = catalog.located({"model": paths[0], "mmproj": catalog.reference(name)})
        assert list(found.values()) == paths
    own = cli.folder / "model-mmproj.gguf"
    assert catalog.located({"model": catalog.reference(MODEL), "mmproj": own}) == {"model": paths[0], "mmproj": own}


def test_names_in_the_settings_file(cli, hub):
    config = Path(os.environ["LOCALVLM_HOME"]) / "config" / "config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(f'[pairs.mine]\nguide = "{GUIDE}"\nmodel = "{cli.folder}/model.gguf"\n')
    try:
        assert re.search(r"mine +\? +not pulled", cli("list").out)
        assert f"'{GUIDE}'" in cli("ask", "--pair", "mine", cli.image, "What?").err
        assert cli("pull", GUIDE).code == 0
        assert re.search(r"mine +\d+ MB +installed", cli("list").out)
        cli.scripts["guide-Q8_0"] = cli.scripts["guide"]
        assert cli("ask", "--pair", "mine", cli.image, "What?").code == 0
        run = cli("rm", "-y", GUIDE)
        assert "pair 'mine' needs some of it too" in run.err
    finally:
        config.unlink()


@pytest.mark.parametrize(
    ("name", "code", "says"),
    [
        ("demo", 2, "nothing to fetch"),
        ("nonsense", 2, "neither a pair nor a repository"),
        ("https://example.com/x.gguf", 2, "not on a Hugging Face hub"),
        ("nobody/nothing", 7, "no repository"),
        (f"{MODEL}:Q5_K_M", 3, "Q2_K, Q8_0"),
        ("text/only", 3, "cannot see"),
        ("swapped/files", 3, "projector"),
        ("torn/model", 3, "cut short"),
    ],
)
def test_what_cannot_be_pulled_is_refused_with_the_reason(cli, hub, contents, name, code, says):
    hub.add("text/only", {"text-Q4_K_M.gguf": b"x"})
    hub.add("swapped/files", {"a-Q8_0.gguf": contents["guide-mmproj"], "mmproj-a.gguf": contents["guide"]})
    hub.add("torn/model", {"a-Q8_0.gguf": contents["guide"][:5000], "mmproj-a.gguf": contents["guide-mmproj"]})
    run = cli("pull", name)
    assert run.code == code, run.err
    assert says in run.err
    assert run.out == ""


def test_vlms_that_go_together_in_part(cli, hub, tmp_path):
    """Other tokenizers and other grids are noted, not refused."""
    for name in ("llava15", "qwen25vl"):
        built = zoo.build(name, tmp_path)
        hub.add(f"zoo/{name}", {f"{name}-F16.gguf": built.model.read_bytes(), "mmproj.gguf": built.mmproj.read_bytes()})
    config = Path(os.environ["LOCALVLM_HOME"]) / "config" / "config.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('[pairs.odd]\nguide = "zoo/llava15"\nmodel = "zoo/qwen25vl"\n')
    try:
        run = cli("pull", "odd")
    finally:
        config.unlink()
    assert run.code == 0, run.err
    assert "grids of image tokens differ" in run.err
    assert "over half as large" in run.err


def test_offline(cli, hub, tiny, monkeypatch):
    run = cli("pull", "tiny", "--offline")
    assert run.code == 7
    assert f"'{GUIDE}' is not on this machine" in run.err
    assert cli("pull", "tiny").code == 0
    asked = len(hub.requests)
    assert cli("pull", "tiny", "--offline").code == 0
    assert len(hub.requests) == asked
    cli("rm", "-y", "tiny")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run = cli("pull", "tiny")
    assert run.code == 7
    assert "HF_HUB_OFFLINE" in run.err


def test_verify_tells_damaged_files(cli, hub):
    path = Path(cli("pull", GUIDE).out.splitlines()[0])
    run = cli("show", GUIDE, "--verify")
    assert run.code == 0
    assert run.out.count("sound") == 2
    with path.open("r+b") as file:
        file.seek(-100, 2)
        file.write(b"!")
    run = cli("show", "--verify", GUIDE)
    assert run.code == 3
    assert run.out.count("DAMAGED") == 1
    assert f"`localvlm rm {GUIDE}:Q8_0`" in run.err


def test_the_way_out_of_one_damaged_file_leaves_the_others(cli, hub):
    small, projector = (Path(path) for path in cli("pull", f"{MODEL}:Q2_K").out.splitlines())
    usual = Path(cli("pull", MODEL).out.splitlines()[0])
    stays = usual.stat()
    for damaged, name in ((small, f"{MODEL}:Q2_K"), (projector, f"resolve/main/{projector.name}")):
        with damaged.open("r+b") as file:
            file.seek(-100, 2)
            file.write(b"!")
        run = cli("show", "--verify", f"{MODEL}:Q2_K")
        assert run.code == 3
        commands = [command.split()[1:] for command in re.findall("`([^`]+)`", run.err)]
        assert [command[1].endswith(name) for command in commands] == [True, True], run.err
        assert cli(*commands[0], "-y").code == 0
        assert not damaged.exists()
        assert cli(*commands[1]).code == 0
        assert cli("show", "--verify", f"{MODEL}:Q2_K").code == 0
        assert usual.stat().st_mtime_ns == stays.st_mtime_ns


def test_verify_tells_weights_that_are_no_numbers(cli):
    from localvlm.engine.gguf_header import read_header

    path = cli.folder / "bad.gguf"
    path.write_bytes((DEMO / "guide.gguf").read_bytes())
    (cli.folder / "mmproj-bad.gguf").write_bytes((DEMO / "guide-mmproj.gguf").read_bytes())
    tensor = read_header(path).tensors["blk.1.attn_q.weight"]
    with path.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(b"\xff" * 64)
    run = cli("show", "--verify", path)
    assert run.code == 3
    assert "; NO NUMBERS in tensor 'blk.1.attn_q.weight'\n" in run.out
    assert "ggml" not in run.err


def test_files_of_ones_own(cli):
    run = cli("show", DEMO / "model.gguf", "--verify")
    assert run.code == 0
    assert "144 image tokens of 640x480" in run.out
    assert run.out.count("nothing to compare with") == 2
    assert cli("show", cli.folder / "missing.gguf").code == 3
    assert cli("show", cli.folder / "model.gguf").code == 3


def test_a_name_that_drives_terminals_is_shown_safely(cli, hub, contents):
    hub.add("evil/repo", {"a\x1b[2J-Q8_0.gguf": contents["guide"], "mmproj.gguf": contents["guide-mmproj"]})
    run = cli("pull", "evil/repo")
    assert run.code == 7
    assert "\x1b" not in run.err + run.out


def test_bars_are_for_terminals(cli, hub, monkeypatch):
    hub.faults.append(Fault(cut=3_000_000))
    assert "\x1b" not in cli("pull", GUIDE).err
    ours, theirs = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # once its other end is closed
            while piece := os.read(ours, 1 << 16):
                pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()  # a terminal comes by pieces, and takes some 64 KB where nobody reads
    with io.TextIOWrapper(os.fdopen(theirs, "wb", buffering=0), write_through=True) as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert cli("pull", f"{MODEL}:Q8_0").code == 0
    reader.join()
    os.close(ours)
    shown = b"".join(pieces).decode(errors="replace")
    assert "model-Q8_0.gguf" in shown
    assert "all" in shown
    assert re.search(r"[\d.]+/[\d.]+ MB", shown)


def test_a_split_model(cli, hub, tmp_path):
    built = zoo.build("llava15", tmp_path)
    parts = zoo.split(built.model, tmp_path)
    assert len(parts) > 1
    files = {f"F16/{part.name}": part.read_bytes() for part in parts}
    hub.add("zoo/parts", {**files, "mmproj-parts-F16.gguf": built.mmproj.read_bytes()})
    run = cli("pull", "zoo/parts")
    assert run.code == 0, run.err
    assert [Path(path).name for path in run.out.splitlines()] == [*(p.name for p in parts), "mmproj-parts-F16.gguf"]
    whole, told = (json.loads(cli("show", what, "--json").out)["model"] for what in (built.model, "zoo/parts"))
    assert told["n_params"] == whole["n_params"]
    first = Path(run.out.splitlines()[0])
    assert LlmShape.of(first) == LlmShape.of(built.model)
    shapes = [VlmShape(VlmFiles(model, built.mmproj)) for model in (first, built.model)]
    assert shapes[0].llm == shapes[1].llm
    assert shapes[0].n_bytes > shapes[1].n_bytes
    assert told["bytes"] == sum(map(len, files.values())) + built.mmproj.stat().st_size
    assert cli("show", "zoo/parts", "--verify").out.count("sound") == len(parts) + 1
    Path(run.out.splitlines()[1]).unlink()
    assert "localvlm pull zoo/parts" in cli("ask", "--model", "zoo/parts", cli.image, "What?").err
