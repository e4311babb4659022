"""The pages that users read: links lead somewhere, commands are accepted, the README is short."""

import dataclasses
import gzip
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from data_helpers import REPOSITORY
from golden_helpers import GOLDEN
from test_import_rules import ALLOWED, DOOR
from test_shell_scripts import shell

from guided_diffusion import settings
from guided_diffusion.script_util import build_config, create_model, parse_flags

PAGES = {
    page.relative_to(REPOSITORY).as_posix(): page.read_text(encoding="utf-8")
    for page in [
        *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "evaluations/README.md")),
        *(REPOSITORY / "benchmarks").glob("*.md"),
        *sorted((REPOSITORY / "docs").glob("*.md")),
    ]
}
USER_PAGES = [name for name in PAGES if name == "README.md" or name.startswith("docs/")]
SHARED = [settings.DataConfig, settings.ModelConfig, settings.DiffusionConfig, settings.PlanConfig]
CLASSES = {
    "image_train.py": [settings.TrainConfig, *SHARED],
    "image_sample.py": [settings.SampleConfig, *SHARED],
}
OF_SETTINGS = {  # flags of a script that its text does not spell out
    "scripts/convert_checkpoint.py": {"weights_key", "trust"}
    | {field.name for kind in (settings.ModelConfig, settings.DiffusionConfig) for field in dataclasses.fields(kind)}
}


def prose(text: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^ *```.*?^ *```$", "", text, flags=re.S | re.M)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.M)
    plain = [re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower() for heading in headings]
    return {re.sub(r"[^\w\- ]", "", heading).strip().replace(" ", "-") for heading in plain}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every python command in the blocks of code of a page."""
    blocks = re.findall(r"^ *```(?:bash|sh)?\n(.*?)^ *```$", text, re.S | re.M)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        (m[1], shlex.split(m[2], comments=True)) for line in lines if (m := re.search(r"python (\S+\.py)(.*)", line))
    ]


def published() -> list[tuple[str, list[str]]]:
    """Train, fine-tune, sample: the commands of the section that holds them in full."""
    section = PAGES["docs/training.md"].split("## The published commands")[1].split("\n## ")[0]
    return commands(section)


def test_the_anchors_are_githubs():
    assert anchors("# A, `b.json` and C!\n```\n# no\n```\n## [D e](x.md)-f\n") == {"a-bjson-and-c", "d-e-f"}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(PAGES[page]))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = ((REPOSITORY / page).parent / file if file else REPOSITORY / page).resolve()
        assert target.exists(), f"{page} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"{page} links to {link}: no such heading"
    if page in USER_PAGES:
        assert links, f"{page} leads nowhere"


def test_every_page_is_reached_from_the_readme():
    reached, new = set(), {"README.md"}
    while new:
        page = new.pop()
        reached.add(page)
        for link in re.findall(r"\]\(([^)\s#:]+\.md)", prose(PAGES[page])):
            target = ((REPOSITORY / page).parent / link).resolve().relative_to(REPOSITORY).as_posix()
            new |= {target} & PAGES.keys() - reached
    assert reached == PAGES.keys()


def test_files_that_pages_name_are_there():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:scripts|tests|benchmarks|assets|evaluations|guided_diffusion)/[\w./]+)", text):
            if Path(name).suffix and "NAME" not in name:
                assert (REPOSITORY / name).exists(), f"{page} names {name}"


def test_the_architecture_tells_every_room_and_module():
    page = PAGES["docs/architecture.md"].split("## The rooms")[1].split("## The seams")[0]
    assert set(re.findall(r"^\| `(\w+)/` \|", page, re.M)) == ALLOWED.keys() - DOOR
    named = {word for words in re.findall(r"`([^`]+)`", page) for word in words.split()}
    assert named >= DOOR


def test_the_readme_is_short():
    assert len(PAGES["README.md"].split()) <= 1300


@pytest.mark.parametrize("page", USER_PAGES)
def test_commands_are_accepted(page):
    text = PAGES[page]
    for name, value in re.findall(r'^(\w+)="([^"$]*)"$', text, re.M):  # words that several commands share
        text = text.replace(f"${name}", value)
    for program, arguments in commands(text):
        assert (REPOSITORY / program).is_file(), f"{page} calls {program}"
        arguments = [word for word in arguments if word not in ("...", "FLAGS")]
        if program in CLASSES and "(the" not in arguments:  # "(the same, with)" is prose
            parse_flags(CLASSES[program], arguments)
        elif program not in CLASSES:
            source = (REPOSITORY / program).read_text(encoding="utf-8")
            shared = (REPOSITORY / "evaluations" / "command_line.py").read_text(encoding="utf-8")
            known = set(re.findall(r'"--(\w+)"', source + shared * program.startswith("evaluations/")))
            known |= OF_SETTINGS.get(program, set())
            assert {word[2:] for word in arguments if word.startswith("--")} <= known, f"{page}: {program}"


def test_the_published_commands_make_the_published_network():
    networks = []
    for program, arguments in published():
        flags = parse_flags(CLASSES[program], arguments)
        own = {f.name for cls in (settings.ModelConfig, settings.DiffusionConfig) for f in dataclasses.fields(cls)}
        networks.append({name: value for name, value in flags.items() if name in own and name != "use_checkpoint"})
    assert [program for program, _ in published()] == ["image_train.py", "image_train.py", "image_sample.py"]
    assert networks[0] == networks[1] == networks[2]
    with torch.device("meta"):
        network = create_model(build_config(settings.ModelConfig, networks[0]), networks[0]["learn_sigma"])
    with gzip.open(GOLDEN / "state_dict_layouts.json.gz", "rt") as file:
        names = json.load(file)["ade20k"]["state_dict"]
    assert [[key, list(value.shape)] for key, value in network.state_dict().items()] == names


def test_the_shell_script_passes_what_the_published_commands_pass(tmp_path):
    steps = dict(TRAIN_STEPS="2", FINETUNE_STEPS="1", RANKS="8")
    done, issued = shell("scripts/ade20k.sh", "all", commands=tmp_path / "bin", **steps)
    assert done.returncode == 0, done.stderr
    for (program, arguments), (*launcher, script_program), in_script in (
        (shown, command[:5], command[5:]) for shown, command in zip(published(), issued, strict=False)
    ):
        assert launcher == ["mpiexec", "-n", "8", "python"] and script_program == program
        shown, given = (parse_flags(CLASSES[program], words) for words in (arguments, in_script))
        assert shown.pop("use_fp16") and given.pop("precision") == "fp16"  # two spellings of one setting
        for name in ("logdir", "max_steps"):
            given.pop(name, None)
        assert shown == given
