"""The examples for batch systems and workflow managers: run for real by stand-ins, they end with the files of a plain run."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import shapely

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
FILES = ("cells.parquet", "cells.geojson.gz")
SETTINGS = {"mpp": 0.5, "tiling": {"tile_um": 64, "block_tiles": 1}}  # of half the slide: a dozen blocks of a tile each

#: ``sbatch``, ``scontrol``, ``qsub`` and ``bsub``, as far as our scripts and the lines that submit them go. What is submitted has ended on return.
BATCH_SYSTEM = """
import getopt, json, os, pathlib, re, shlex, subprocess, sys
from concurrent.futures import ThreadPoolExecutor

STATE = pathlib.Path(os.environ["BATCH_STATE"])

def directives(script, mark):
    lines = [line[len(mark):] for line in script.splitlines() if line.startswith(mark + " ")]
    return [word for line in lines for word in shlex.split(line)]

def run(commands, cwd):
    number = len(list(STATE.glob("*.json"))) + 1
    with ThreadPoolExecutor(2) as pool:
        jobs = list(pool.map(lambda job: subprocess.run(job[0], env=job[1], cwd=cwd, capture_output=True, text=True), commands))
    (STATE / f"{number}.json").write_text(json.dumps([[job.returncode, job.stdout, job.stderr] for job in jobs]))
    return number

def spooled(script):
    path = STATE / "spooled"  # a batch system runs a copy: nothing may depend on where the script lies
    path.write_text(script)
    return str(path)

def indices(given):
    first, last = re.search(r"(\\d+)-(\\d+)", given).groups()
    return range(int(first), int(last) + 1)

def ended(number):
    assert (STATE / f"{number}.json").exists(), f"no job {number}"

def sbatch(arguments):
    options, rest = getopt.getopt(arguments, "", ["parsable", "array=", "dependency=", "mem=", "wrap="])
    options = dict(options)
    if "--dependency" in options:
        ended(options["--dependency"].removeprefix("afterany:"))
    if "--wrap" in options:
        number = run([(["sh", "-c", options["--wrap"]], dict(os.environ))], None)
    else:
        script = pathlib.Path(rest[0]).read_text()
        assert "--signal=B:USR1@120" in directives(script, "#SBATCH")
        tasks = indices(options["--array"])
        array = {"MIN": tasks[0], "MAX": tasks[-1], "COUNT": len(tasks)}
        array = {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in array.items()}
        command = ["bash", spooled(script), *rest[1:]]
        number = run([(command, {**os.environ, **array, "SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(k)}) for k in tasks], None)
    print(number if "--parsable" in options else f"Submitted batch job {number}")

def scontrol(arguments):
    (STATE / "scontrol").open("a").write(" ".join(arguments) + "\\n")

def qsub(arguments):
    # the environment is that of a login, whatever it was at qsub; an executable has two dashes before it, a script has not
    options, rest = getopt.getopt(arguments, "v:W:J:")
    home = STATE / "home"
    home.mkdir(exist_ok=True)
    env = {"HOME": str(home), "PATH": "/usr/bin:/bin", "PBS_O_PATH": os.environ["PATH"], "PBS_O_WORKDIR": os.getcwd()}
    env["OMP_NUM_THREADS"] = "1"
    options = dict(options)
    env |= dict(pair.split("=", 1) for pair in options.get("-v", "").split(",") if pair)
    if "-W" in options:
        ended(re.fullmatch(r"depend=afterany:(\\d+)\\[\\]\\.server", options["-W"])[1])
    if "--" in arguments:
        print(f"{run([(rest, env)], home)}.server")
        return
    assert len(rest) == 1, "arguments are for executables"
    script = pathlib.Path(rest[0]).read_text()
    given = dict(zip(*[iter(directives(script, "#PBS"))] * 2)) | options
    command = ["bash", spooled(script)]
    print(f"{run([(command, {**env, 'PBS_ARRAY_INDEX': str(k)}) for k in indices(given['-J'])], home)}[].server")

def bsub(arguments):
    options = {}
    while arguments and arguments[0].startswith("-"):
        name = arguments.pop(0)
        options[name] = arguments.pop(0)
    if "-w" in options:
        ended(re.fullmatch(r"numended\\((\\d+), \\*\\)", options["-w"])[1])
    if arguments:
        commands = [(arguments, dict(os.environ))]
    else:
        script = sys.stdin.read()
        words = directives(script, "#BSUB")
        name = options.get("-J") or words[words.index("-J") + 1]
        elements = indices(name)
        end = {"LSB_JOBINDEX_END": str(elements[-1])}
        commands = [(["bash", spooled(script)], {**os.environ, **end, "LSB_JOBINDEX": str(k)}) for k in elements]
    print(f"Job <{run(commands, None)}> is submitted to default queue <normal>.")

globals()[pathlib.Path(sys.argv[0]).name](sys.argv[1:])
"""


@dataclass(frozen=True)
class Site:
    """A folder to submit from, with blanks in every name, and the files of a plain run."""

    folder: Path
    environment: dict[str, str]
    state: Path
    expected: dict[str, bytes] = field(repr=False)

    def bash(self, lines: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["bash", "-euo", "pipefail", "-c", lines]
        environment = {**self.environment, **variables}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False, timeout=240
        )

    def start(self, script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        """A script as a batch system starts it: the leader of its own session."""
        command = ["bash", f"examples/{script}", *arguments]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**self.environment, **variables},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def parts(self, out: str) -> list[Path]:
        return list((self.folder / out / "my slide" / "parts").glob("*.parquet"))

    @staticmethod
    def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
        end = time.monotonic() + 60
        while not condition():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < end
            time.sleep(0.01)

    def jobs(self) -> list[list[Any]]:
        """Exit status and output of what was submitted, in order."""
        files = sorted(self.state.glob("*.json"), key=lambda path: int(path.stem))
        return [job for file in files for job in json.loads(file.read_text())]

    def check(self, out: str) -> None:
        assert [
            name for name in FILES if (self.folder / out / "my slide" / name).read_bytes() != self.expected[name]
        ] == []


@pytest.fixture(scope="module")
def plain(demo: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("examples") / "my folder"
    (folder / "bin").mkdir(parents=True)
    shutil.copytree(ROOT / "examples", folder / "examples")
    slide, seeds = demo
    shutil.copy(slide, folder / "my slide.tiff")
    clicks = json.loads(seeds.read_text()) | {"slide": "my slide.tiff"}
    for name in ("my seeds.json", "my slide.seeds.json"):
        (folder / name).write_text(json.dumps(clicks))
    (folder / "half.geojson").write_text(json.dumps(shapely.geometry.mapping(shapely.box(0, 0, 512, 256))))
    (folder / "settings.json").write_text(json.dumps(SETTINGS | {"roi": str(folder / "half.geojson")}))
    (folder / "slides.csv").write_text("path,mpp,seeds\nmy slide.tiff,0.5,my seeds.json\n")
    (folder / "slides.txt").write_text("my slide.tiff\n")
    for name in ("sbatch", "scontrol", "qsub", "bsub"):
        (folder / "bin" / name).write_text(f"#!{sys.executable} -I\n{BATCH_SYSTEM}")
        (folder / "bin" / name).chmod(0o755)
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS", "LSB"))}
    site = Site(folder, {**kept, "PATH": path, "OMP_NUM_THREADS": "1"}, folder, {})
    done = site.bash("wsiseg run 'my slide.tiff' --seeds 'my seeds.json' --config settings.json --out plain")
    assert done.returncode == 0, done.stderr
    site.expected.update({name: (folder / "plain/my slide" / name).read_bytes() for name in FILES})
    return site


@pytest.fixture
def site(plain: Site, tmp_path: Path) -> Site:
    """With batch systems where nothing was submitted."""
    return Site(plain.folder, {**plain.environment, "BATCH_STATE": str(tmp_path)}, tmp_path, plain.expected)


def submission(script: str) -> list[str]:
    """The commands in the comment at the top of an example."""
    found = re.findall(r"^(?:#|//)   (.+)", (ROOT / "examples" / script).read_text(), re.MULTILINE)
    assert found
    return found


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text, f"{old!r} is not in {text!r}"
        text = text.replace(old, new)
    return text


def test_slurm_slide(site: Site) -> None:
    """The two lines at the top of the script, with two tasks and other names."""
    both = replaced(
        "\n".join(submission("slurm_slide.sh")),
        ("--array=1-8", "--array=1-2"),
        ("slide.svs", '"my slide.tiff"'),
        (" results ", ' "slurm out" '),
        ("results/slide", '"slurm out/my slide"'),
        ("--seeds seeds.json", '--seeds "my seeds.json" --config settings.json'),
    )
    done = site.bash(both)
    assert done.returncode == 0, done.stderr
    assert [job[0] for job in site.jobs()] == [0, 0, 0], site.jobs()
    site.check("slurm out")


def test_pbs_and_lsf(site: Site) -> None:
    """Of one run, since starting Python is what takes the time here: two shards of three by PBS, the third by LSF. Merging again changes nothing."""
    first, merge = submission("pbs_array.sh")
    first = replaced(
        first,
        (
            "qsub -v SLIDE=slide.svs,OUT=results,SEEDS=seeds.json",
            'qsub -J 1-2 -v "SHARDS=3,SLIDE=my slide.tiff,OUT=array out,SEEDS=my seeds.json,CONFIG=settings.json"',
        ),
    )
    other, last = submission("lsf_array.sh")
    other = replaced(
        other,
        (
            "SLIDE=slide.svs OUT=results SEEDS=seeds.json bsub",
            'SLIDE="my slide.tiff" OUT="array out" SEEDS="my seeds.json" CONFIG=settings.json bsub -J "wsiseg[3-3]"',
        ),
    )
    done = site.bash("\n".join([first, other, replaced(merge, ("results/slide", "array out/my slide"))]))
    assert done.returncode == 0, done.stderr
    assert [job[0] for job in site.jobs()] == [0, 0, 0, 0], site.jobs()
    site.check("array out")
    number = re.search(r"Job <(\d+)>", done.stdout)[1]
    done = site.bash(replaced(last, ("NUMBER", number), ("results/slide", '"array out/my slide"')))
    assert done.returncode == 0, done.stderr
    assert site.jobs()[-1][0] == 0, site.jobs()
    site.check("array out")


def test_arrays_are_as_long_as_the_shards() -> None:
    """PBS tells a subjob nothing of the others, so the script says it twice."""
    script = (ROOT / "examples/pbs_array.sh").read_text()
    assert re.search(r"#PBS -J 1-(\d+)", script)[1] == re.search(r"SHARDS:-(\d+)", script)[1]


ARRAY = {
    "SLURM_ARRAY_TASK_ID": "1",
    "SLURM_ARRAY_TASK_MIN": "1",
    "SLURM_ARRAY_TASK_MAX": "1",
    "SLURM_ARRAY_TASK_COUNT": "1",
    "SLURM_ARRAY_JOB_ID": "7",
}
ELEMENT = {"SLIDE": "my slide.tiff", "OUT": "nowhere", "LSB_JOBINDEX": "1", "LSB_JOBINDEX_END": "1"}

#: Does nothing until it is asked to stop, and ends a little later.
IDLE = """#!/bin/bash
trap 'echo got TERM >&2; left=${left:-6}' TERM
trap 'echo got USR1 >&2; left=${left:-6}' USR1
touch "$BATCH_STATE/started"
while [ "${left:-1}" -gt 0 ]; do sleep 0.05; left=${left:+$((left - 1))}; done
exit 3
"""


def test_a_task_that_runs_out_of_time_is_requeued_and_goes_on(site: Site) -> None:
    """The signal goes to the shell alone, as with ``--signal=B:``."""
    arguments = ("my slide.tiff", "signalled", "--seeds", "my seeds.json", "--config", "settings.json")
    task = site.start("slurm_slide.sh", *arguments, **ARRAY)
    site.wait_for(lambda: site.parts("signalled"), task)
    os.kill(task.pid, signal.SIGUSR1)
    _, errors = task.communicate(timeout=240)
    assert task.returncode == 3, errors
    assert "SIGUSR1: finishing the current block" in errors
    assert "run the same command again to resume" in errors
    assert (site.state / "scontrol").read_text() == "requeue 7_1\n"
    assert not list((site.folder / "signalled").rglob("*.claim"))
    before = {path: path.stat().st_mtime_ns for path in site.parts("signalled")}
    assert before
    task = site.start("slurm_slide.sh", *arguments, **ARRAY)
    _, errors = task.communicate(timeout=240)
    assert task.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len(site.parts("signalled")) > len(before)
    merged = site.bash("wsiseg merge 'signalled/my slide'")
    assert merged.returncode == 0, merged.stderr
    site.check("signalled")
    assert (site.state / "scontrol").read_text() == "requeue 7_1\n"


@pytest.mark.parametrize(
    ("script", "number", "group", "status", "requeued"),
    [
        ("slurm_slide.sh", signal.SIGUSR1, False, 3, True),
        ("slurm_slide.sh", signal.SIGTERM, True, 3, False),  # cancelled: SLURM, too, signals all processes then
        ("slurm_array.sh", signal.SIGUSR1, False, 3, False),
        ("pbs_array.sh", signal.SIGTERM, True, 3, False),
        (
            "lsf_array.sh",
            signal.SIGUSR1,
            True,
            99,
            False,
        ),  # LSF signals all processes of a job, and requeues by the status
    ],
)
def test_signals_reach_wsiseg(site: Site, script: str, number: int, group: bool, status: int, requeued: bool) -> None:
    (site.state / "wsiseg").write_text(IDLE)
    (site.state / "wsiseg").chmod(0o755)
    path = f"{site.state}{os.pathsep}{site.environment['PATH']}"
    variables = {
        **ARRAY,
        **ELEMENT,
        "PATH": path,
        "PBS_O_PATH": path,
        "PBS_O_WORKDIR": str(site.folder),
        "PBS_ARRAY_INDEX": "1",
    }
    arguments = {"slurm_slide.sh": ("my slide.tiff", "nowhere"), "slurm_array.sh": ("slides.txt", "nowhere")}
    task = site.start(script, *arguments.get(script, ()), **variables)
    site.wait_for((site.state / "started").exists, task)
    time.sleep(0.1)
    (os.killpg if group else os.kill)(task.pid, number)
    _, errors = task.communicate(timeout=10)
    assert errors.count(f"got {signal.Signals(number).name[3:]}") == 1, "a second signal would end wsiseg at once"
    assert task.returncode == status
    assert (site.state / "scontrol").exists() == requeued


def test_lsf_requeues_by_that_status() -> None:
    assert "#BSUB -Q 99\n" in (ROOT / "examples/lsf_array.sh").read_text()


def test_arguments_are_passed_on(site: Site) -> None:
    """What follows list and folder goes to wsiseg; clicks beside a slide with blanks in its name are found."""
    (site.state / "wsiseg").write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    (site.state / "wsiseg").chmod(0o755)
    done = site.bash(
        "bash examples/slurm_array.sh slides.txt 'an out' --roi 'a roi.geojson'",
        PATH=f"{site.state}{os.pathsep}{site.environment['PATH']}",
        **ARRAY,
    )
    said = ["run", "my slide.tiff", "--seeds", "my slide.seeds.json", "--out", "an out", "--roi", "a roi.geojson"]
    assert done.stdout.splitlines() == said


class Rules:
    """The rules of a Snakefile: each section is what its text says as arguments of a call."""

    def __init__(self, text: str, folder: Path, config: dict[str, Any]) -> None:
        head, *rules = re.split(r"^rule (\w+):\n", text, flags=re.MULTILINE)
        here = Path.cwd()
        self.names: dict[str, Any] = {"config": config, "touch": lambda path: path}
        os.chdir(folder)
        try:
            exec(compile(head, "Snakefile", "exec"), self.names)
        finally:
            os.chdir(here)
        self.rules = {}
        for name, body in zip(rules[::2], rules[1::2], strict=True):
            sections = dict(re.findall(r"^    (\w+): (.+)$", body, re.MULTILINE))
            assert len(sections) == len(body.strip().splitlines()), f"rule {name}: a section of more than one line"
            self.rules[name] = {key: self._call(value) for key, value in sections.items()}

    def _call(self, text: str) -> SimpleNamespace:
        return eval(f"call({text})", self.names | {"call": lambda *a, **k: SimpleNamespace(args=a, named=k)})

    def command(self, rule: str, **wildcards: str) -> tuple[str, list[str], list[str]]:
        """The command of a job, its inputs and outputs."""
        sections, w = self.rules[rule], SimpleNamespace(**wildcards)

        def given(value: Any) -> Any:
            value = value(w) if callable(value) else value
            return value.format(**wildcards) if isinstance(value, str) else value

        inputs, outputs = (as_list(given(sections[key].args[0])) for key in ("input", "output"))
        values = {"input": inputs, "output": outputs, **{f"wildcards.{k}": v for k, v in wildcards.items()}}
        values |= {f"params.{k}": given(v) for k, v in sections["params"].named.items()}

        def quoted(match: re.Match[str]) -> str:
            value = values[match[1]]
            return shlex.join(map(str, as_list(value))) if match[2] else str(value)

        return re.sub(r"\{([\w.]+)(:q)?\}", quoted, sections["shell"].args[0]), inputs, outputs


def as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


CONFIG = {"slides": "slides.csv", "out": "flow out", "shards": "2", "options": "--config settings.json"}


def nextflow_command(folder: Path, process: str, **more: str) -> str:
    """The script of a process of ``wsiseg.nf``, filled in."""
    text = (ROOT / "examples/wsiseg.nf").read_text()
    scripts = dict(re.findall(r'^process (\w+) \{.*?script:\n +"""\n +(.+?)\n +"""', text, re.MULTILINE | re.DOTALL))
    assert set(scripts) == {"SHARD", "MERGE"}
    values = {
        "name": "my slide",
        "slide": f"{folder}/my slide.tiff",
        "options": f"--mpp 0.5 --seeds '{folder}/my seeds.json'",
        "file(params.out)": f"{folder}/flow out",
        "params.shards": "2",
        "params.options": f"--config '{folder}/settings.json'",
        **more,
    }
    return re.sub(r"\$\{(.+?)\}", lambda match: values[match[1]], scripts[process])


def test_snakefile_and_nextflow(site: Site) -> None:
    """Both run the same commands, so each may do a shard of one run."""
    workflow = Rules((ROOT / "examples/Snakefile").read_text(), site.folder, CONFIG)
    shards = [workflow.command("shard", slide="my slide", k=str(k)) for k in (1, 2)]
    merge, needed, made = workflow.command("merge", slide="my slide")
    assert [inputs for _, inputs, _ in shards] == [["my slide.tiff"]] * 2
    assert needed == [output for _, _, outputs in shards for output in outputs]
    assert workflow.rules["all"]["input"].args[0] == made
    work = f"cd {shlex.quote(str(site.state))}\n"  # Nextflow's tasks have folders of their own
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(site.bash, [shards[0][0], work + nextflow_command(site.folder, "SHARD", shard="2")]))
    assert [job.returncode for job in done] == [0, 0], [job.stderr for job in done]
    assert shlex.split(merge) == ["wsiseg", "merge", "flow out/my slide"]
    merged = site.bash(work + nextflow_command(site.folder, "MERGE"))
    assert merged.returncode == 0, merged.stderr
    site.check("flow out")
    assert (site.folder / made[0]).exists()


@pytest.mark.skipif(shutil.which("snakemake") is None, reason="snakemake is not installed")
def test_snakemake_plans_the_same_jobs(site: Site) -> None:
    config = shlex.join(f"{key}={value}" for key, value in (CONFIG | {"out": "not there"}).items())
    done = site.bash(f"snakemake -s examples/Snakefile -n --cores 1 --config {config}")
    assert done.returncode == 0, done.stdout + done.stderr
    counts = dict(re.findall(r"^(\w+) +(\d+)$", done.stdout + done.stderr, re.MULTILINE))
    assert counts == {"all": "1", "shard": "2", "merge": "1", "total": "4"}


def test_names_of_run_folders(tmp_path: Path) -> None:
    """Snakefile and Nextflow script call a slide's folder as wsiseg does."""
    from wsiseg.runs.folder import find_folder

    names = ["a.svs", "b.c.ome.tif", "d.OME.TIFF", "e.f.tiff", "g.mrxs"]
    (tmp_path / "slides.csv").write_text("\n".join(["path", *names]))
    smk = (ROOT / "examples/Snakefile").read_text()
    found = Rules(smk, tmp_path, {"slides": "slides.csv"}).names["SLIDES"]
    assert list(found) == [find_folder(tmp_path, name).path.name for name in names]
    same = re.search(r're\.sub\(r"(.+?)"', smk)[1]
    assert f"replaceFirst(/(?i){same}/, '')" in (ROOT / "examples/wsiseg.nf").read_text()


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", *(ROOT / "examples").glob("*.sh")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_each_example_says_how_it_is_submitted() -> None:
    submit: dict[str, Callable[[str], bool]] = {
        "slurm_array.sh": lambda line: line.startswith("sbatch --array="),
        "Snakefile": lambda line: line.startswith("snakemake -s examples/Snakefile"),
        "wsiseg.nf": lambda line: line.startswith("nextflow run examples/wsiseg.nf"),
    }
    for name, right in submit.items():
        lines = submission(name)
        assert len(lines) == 1
        assert right(lines[0])
