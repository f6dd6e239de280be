"""Wrong phrases, models and settings for methods text and exemplar: one line each, and nothing written."""

from __future__ import annotations

import json

import numpy as np
import pytest

from wsiseg.config import RunConfig
from wsiseg.errors import ConfigError, SeedsError
from wsiseg.records import Bank, Cells, ChainPrototypes, Seeds, SeedType, TypePrototypes
from wsiseg.runs.inputs import phrases_as_seeds, resolve
from wsiseg.seeds.descriptions import describe_types

CLICKED = SeedType("a", (1, 2, 3), ((5.0, 5.0),))
DESCRIBED = SeedType("b", (1, 2, 3), text=("lymphocyte",))
BOTH = SeedType("c", (1, 2, 3), ((9.0, 9.0),), text=("gland",))
SAM3 = ("points", "boxes", "text", "exemplars")


def seeds(*types):
    return Seeds(types, "seeds.json")


def bank(chain):
    rows = np.ones((1, 2), np.float32)
    of = TypePrototypes(
        name="a",
        color=(1, 2, 3),
        clicks=np.empty((0, 2)),
        clicked=rows,
        negative=rows[:0],
        chain=ChainPrototypes(rows, rows, 0.5) if chain else None,
    )
    return Bank((of,), Cells.empty(2), from_other_slide=True)


@pytest.mark.parametrize(
    ("method", "prompts", "given", "message"),
    [
        ("text", ("points", "boxes"), {"seeds": seeds(DESCRIBED)}, "--method text: m reads no text; leave --model out"),
        ("auto", ("points", "boxes"), {"seeds": seeds(DESCRIBED)}, "--method text: m reads no text; leave --model out"),
        (
            "exemplar",
            ("points", "boxes"),
            {"seeds": seeds(CLICKED)},
            "--method exemplar: m takes no example boxes; pass",
        ),
        (
            "exemplar",
            ("text", "exemplars"),
            {"seeds": seeds(CLICKED)},
            "--method exemplar: m takes no points; import the",
        ),
        ("text", SAM3, {}, '--method text: needs phrases; pass --text PHRASE, or --seeds with "text"'),
        ("text", SAM3, {"bank": bank(chain=True)}, "--method text: needs phrases"),
        ("exemplar", SAM3, {}, "--method exemplar: needs clicks; pass --seeds FILE or --bank FILE"),
        ("exemplar", SAM3, {"bank": bank(chain=False)}, "has no prototypes for --method exemplar; leave --method out"),
        (
            "text",
            SAM3,
            {"seeds": seeds(DESCRIBED, CLICKED)},
            r"seeds.json: types\[1\]: type 'a' has no phrase, which --method text",
        ),
        (
            "exemplar",
            SAM3,
            {"seeds": seeds(CLICKED, DESCRIBED)},
            r"types\[1\]: type 'b' has only phrases, and --method exemplar needs",
        ),
        (
            "cop",
            SAM3,
            {"seeds": seeds(DESCRIBED)},
            r"types\[0\]: type 'b' has only phrases, and --method cop needs clicks",
        ),
        (
            "auto",
            SAM3,
            {"seeds": seeds(CLICKED, DESCRIBED)},
            r"types\[1\]: type 'b' has only phrases, and --method cop needs",
        ),
    ],
)
def test_what_a_method_needs(method, prompts, given, message):
    with pytest.raises((ConfigError, SeedsError), match=message) as raised:
        resolve(RunConfig(method=method, device="cpu"), "m", maps=False, prompts=prompts, **given)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("method", "given", "resolved"),
    [
        ("auto", {"seeds": seeds(DESCRIBED)}, "text"),
        ("auto", {"seeds": seeds(BOTH)}, "cop"),
        ("text", {"seeds": seeds(DESCRIBED, BOTH)}, "text"),
        ("exemplar", {"seeds": seeds(CLICKED, BOTH)}, "exemplar"),
        ("exemplar", {"bank": bank(chain=True)}, "exemplar"),
    ],
)
def test_what_a_method_accepts(method, given, resolved):
    assert resolve(RunConfig(method=method, device="cpu"), "m", maps=False, prompts=SAM3, **given).method == resolved


def test_phrases_of_the_command_line_are_types():
    made = phrases_as_seeds(("lymphocyte", "cell: dark"))
    assert [(kind.name, kind.text) for kind in made.types] == [
        ("lymphocyte", ("lymphocyte",)),
        ("cell dark", ("cell: dark",)),
    ]
    assert made.types[0].color != made.types[1].color
    long = phrases_as_seeds(("many words " * 12,))
    assert len(long.types[0].name) <= 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "exemplar", "--seeds", "SEEDS"], "--method exemplar: nuclei-compact takes no example boxes"),
        (["--method", "text"], "--method text: needs phrases; pass --text PHRASE"),
        (
            ["--method", "text", "--seeds", "SEEDS"],
            "types[0]: type 'epithelium' has no phrase, which --method text needs",
        ),
        (["--text", "lymphocyte", "--seeds", "SEEDS"], "--text and --seeds or --bank: both define the types"),
        (["--config", "CONFIG"], "text is empty; give a value, or leave it out"),
        (["--text", "a", "--text", "A"], '"A" appears twice'),
        (["--text", "unassigned"], '"unassigned" is reserved'),
        (["--text", "word " * 300], "types[0].text[0]: the phrase has 300 words; 30 are allowed"),
        ([x for k in range(100) for x in ("--text", f"phrase {k}")], "--text: 100 phrases; 32 are allowed"),
    ],
)
def test_wrong_options_are_one_line(wsiseg, demo, tmp_path, options, message):
    slide, clicks = demo
    (tmp_path / "settings.toml").write_text("text = ['lymphocyte', ' ']")
    files = {"SEEDS": clicks, "CONFIG": tmp_path / "settings.toml"}
    given = [files.get(option, option) for option in options]
    status, output = wsiseg("run", slide, *given, "--out", tmp_path / "out")
    errors = [line for line in output.splitlines() if not line.startswith("Warning")]
    assert status == 1
    assert len(errors) == 1
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("phrase", ["", "  "])
def test_an_empty_phrase_is_a_wrong_command(wsiseg, demo, phrase):
    status, output = wsiseg("run", demo[0], "--text", phrase)
    assert status == 2
    assert "--text: empty; a variable that is not set?" in output


def test_a_picture_shows_the_types_that_have_clicks(wsiseg, demo, tmp_path):
    slide, _ = demo
    mixed = tmp_path / "mixed.json"
    types = [{"name": "a", "text": ["gland"]}, {"name": "b", "points": [[67, 82]], "text": ["lymphocyte"]}]
    mixed.write_text(json.dumps({"version": 1, "types": types}))
    status, output = wsiseg("seeds", "preview", mixed, slide, "--out", tmp_path / "clicks.png")
    assert status == 0
    assert "1 of 1 click drawn" in output


def test_text_only_seeds_with_commands_that_need_clicks(wsiseg, demo, tmp_path):
    slide, _ = demo
    phrases = tmp_path / "phrases.json"
    phrases.write_text(json.dumps({"version": 1, "types": [{"name": "b", "text": ["lymphocyte", "dark nucleus"]}]}))
    assert wsiseg("seeds", "check", phrases, "--slide", slide) == (
        0,
        f"b: 0 clicks, 2 phrases\n{phrases}: OK for {slide}\n",
    )
    status, output = wsiseg("seeds", "preview", phrases, slide, "--out", tmp_path / "clicks.png")
    assert status == 1
    assert "type 'b' has only phrases, and the picture of the clicks needs clicks" in output
    status, output = wsiseg("run", slide, "--seeds", phrases, "--method", "apg", "--out", tmp_path / "out")
    assert status == 1
    assert "type 'b' has only phrases, and --method apg needs clicks" in output


class Talker:
    """A model whose detector counts letters as tokens."""

    max_tokens, reads_text = 12, True

    @property
    def detector(self):
        return self

    def count_tokens(self, phrase):
        return len(phrase) + 2


def test_a_phrase_longer_than_the_model_reads():
    config = RunConfig(method="text", model="m")
    made = Seeds((SeedType("a", (1, 2, 3), text=("short", "longer words")),), "seeds.json")
    with pytest.raises(
        SeedsError, match=r"types\[0\].text\[1\]: the phrase has 14 tokens with its ends; the model reads 12"
    ):
        describe_types(Talker(), config, made, None)


def test_a_model_without_its_tokenizer():
    silent = Talker()
    silent.reads_text = False
    with pytest.raises(
        ConfigError, match=r"m was imported without its tokenizer; import the folder with tokenizer\.json"
    ):
        describe_types(silent, RunConfig(method="text", model="m"), seeds(DESCRIBED), None)
    with pytest.raises(ConfigError, match="--method text: m reads no text"):
        describe_types(object(), RunConfig(method="text", model="m"), seeds(DESCRIBED), None)
