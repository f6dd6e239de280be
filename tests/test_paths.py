"""Names from the wild: whatever a path leads to, a command ends in one line, with the right status, and soon."""

from __future__ import annotations

import errno
import io
import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
import unicodedata
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from wsiseg.cli import main
from wsiseg.config import RunConfig, TissueConfig, check, read_config
from wsiseg.errors import ConfigError, FormatError, InterruptedRunError, RunError, SlideError, WsisegError
from wsiseg.evaluation import evaluate
from wsiseg.runs.slide import segment_slide
from wsiseg.runtime.atomic import atomic_path
from wsiseg.runtime.claims import Claims
from wsiseg.runtime.paths import kind_of, names_in, readable
from wsiseg.runtime.shards import Shard

if TYPE_CHECKING:
    from collections.abc import Iterator

REFUSALS = [errno.EACCES, errno.ENAMETOOLONG, errno.ESTALE, errno.ENOTCONN, errno.EIO]
SEEDS = {"version": 1, "types": [{"name": "a", "points": [[5, 5]]}]}


def call(*arguments: object) -> Result:
    """The command line in this process; an exception that is not an exit is raised."""
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def there() -> list[str]:
    """Names in the current folder."""
    return sorted(path.name for path in Path().iterdir())


def errors(result: Result) -> list[str]:
    """Lines on stderr, without what is only remarked, and without click's lines on usage."""
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    return [line for line in lines if not re.match(r"Warning: |Note: |Usage: |Try '|Imported models are", line)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of the matrix: every kind of thing that a name may lead to, and good files to go with it."""
    here = tmp_path_factory.mktemp("place") / "here"
    here.mkdir()
    before = Path.cwd()
    os.chdir(here)
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save("good.png")
    Image.fromarray(np.eye(8, dtype=np.uint8)).save("labels.png")
    Path("seeds.json").write_text(json.dumps(SEEDS))
    Path("text").write_text("nothing but words\n")
    Path("noise").write_bytes(bytes(range(256)) * 9)
    Path("empty").touch()
    Path("folder").mkdir()
    Path("folder/inside").write_text("x")
    Path("bare").mkdir()
    Path(os.fsdecode(b"pr\xf8ve.png")).write_bytes(Path("good.png").read_bytes())
    Path(os.fsdecode(b"m\xf8ppe")).mkdir()
    Path("dangling").symlink_to("nowhere")
    Path("loop").symlink_to("loop")
    Path("to-folder").symlink_to("folder")
    os.mkfifo("pipe")
    Path("to-pipe").symlink_to("pipe")
    os.mkfifo("pipe.json")
    os.mkfifo("pipe.png")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("socket")
        assert call("run", "good.png", "--mpp", 0.25, "--out", "runs").exit_code == 0
        yield here
    os.chdir(before)


EMPTY = ("", " ", "\t", "\n")
NOTHING = (
    "nowhere",
    "nowhere.json",
    "nowhere/",
    "text/x",
    "text/",
    "a::b",
    "::",
    "file::nowhere.png",
    "~nobody/x.svs",
    "~",
    "two\nlines",
    "a\tb",
    "$SEEDS",
    "*",
    "'\"",
    "C:\\x.svs",
    "\\\\server\\x",
    "e\u0301.svs",
    "\u00e9.svs",
    "\U0001f52c",
    "\x1b[31m",
    "con",
    " x",
    "-",
)
UNUSABLE = (
    "x" * 300,
    "x/" * 3000,
    os.fsdecode(b"nowhere-\xff"),
    os.fsdecode(b"pr\xf8ve.png"),
    os.fsdecode(b"m\xf8ppe/x"),
    "\ud800",
    "a\0b",
    "loop",
    "loop/x",
    "pipe",
    "pipe.json",
    "pipe.png",
    "to-pipe",
    "socket",
    "/dev/zero",
    "/dev/null",
    "/dev/full",
    "/dev/tty",
    "text/x",
)
OTHERS = ("dangling", "folder", "to-folder", "bare", ".", "empty", "text", "noise", "/proc/self/mem")
PATHS = tuple(dict.fromkeys([*EMPTY, *NOTHING, *UNUSABLE, *OTHERS]))

INPUTS = [
    "info {}",
    "run --mpp 0.25 --out out {}",
    "run --mpp 0.25 --out out good.png --seeds {}",
    "run --mpp 0.25 --out out good.png --bank {}",
    "run --mpp 0.25 --out out good.png --roi {}",
    "run --mpp 0.25 --out out good.png --model {}",
    "run --mpp 0.25 --out out good.png --config {}",
    "run --mpp 0.25 --out out --slides {}",
    "merge {}",
    "type {} --seeds seeds.json",
    "type runs/good --seeds {}",
    "type runs/good --bank {}",
    "type runs/good --seeds seeds.json --config {}",
    "type runs/good --seeds seeds.json --model {}",
    "seeds check {}",
    "seeds check seeds.json --slide {}",
    "seeds convert {} new.json",
    "seeds convert seeds.json new.geojson --slide {}",
    "seeds preview {} good.png --mpp 0.25 --out new.png",
    "seeds preview seeds.json {} --mpp 0.25 --out new.png",
    "evaluate {} labels.png",
    "evaluate labels.png {}",
    "evaluate labels.png labels.png --pred-types {}",
    "evaluate labels.png labels.png --truth-types {}",
    "evaluate labels.png labels.png --classes {}",
    "evaluate labels.png labels.png --baseline {}",
    "models import {} --name new",
    "models import noise --name new --decoder {}",
    "models show {}",
    "models verify {}",
    "models download {}",
]
OUTPUTS = [
    "run --mpp 0.25 good.png --out {}",
    "demo {}",
    "seeds convert seeds.json {}",
    "seeds preview seeds.json good.png --mpp 0.25 --out {}",
    "evaluate labels.png labels.png --json {}",
]


def arguments(line: str, path: str) -> list[str]:
    return [path if word == "{}" else word for word in line.split()]


def complaint(result: Result, status: int) -> str:
    """What is wrong with the end of a command that should have refused; empty if nothing is."""
    found = errors(result)
    one = len(found) == 1 and found[0].startswith("Error: ")
    return "" if result.exit_code == status and one else f"status {result.exit_code}, {result.stderr!r}"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", INPUTS)
def test_whatever_is_given_to_read_is_refused_in_one_line(place: Path, line: str) -> None:
    before = there()
    paths = [
        path for path in PATHS if not (path == "empty" and "run" in line and "--config" in line)
    ]  # which is TOML without settings
    wrong = {
        path: said for path in paths if (said := complaint(call(*arguments(line, path)), 2 if path in EMPTY else 1))
    }
    assert not wrong
    assert there() == before, "something was written"


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", OUTPUTS)
def test_whatever_is_given_to_write_is_refused_in_one_line_or_written(place: Path, line: str) -> None:
    def wrong(path: str) -> str:
        before, result = set(there()), call(*arguments(line, path))
        for name in set(there()) - before:
            subprocess.run(["rm", "-rf", "--", name], check=True)
        if path in EMPTY or path in UNUSABLE:
            return complaint(result, 2 if path in EMPTY else 1)
        return "" if result.exit_code == 0 and not errors(result) else complaint(result, 1)

    assert not {
        path: said for path in PATHS if path not in (".", "folder", "to-folder", "bare") and (said := wrong(path))
    }
    assert Path("/dev/null").is_char_device()


@pytest.mark.timeout(60)
@pytest.mark.parametrize("line", ["list", "verify", "show absent", "import noise --name new"])
def test_whatever_the_folder_of_models_is(place: Path, line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in PATHS:
        if "\0" in path or "\ud800" in path or path in OTHERS:
            continue
        monkeypatch.setenv("WSISEG_MODELS", path)
        result = call("models", *line.split())
        assert result.exit_code in (0, 1), (path, result.stderr)
        assert bool(errors(result)) == bool(result.exit_code), (path, result.stderr)
        assert len(errors(result)) < 2, (path, result.stderr)


# --- refusals of the file system


@pytest.fixture(params=REFUSALS, ids=[errno.errorcode[number] for number in REFUSALS])
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> tuple[Path, str]:
    """A folder below which every look-up fails, and what is said of it."""
    closed, number = tmp_path / "closed", request.param

    def refusing(function):
        def look(path, *more, **named):
            if isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(closed)):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *more, **named)

        return look

    for module, name in (
        (os, "stat"),
        (os, "lstat"),
        (os, "open"),
        (os, "listdir"),
        (os, "scandir"),
        (os, "mkdir"),
        (io, "open"),
    ):
        monkeypatch.setattr(module, name, refusing(getattr(module, name)))
    return closed, "no permission|Permission denied" if number == errno.EACCES else re.escape(os.strerror(number))


@pytest.mark.parametrize(
    "line", [line for line in INPUTS if not re.search(r"decoder|show|verify|download", line)] + OUTPUTS
)
def test_what_the_file_system_refuses_is_said_in_one_line(place: Path, refused: tuple[Path, str], line: str) -> None:
    folder, reason = refused
    for name in ("a.png", "a.json", "a.safetensors"):
        if "preview seeds.json good.png" in line and name != "a.png":
            continue
        result = call(*arguments(line, str(folder / name)))
        assert not complaint(result, 1), name
        assert re.search(reason, result.stderr) or "-types {}" in line or "convert seeds.json {}" in line, result.stderr


def test_a_folder_of_models_that_refuses(refused: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder, reason = refused
    monkeypatch.setenv("WSISEG_MODELS", str(folder))
    for words in (["list"], ["verify"], ["show", "mine"]):
        result = call("models", *words)
        assert not complaint(result, 1), words
        assert re.search(reason, result.stderr), words


@pytest.mark.skipif(
    os.geteuid() != 0 or subprocess.run(["unshare", "-Ur", "true"], check=False).returncode != 0,
    reason="needs a user namespace",
)
def test_a_folder_of_another_user(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir()
    (locked / "ok.tif").write_bytes(b"x")
    os.chown(locked, 12345, 12345)
    locked.chmod(0o700)
    done = subprocess.run(
        ["unshare", "-Ur", sys.executable, "-m", "wsiseg", "info", str(locked / "ok.tif")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert (
        done.stderr
        == f"Error: {locked / 'ok.tif'}: no permission to read it; change the file's permissions or run as a user who may\n"
    )


def test_looking_at_a_path_ends_in_the_error_that_was_asked_for(refused: tuple[Path, str]) -> None:
    folder, reason = refused
    for look in (kind_of, names_in):
        with pytest.raises(FormatError, match=reason):
            look(folder / "x", FormatError)
    with pytest.raises(RunError, match="taken"), readable(folder, FormatError):
        raise RunError("taken")


def test_a_device_is_never_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a")
    with (
        pytest.raises(RunError, match="a pipe, a device or a socket; a file is written here"),
        atomic_path(tmp_path / "a") as partial,
    ):
        partial.touch()
    assert (tmp_path / "a").is_fifo()


@pytest.mark.parametrize("number", REFUSALS)
def test_what_refuses_while_a_file_is_written_is_one_sentence(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(RunError, match=rf"a: cannot be written \({os.strerror(number)}\); make room, or choose"),
        atomic_path(tmp_path / "a"),
    ):
        raise OSError(number, os.strerror(number))


def test_a_current_folder_that_is_gone(tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    for words in ("info x.svs", "doctor", f"demo {tmp_path}/demo"):
        done = shell(
            f"cd {tmp_path}/gone && rmdir {tmp_path}/gone; $W {words}; status=$?; mkdir -p {tmp_path}/gone; exit $status"
        )
        assert done.returncode == 1
        assert (
            done.stderr
            == "Error: the current folder is gone (No such file or directory); change to another one with cd\n"
        )


# --- which names are the same


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """A slide without a cell: quickly done."""
    Image.fromarray(np.full((64, 64, 3), 255, np.uint8)).save(tmp_path / "SHA256E-s9--01.png")
    return tmp_path / "SHA256E-s9--01.png"


def test_the_run_of_a_link_has_the_name_of_the_link(slide: Path) -> None:
    out = slide.parent / "out"
    for name in ("patient1", "patient2"):
        (slide.parent / f"{name}.png").symlink_to(slide.name)
    done = call("run", slide.parent / "patient1.png", slide.parent / "patient2.png", "--mpp", 0.25, "--out", out)
    assert done.exit_code == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["patient1", "patient2", "summary.csv"]
    told = json.loads((out / "patient1/manifest.json").read_text())["slide"]
    assert told["path"] == str(slide.parent / "patient1.png")
    assert told["target"] == os.path.realpath(slide)


def test_the_target_of_a_link_decides_whether_it_is_the_same_slide(slide: Path) -> None:
    """A workflow stages the same file under a new folder each time; the folder of before is gone. Another file of the name is another slide."""
    out, config = slide.parent / "out", RunConfig(mpp=0.25)
    for number in range(2):
        stage = slide.parent / f"stage{number}"
        stage.mkdir()
        (stage / "p.png").symlink_to(slide)
        assert segment_slide(stage / "p.png", config, out).already is bool(number)
        (stage / "p.png").unlink()
    assert [p.name for p in out.iterdir()] == ["p"]
    (slide.parent / "p.png").write_bytes(slide.read_bytes())
    segment_slide(slide.parent / "p.png", config, out)
    assert len(list(out.iterdir())) == 2


def test_composed_and_decomposed_names_are_the_same(slide: Path) -> None:
    out, names = slide.parent / "out", [unicodedata.normalize(form, "pr\u00e9l\u00e8vement") for form in ("NFC", "NFD")]
    folders = []
    for name in names:
        (slide.parent / f"{name}.png").symlink_to(slide.name)
        folders.append(segment_slide(slide.parent / f"{name}.png", RunConfig(mpp=0.25), out).folder)
    assert folders[0] == folders[1]
    seeds = slide.parent / "seeds.json"
    seeds.write_text(json.dumps(SEEDS | {"slide": f"{names[0]}.png"}))
    for name in names:
        assert call("seeds", "check", seeds, "--slide", slide.parent / f"{name}.png").exit_code == 0
    for side, name in zip("pg", names, strict=True):
        (slide.parent / side).mkdir()
        Image.fromarray(np.eye(8, dtype=np.uint8)).save(slide.parent / side / f"{name}.png")
    assert [image.name for image in evaluate(slide.parent / "p", slide.parent / "g").images] == names[:1]


def test_two_colons_are_a_name(slide: Path) -> None:
    odd = slide.with_name("a::b.tiff")
    Image.open(slide).resize((512, 512)).save(odd)
    for reader in ("tiffslide", "image", "auto"):
        done = call("info", odd, "--reader", reader)
        assert done.exit_code == 0, done.stderr
    assert call("run", odd, "--mpp", 0.25, "--out", slide.parent / "c::d").exit_code == 0
    assert (slide.parent / "c::d/a::b/cells.parquet").is_file()


def test_names_that_are_not_text_in_the_library(slide: Path) -> None:
    odd = slide.with_name(os.fsdecode(b"pr\xf8ve.png"))
    odd.symlink_to(slide.name)
    with pytest.raises(
        SlideError, match=r"pr\\udcf8ve.png: the name of the file or a folder is not UTF-8 text; rename it"
    ):
        segment_slide(odd, RunConfig(mpp=0.25), slide.parent / "out")
    with pytest.raises(RunError, match="is not UTF-8 text"):
        segment_slide(slide, RunConfig(mpp=0.25), odd.with_suffix(""))
    for text, said in ((str(odd), "is not UTF-8 text"), ("a\0b", "a NUL character")):
        with pytest.raises(ConfigError, match=said):
            segment_slide(slide, RunConfig(mpp=0.25, seeds=text), slide.parent / "out")
    assert not (slide.parent / "out").exists()
    (slide.parent / "g").mkdir()
    (slide.parent / "g" / odd.name).symlink_to(slide)
    with pytest.raises(FormatError, match="is not UTF-8 text"):
        evaluate(slide.parent / "g", slide.parent / "g")


# --- what is empty


def commands(group: click.Group, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*words, name))
        else:
            yield (*words, name), command


EMPTIES = [
    (words, p)
    for words, c in commands(main)
    for p in c.params
    if not (isinstance(p, click.Option) and (p.is_flag or p.count))
]


@pytest.mark.parametrize(
    ("words", "parameter"),
    EMPTIES,
    ids=lambda value: value.name if isinstance(value, click.Parameter) else "-".join(value),
)
@pytest.mark.parametrize("text", ["", "  "])
def test_an_empty_argument_is_wrong_usage(words: tuple[str, ...], parameter: click.Parameter, text: str) -> None:
    """Of every option and argument of every command: ``--seeds "$SEEDS"`` where nobody has set SEEDS."""
    command = dict(commands(main))[words]
    option = isinstance(parameter, click.Option)
    rest = [text if p is parameter else "x" for p in command.params if isinstance(p, click.Argument)]
    result = call(*words, *([parameter.opts[-1], text] if option else []), *rest)
    assert result.exit_code == 2, result.output
    label = parameter.opts[-1] if option else parameter.metavar or parameter.name.upper()
    assert errors(result) == [f"Error: {label.strip('[].')}: empty; a variable that is not set?"]


def test_an_empty_setting_is_refused(tmp_path: Path) -> None:
    for changes in (
        {"seeds": ""},
        {"bank": " "},
        {"roi": ""},
        {"model": ""},
        {"device": ""},
        {"scheduler": ""},
        {"formats": ("",)},
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} is empty; give a value, or leave it out"):
            check(RunConfig(**changes))
    (tmp_path / "c.toml").write_text('seeds = ""\n[cluster]\nqueue = "x"\n')
    with pytest.raises(ConfigError, match="seeds is empty"):
        read_config(tmp_path / "c.toml")
    (tmp_path / "c.toml").write_text('[cluster]\nqueue = ""\n')
    with pytest.raises(ConfigError, match=r"cluster\.queue is empty"):
        read_config(tmp_path / "c.toml")
    for slide, out in (("", "out"), ("x.svs", "")):
        with pytest.raises(WsisegError, match="is empty"):
            segment_slide(slide, RunConfig(), out)


# --- streams that fail


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A line of bash in which ``W`` is the command."""
    environment = os.environ | environment | {"W": f"{sys.executable} -m wsiseg"}
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        env=environment,
        timeout=100,
        check=False,
    )


NO_SPACE = "Error: standard output: cannot be written (No space left on device); make room, or write it elsewhere\n"


@pytest.mark.parametrize(
    "words", ["info {}", "--help", "--version", "models list", "seeds check {}.json", "evaluate {} {}", "run --help"]
)
def test_what_cannot_be_printed_is_an_error_of_a_command_that_prints(slide: Path, words: str) -> None:
    Image.fromarray(np.diag(np.arange(8, dtype=np.uint8))).save(slide.with_name("a.png"))
    slide.with_name("a.png.json").write_text(json.dumps(SEEDS))
    words = words.replace("{}", str(slide.with_name("a.png")))
    done = shell(f"$W {words} > /dev/full")
    assert done.returncode == 1, done.stderr
    assert [line for line in done.stderr.splitlines(keepends=True) if not line.startswith("Imported")] == [NO_SPACE]
    for reader in ("true", "head -c 1"):  # which have read enough
        done = shell(f"$W {words} | {reader}")
        assert done.returncode == 0
        assert [line for line in done.stderr.splitlines() if not line.startswith("Imported")] == []


@pytest.mark.parametrize("how", ["> /dev/full", "2> /dev/full | true", "<&- >&- 2>&-", "2>&1 | true"])
def test_a_run_is_what_its_files_are_whatever_its_streams_are(slide: Path, how: str) -> None:
    """A list goes on to its end; the status is that of the work: 3, for one of two slides is not there."""
    out = slide.parent / "out"
    (slide.parent / "list.csv").write_text(f"path,name\nnowhere.svs,b\n{slide},a\n")
    done = shell(
        f"$W run -v --slides {slide.parent}/list.csv --mpp 0.25 --out {out} --log-json {'/dev/full' if '2>' in how else '-'} {how}"
    )
    assert done.returncode == 3, done.stderr
    manifest = json.loads((out / "a/manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert {(out / "a" / name).read_bytes()[:2] for name in manifest["files"]} == {b"PA", b"\x1f\x8b"}
    assert "complete" in (out / "summary.csv").read_text()
    assert shell(f"$W run --nonsense {how}").returncode == 2


def test_a_log_that_fails_is_said_once(slide: Path) -> None:
    done = shell(f"$W run {slide} --mpp 0.25 --out {slide.parent}/out --log-json /dev/full")
    assert done.returncode == 0
    assert [line for line in done.stderr.splitlines() if "greyscale" not in line and "tissue" not in line] == [
        "Warning: --log-json /dev/full: cannot be written ([Errno 28] No space left on device); the run continues without it"
    ]


def test_a_log_into_a_pipe_that_nobody_reads(slide: Path) -> None:
    os.mkfifo(slide.parent / "pipe")
    result = call("run", slide, "--mpp", 0.25, "--out", slide.parent / "out", "--log-json", slide.parent / "pipe")
    assert not complaint(result, 1)
    assert "cannot be written (No such device or address)" in result.stderr


@pytest.mark.parametrize("locale", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_names_in_a_locale_without_letters(slide: Path, locale: dict[str, str]) -> None:
    """Where Python reads names as UTF-8 they work; where it does not, and of names that no encoding has, one line that says so."""
    for name, fits in (("pr\u00f8ve", "PYTHONUTF8" not in locale), (os.fsdecode(b"pr\xf8ve"), False)):
        (slide.parent / f"{name}.png").symlink_to(slide.name)
        done = shell(f"$W run '{slide.parent}/{name}.png' --mpp 0.25 --out {slide.parent}/out", **locale)
        assert done.returncode == (0 if fits else 1), done.stderr
        assert "Traceback" not in done.stderr
        assert fits or len(done.stderr.splitlines()) == 1
        done = shell(f"$W run {slide} --mpp 0.25 --out '{slide.parent}/{name}'", **locale)
        assert done.returncode == (0 if fits else 1), done.stderr
        assert fits or len(done.stderr.splitlines()) == 1
    if "PYTHONUTF8" not in locale:
        assert (slide.parent / "out/pr\u00f8ve/manifest.json").is_file()


# --- Ctrl-C


def test_the_notice_of_a_stop_has_a_line_of_its_own(tmp_path: Path) -> None:
    """On a terminal, where the progress bar stands in the line; the run says that it was interrupted, and is complete when it is resumed."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (1500, 1500, 3), np.uint8)).save(tmp_path / "a.png")
    out, (terminal, line) = tmp_path / "out", pty.openpty()
    command = [
        sys.executable,
        "-m",
        "wsiseg",
        "run",
        tmp_path / "a.png",
        "--mpp",
        "0.25",
        "--no-tissue",
        "--tile-size",
        "64",
        "--out",
        out,
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=line, env=os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    )
    os.close(line)
    said, asked = b"", False
    while True:
        try:
            said += os.read(terminal, 1 << 16)
        except OSError:  # the other end is closed
            break
        if not asked and (out / "a/parts").is_dir() and list((out / "a/parts").glob("*.parquet")):
            asked = bool(process.send_signal(signal.SIGINT)) or True
            time.sleep(0.01)
    os.close(terminal)
    assert process.wait(60) == 3, said
    before = said[: said.index(b"SIGINT: ")]
    assert before.endswith(b"\r\x1b[2K"), before[-80:]
    assert re.search(rb"SIGINT: [^\n]*\n", said)
    assert json.loads((out / "a/manifest.json").read_text())["status"] == "interrupted"
    assert not [p.name for p in out.rglob("*") if p.name.endswith((".part", ".partial", ".claim"))]


def test_a_stopped_run_says_so_until_it_is_resumed(slide: Path) -> None:
    """And not while another process is about to write the end of the same run; of a shard, its record."""
    out, config = slide.parent / "out", RunConfig(mpp=0.25, tissue=TissueConfig(enabled=False))

    def status(name: str) -> str:
        return json.loads((out / name / "manifest.json").read_text())["status"]

    def stop(name: str, **more: Shard) -> None:
        with pytest.raises(InterruptedRunError):
            segment_slide(slide, config, out, name=name, stopped=lambda: True, **more)

    stop("a")
    assert status("a") == "interrupted"
    seen = []
    segment_slide(slide, config, out, name="a", on_progress=lambda *_: seen.append(status("a")))
    assert set(seen) == {"running"}
    assert status("a") == "complete"
    stop("s", shard=Shard(1, 1))
    assert json.loads((out / "s/parts/shard-1-of-1.json").read_text())["status"] == "interrupted"
    stop("c")
    with Claims(out / "c/parts") as other:
        other.take("end")
        manifest = json.loads((out / "c/manifest.json").read_text())
        (out / "c/manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
        stop("c")
        assert status("c") == "running"
