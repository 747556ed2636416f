"""What users call a model on a hub, and which files of a repository that is."""

from __future__ import annotations

import pytest

from localvlm.errors import ModelNotFound, UnsupportedModel, UsageError
from localvlm.references import Reference, choose, heads, parse, quant_of

HUB = "https://huggingface.co"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("user/repo", Reference("user/repo")),
        ("user/repo-GGUF:Q8_0", Reference("user/repo-GGUF", "Q8_0")),
        ("hf.co/user/repo:Q4_K_M", Reference("user/repo", "Q4_K_M")),
        ("hf://user/repo", Reference("user/repo")),
        ("huggingface.co/user/repo", Reference("user/repo")),
        (f"{HUB}/user/repo/", Reference("user/repo")),
        (f"{HUB}/user/repo/tree/v2", Reference("user/repo", revision="v2")),
        (f"{HUB}/user/repo/blob/main/a/b-Q8_0.gguf", Reference("user/repo", file="a/b-Q8_0.gguf")),
        (f"{HUB}/user/repo/resolve/main/b%20c.gguf?download=true", Reference("user/repo", file="b c.gguf")),
        ("http://localhost:80/user/repo", Reference("user/repo")),
        ("models/big.gguf", None),
        ("big", None),
        ("/abs/olute", None),
        ("../user/repo", None),
        ("a/b/c", None),
        ("user/..", None),
        ("", None),
    ],
)
def test_names(text, want):
    assert parse(text, ["localhost:80"]) == want


@pytest.mark.parametrize(
    "text",
    [
        "https://example.com/x.gguf",
        "ftp://huggingface.co/user/repo",
        f"{HUB}/user",
        f"{HUB}/user/repo/wiki/x",
        "https://[::1/a/b",
    ],
)
def test_addresses_that_are_not_on_the_hub_are_refused(text):
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert text in raised.value.message
    assert raised.value.hint


REPO = [
    ".gitattributes",
    "README.md",
    "big-Q4_K_M.gguf",
    "big-Q8_0.gguf",
    "big-f16.gguf",
    "imatrix-big.gguf",
    "mmproj-big-BF16.gguf",
    "mmproj-big-Q8_0.gguf",
    "mmproj-big-f16.gguf",
]
SPLIT = [f"Q8_0/big-Q8_0-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    ("quant", "names", "want"),
    [
        ("", REPO, (["big-Q4_K_M.gguf"], "mmproj-big-Q8_0.gguf")),
        ("q8_0", REPO, (["big-Q8_0.gguf"], "mmproj-big-Q8_0.gguf")),
        ("F16", REPO, (["big-f16.gguf"], "mmproj-big-f16.gguf")),
        ("", [n for n in REPO if "Q" not in n], (["big-f16.gguf"], "mmproj-big-f16.gguf")),
        ("", [*REPO[3:5], *REPO[6:]], (["big-Q8_0.gguf"], "mmproj-big-Q8_0.gguf")),
        ("", ["a-Q5_K_M.gguf", "a-Q6_K.gguf", "a-IQ2_XS.gguf", "mmproj.gguf"], (["a-Q5_K_M.gguf"], "mmproj.gguf")),
        ("", ["weights.gguf", "mmproj-model-f16.gguf"], (["weights.gguf"], "mmproj-model-f16.gguf")),
        ("q4_k", ["ggml-model-q4_k.gguf", "ggml-model-q5_k.gguf", "mmproj-model-f16.gguf"],
         (["ggml-model-q4_k.gguf"], "mmproj-model-f16.gguf")),
        ("", [*SPLIT, "mmproj-big-f16.gguf"], (SPLIT, "mmproj-big-f16.gguf")),
        ("Q8_0", [*SPLIT, "Q8_0/mmproj-near-f16.gguf", "mmproj-big-Q8_0.gguf"], (SPLIT, "Q8_0/mmproj-near-f16.gguf")),
        ("", ["a-Q4_K_M.gguf", "F16/mmproj-a-F16.gguf", "mmproj-a-F32.gguf"], (["a-Q4_K_M.gguf"], "mmproj-a-F32.gguf")),
        ("Q4_K_XL", ["a-UD-Q4_K_XL.gguf", "mmproj-BF16.gguf", "mmproj-F16.gguf"],
         (["a-UD-Q4_K_XL.gguf"], "mmproj-F16.gguf")),
        ("Q4_K_M", ["a-Q4_K_M.gguf", "b-UD-Q4_K_M.gguf", "mmproj.gguf"], (["a-Q4_K_M.gguf"], "mmproj.gguf")),
    ],
)  # fmt: skip
def test_files_of_a_repository(quant, names, want):
    assert choose(Reference("user/repo", quant), names) == want


def test_a_file_by_name():
    assert choose(Reference("u/r", file="big-Q8_0.gguf"), REPO) == (["big-Q8_0.gguf"], "mmproj-big-Q8_0.gguf")
    assert choose(Reference("u/r", file="mmproj-big-f16.gguf"), REPO) == (["mmproj-big-f16.gguf"], "")


@pytest.mark.parametrize(
    ("wanted", "names", "error", "says"),
    [
        (Reference("u/r"), ["README.md", "model.safetensors"], UnsupportedModel, "no GGUF"),
        (Reference("u/r"), ["text-Q4_K_M.gguf"], UnsupportedModel, "cannot see"),
        (Reference("u/r"), ["mmproj-F16.gguf"], UnsupportedModel, "no model"),
        (Reference("u/r", "Q2_K"), REPO, ModelNotFound, "Q2_K"),
        (Reference("u/r", file="other.gguf"), REPO, ModelNotFound, "other.gguf"),
        (Reference("u/r"), [*SPLIT[:2], "mmproj.gguf"], ModelNotFound, "00003-of-00003"),
        (Reference("u/r"), ["a-Q4_K_M.gguf", "b-Q4_K_M.gguf", "mmproj.gguf"], ModelNotFound, "several"),
    ],
)
def test_what_cannot_work_is_refused_with_the_reason(wanted, names, error, says):
    with pytest.raises(error, match=says) as raised:
        choose(wanted, names)
    if wanted.quant:
        assert "Q8_0" in raised.value.hint, "what there is instead"


def test_what_stands_for_a_model():
    assert heads([*REPO, *SPLIT]) == [SPLIT[0], "big-Q4_K_M.gguf", "big-Q8_0.gguf", "big-f16.gguf"]


@pytest.mark.parametrize(
    ("name", "want"),
    [("a/x-Q4_K_M.gguf", "Q4_K_M"), ("x.q8_0.gguf", "Q8_0"), ("x-iq3_xxs-00001-of-00002.gguf", "IQ3_XXS"),
     ("x-UD-Q2_K_XL.gguf", "UD-Q2_K_XL"), ("mmproj-BF16.gguf", "BF16"), ("Qwen3.gguf", ""),
     ("x-MXFP4_MOE.gguf", "MXFP4_MOE")],
)  # fmt: skip
def test_quantizations_by_name(name, want):
    assert quant_of(name) == want
