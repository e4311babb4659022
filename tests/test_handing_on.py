"""Folders to hand on: what is in them, the same picture from them, also over a hub, and what is refused."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from data_helpers import REPOSITORY, write_custom
from hub_server import serve
from PIL import Image
from sampling_helpers import DIFFUSION, MODEL, SETTINGS, run_here, save_checkpoint

from guided_diffusion.data.specs import DATASET_MODES
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.settings import ConfigError
from guided_diffusion.weights import hub, model_card, store
from guided_diffusion.weights.store import CheckpointError

LABEL = np.arange(256).reshape(16, 16) // 64
FAST = dict(s=1.5, num_steps=3)
MEANING = {"classes": ["sky", {"name": "ro|ad_*", "color": [9, 8, 7]}, "tree"], "ignore_id": 255}
RECORD = dict(dataset_json=MEANING, training={"drop_rate": 0.2, "logdir": "/home/someone/run", "precision": "bf16"})


def picture(pipeline: SDMPipeline) -> np.ndarray:
    return np.asarray(pipeline(LABEL, **FAST)[0])


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> SDMPipeline:
    run = tmp_path_factory.mktemp("handing_on") / "run"
    return SDMPipeline.from_checkpoint(save_checkpoint(run, Path("/home/someone/data"), **RECORD))


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory) -> Path:
    return Path(pipeline.save_pretrained(tmp_path_factory.mktemp("folder") / "scenes", example=LABEL, **FAST))


def copied(folder: Path, to: Path, **changes) -> Path:
    """A copy of the folder with other parts in its config."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text()) | changes
    (to / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return to


# -- there and back ---------------------------------------------------------------------------------------------------


def test_the_same_picture_bit_for_bit(pipeline, folder):
    again = SDMPipeline.from_pretrained(folder)
    assert np.array_equal(picture(again), picture(pipeline))
    assert again.class_names == pipeline.class_names == ("sky", "ro|ad_*", "tree", "unlabelled")
    assert np.array_equal(again.palette, pipeline.palette)
    assert SDMPipeline.from_checkpoint(folder / "model.safetensors").record["dataset_json"] == MEANING


def test_what_is_in_the_folder(pipeline, folder):
    assert sorted(os.listdir(folder)) == [
        "README.md", "config.json", "example.png", "example_layout.png", "model.safetensors"
    ]  # fmt: skip
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    own = pipeline.model.state_dict()
    assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    text = (folder / "config.json").read_text()
    config = json.loads(text)
    assert "someone" not in text + (folder / "README.md").read_text() and "torch" not in config
    assert (config["model"] | config["diffusion"]).items() == SETTINGS.items()
    assert config["training"] == {"drop_rate": 0.2} and config["data"] == {"dataset_mode": "custom"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # whoever may read one may read all
    # the example is what the three lines make of it
    layout = SDMPipeline.from_pretrained(folder)(folder / "example_layout.png", **FAST)[0]
    page = np.asarray(Image.open(folder / "example.png").convert("RGB"))
    enlarged = np.asarray(layout.resize((256, 256), Image.Resampling.NEAREST))
    top, left = _find(page, enlarged)
    assert np.array_equal(page[top : top + 256, left : left + 256], enlarged)


def _find(page: np.ndarray, part: np.ndarray) -> tuple[int, int]:
    """Where on the page this part begins."""
    for top, left in np.argwhere((page[:-255, :-255] == part[0, 0]).all(-1)):
        if np.array_equal(page[top, left : left + 256], part[0]):
            return top, left
    raise AssertionError("the sample is not on the page")


def test_grey_networks_stay_grey(tmp_path, folder):
    grey = SDMPipeline.from_checkpoint(save_checkpoint(tmp_path / "run", tmp_path, dataset_json={"grey": True}))
    by_hand = SDMPipeline(grey.model, grey.model_config, grey.diffusion_config, grey=True)  # no record at all
    for i, maker in enumerate((grey, by_hand)):
        again = SDMPipeline.from_pretrained(maker.save_pretrained(tmp_path / f"grey{i}"))
        assert again.grey and np.array_equal(picture(again), picture(grey)) and not np.ptp(picture(again), axis=2).any()


def test_the_recommended_precision_is_taken_unless_another_is_named(tmp_path, pipeline):
    folder = pipeline.save_pretrained(tmp_path / "half", precision="bf16")
    assert SDMPipeline.from_pretrained(folder).precision == "bf16"
    exact = SDMPipeline.from_pretrained(folder, precision="fp32")
    assert np.array_equal(picture(exact), picture(pipeline))
    with pytest.raises(ConfigError, match=r"these weights were rounded to bf16: .* precision fp32"):
        SDMPipeline.from_pretrained(folder).save_pretrained(tmp_path / "rounded")
    with pytest.raises(ConfigError, match="unknown settings: licence"):
        pipeline.save_pretrained(tmp_path / "rounded", licence="mit")
    with pytest.raises(ConfigError, match="unknown precision 'fp8'"):
        pipeline.save_pretrained(tmp_path / "rounded", precision="fp8")
    assert os.listdir(tmp_path) == ["half"]


PROGRAM = """
import json, sys
import numpy as np
import guided_diffusion
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.weights.store import CheckpointError

label, fast = np.arange(256).reshape(16, 16) // 64, dict(s=1.5, num_steps=3)
def picture(source, **options):
    return np.asarray(SDMPipeline.from_pretrained(source, **options)(label, **fast)[0]).tolist()
def refusal(call, *words, **options):
    try:
        call(*words, **options)
    except CheckpointError as error:
        return str(error)
found = {"file": guided_diffusion.__file__}
"""
ONLINE = """
folder = sys.argv[1]
found["folder"] = picture(folder)
pipeline = SDMPipeline.from_pretrained(folder)
found["address"] = pipeline.push_to_hub("lab/scenes", license="mit", example=label, **fast)
commit = found["address"].split("/")[-1]
found["hub"] = picture("lab/scenes")
pipeline.model.out[2].weight.data.mul_(1.5)
pipeline.push_to_hub("lab/scenes", message="louder")
found["changed"] = picture("lab/scenes")
found["revision"] = picture("lab/scenes", revision=commit)
found["missing"] = refusal(SDMPipeline.from_pretrained, "lab/nothing")
found["branch"] = refusal(SDMPipeline.from_pretrained, "lab/scenes", revision="nobranch")
found["other"] = refusal(SDMPipeline.from_pretrained, "lab/cats")
found["half"] = refusal(SDMPipeline.from_pretrained, "lab/half")
import os
os.environ["HF_TOKEN"] = "no-token"
found["rights"] = refusal(pipeline.push_to_hub, "lab/scenes")
print(json.dumps(found))
"""
OFFLINE = """
found["hub"] = picture("lab/scenes")
found["revision"] = picture("lab/scenes", revision=sys.argv[1])
found["unfetched"] = refusal(SDMPipeline.from_pretrained, "lab/another")
print(json.dumps(found))
"""


def test_there_and_back_over_a_hub_and_from_its_cache(pipeline, folder, tmp_path):
    """In processes of their own, from a copy of the package, against a server on this machine; then without it."""
    pytest.importorskip("huggingface_hub")
    installed = tmp_path / "installed"
    shutil.copytree(REPOSITORY / "guided_diffusion", installed / "guided_diffusion")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"PYTHONPATH": str(installed), "HF_HOME": str(tmp_path / "cache"), "HF_TOKEN": "a-token"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1"}

    def run(program: str, *words: str, **more: str) -> dict:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + program, *words],
            cwd=tmp_path, env=environment | more, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with serve() as server:
        server.repositories |= {"lab/cats": [], "lab/half": []}
        cats = {"config.json": b'{"_class_name": "UNet2DModel", "sample_size": 64}', "model.safetensors": b"x"}
        server.commit("lab/cats", cats)
        server.commit("lab/half", {"config.json": (folder / "config.json").read_bytes()})
        found = run(ONLINE, str(folder), HF_ENDPOINT=server.address)
        (first, files), (_, changed) = server.repositories["lab/scenes"]
    assert Path(found["file"]).is_relative_to(installed)
    ours = picture(pipeline).tolist()
    assert found["folder"] == found["hub"] == found["revision"] == ours != found["changed"]
    assert found["address"].endswith(f"/lab/scenes/commit/{first}")
    for name in ("model.safetensors", "config.json", "example_layout.png"):
        assert files[name] == (folder / name).read_bytes(), name
    card = files["README.md"].decode()
    assert 'license: "mit"' in card and 'from_pretrained("lab/scenes")' in card
    assert changed["model.safetensors"] != files["model.safetensors"]
    assert re.match(
        r"lab/nothing \(no folder here, .*config.json cannot be fetched \(RepositoryNotFound", found["missing"]
    )
    assert "RevisionNotFound" in found["branch"]
    assert "lab/cats" in found["other"] and "a model of diffusers (UNet2DModel), not of this project" in found["other"]
    assert not [request for request in server.requests if "lab/cats" in request and "safetensors" in request]
    assert "model.safetensors cannot be fetched" in found["half"]
    assert re.match(r"lab/scenes cannot be pushed .*with the right to write there", found["rights"])

    offline = run(OFFLINE, first, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="1")
    assert offline["hub"] == found["changed"] and offline["revision"] == ours
    assert "HF_HUB_OFFLINE=1 only what was fetched before" in offline["unfetched"]


# -- what is refused --------------------------------------------------------------------------------------------------


def test_loading_is_strict(folder, tmp_path):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    name = "middle_block.0.in_norm.mlp_shared.0.weight"
    cases = {
        "missing": ({n: t for n, t in weights.items() if n != name}, f"the first that it lacks is {name}"),
        "extra": (weights | {"extra.weight": torch.zeros(1)}, "not known to the network, the first is extra.weight"),
        "shape": (weights | {name: torch.zeros(128, 9, 3, 3)}, "9 layout channels, the flags give 4"),
    }
    for case, (changed, message) in cases.items():
        broken = copied(folder, tmp_path / case)
        safetensors.torch.save_file(changed, broken / "model.safetensors")
        with pytest.raises(CheckpointError, match=message):
            SDMPipeline.from_pretrained(broken)


@pytest.mark.parametrize(
    "damage,message",
    [(b"", "is empty"), (b"not a file of this kind", "is no safetensors file"), (None, "is truncated")],
    ids=["empty", "other", "cut short"],
)
def test_damaged_weights(folder, tmp_path, damage, message):
    broken = copied(folder, tmp_path / "broken") / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-5] if damage is None else damage)
    with pytest.raises(CheckpointError, match=f"{broken} {message}"):
        SDMPipeline.from_pretrained(broken.parent)
    broken.unlink()
    with pytest.raises(CheckpointError, match=f"there is no checkpoint {broken}"):
        SDMPipeline.from_pretrained(broken.parent)


@pytest.mark.parametrize(
    "changes,message",
    [
        (
            {"_class_name": "UNet2DModel", "model": None, "diffusion": None},
            r"is a model of diffusers \(UNet2DModel\), not of this project",
        ),
        (
            {"model_type": "vit", "model": None, "diffusion": None},
            r"is a model of transformers \(vit\), not of this project",
        ),
        ({"library_name": None}, r"no folder that was handed on .*SDMPipeline\.from_checkpoint"),
        ({"library_name": "another"}, "no folder that was handed on"),
        ({"format": 2}, "has format 2, and this version of the package knows 1: update it"),
        ({"model": None}, "KeyError: 'model'"),
        ({"model": {"num_classes": "many"}}, "num_classes must be a whole number; got 'many'"),
        ({"classes": ["one"]}, "1 classes, 0 of them with a color, for a network of 4"),
    ],
)
def test_a_config_that_is_not_ours(folder, tmp_path, changes, message):
    with pytest.raises((CheckpointError, ValueError), match=message):
        SDMPipeline.from_pretrained(copied(folder, tmp_path / "other", **changes))


def test_what_is_no_model(folder, tmp_path, monkeypatch):
    for source, message in (
        (folder / "model.safetensors", "is a file: give its folder, or use SDMPipeline.from_checkpoint"),
        (tmp_path, "has no config.json; is it a model of this project?"),
        (tmp_path / "not" / "there", "there is no folder .*not/there, and it is no id of a model on a hub"),
    ):
        with pytest.raises(CheckpointError, match=message):
            SDMPipeline.from_pretrained(source)
    with pytest.raises(CheckpointError, match="is a folder, which has no revision 'main'"):
        SDMPipeline.from_pretrained(folder, revision="main")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match="models on a hub need the package huggingface_hub: pip install"):
        SDMPipeline.from_pretrained("lab/scenes")


def test_into_a_folder_that_holds_something(pipeline, folder, tmp_path):
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=f"{folder} holds another model"):
        pipeline.save_pretrained(folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"holds notes\.txt: give a new or an empty folder"):
        pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"notes\.txt is a file"):
        pipeline.save_pretrained(tmp_path / "notes.txt")
    assert os.listdir(tmp_path) == ["notes.txt"]
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    pipeline.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and np.array_equal(
        picture(SDMPipeline.from_pretrained(tmp_path / "empty")), picture(pipeline)
    )


@pytest.mark.parametrize("limit", [500, 10_000, 1_000_000], ids=["config", "card", "weights"])
def test_a_full_disk_leaves_nothing(pipeline, tmp_path, limit, monkeypatch):
    """No file may grow beyond `limit` bytes: the system refuses the write, in whichever file that is."""
    figures = tmp_path / "fid.json"
    figures.write_text(json.dumps(FID))
    if limit == 10_000:  # the card is written after the weights
        monkeypatch.setattr(safetensors.torch, "save_file", lambda tensors, path, metadata: Path(path).touch())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*new.* nothing was left there") as refusal:
            pipeline.save_pretrained(tmp_path / "deep" / "new", figures=[figures] * 60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in str(refusal.value)
    assert not list((tmp_path / "deep").iterdir())


def test_nothing_is_left_of_an_interrupted_writer(pipeline, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pipeline.save_pretrained(tmp_path / "new")
    assert not list(tmp_path.iterdir())


# -- the card ---------------------------------------------------------------------------------------------------------

FID = {
    "metric": "FID", "score": 42.123456, "comparable": False, "date": "2025-01-02T03:04:05Z",
    "sources": [{"path": "/home/someone/x", "images": {"count": 70}}, {"images": {"count": 64}}],
    "preprocessing": "published: bicubic to 256x256", "warnings": ["/home/someone/x/images: only 64 images"],
}  # fmt: skip
MIOU = {
    "metric": "mIoU", "score": 43.94, "images": {"count": 70, "counted": 64},
    "preprocessing": {"ids": "remap /home/someone/remap.json of labels, ignored 255"},
    "segmenter": {"source": "../someone/seg.pt"}, "warnings": [],
}  # fmt: skip
LPIPS = {"metric": "LPIPS", "score": 0.5123, "layouts": 9, "samples_per_layout": 4, "images": {"count": 36}}


def metadata(card: str) -> dict:
    return pytest.importorskip("yaml").safe_load(card.split("---\n")[1])


def test_the_card(pipeline, tmp_path):
    files = []
    for figure in (FID, MIOU, LPIPS):
        files.append(tmp_path / f"{figure['metric']}.json")
        files[-1].write_text(json.dumps(figure))
    folder = pipeline.save_pretrained(
        tmp_path / "new", name='lab/it\'s: "a" #name', license="cc-by-4.0", datasets=["lab/a", "b: c"], figures=files
    )
    card = Path(folder, "README.md").read_text()
    about = metadata(card)
    assert about["library_name"] == "semantic-diffusion-model" and about["pipeline_tag"] == "image-to-image"
    assert about["license"] == "cc-by-4.0" and about["datasets"] == ["lab/a", "b: c"]
    assert "semantic-image-synthesis" in about["tags"]
    for line in (
        'SDMPipeline.from_pretrained("lab/it\'s: \\"a\\" #name")',
        "| 0 | sky | `#", "| 1 | ro\\|ad\\_\\* | `#090807` | 1 |", "| 3 | unlabelled | `#000000` | 255 |",
        "| 42.12 | 70 and 64 images | published: bicubic to 256x256; not comparable with published scores; 2025-01",
        "| 43.94 | 64 images | ids: remap remap.json of labels, ignored 255; segmenter: seg.pt |",
        "| 0.5123 | 9 layouts, 4 samples each |",
        "- FID: images: only 64 images",
    ):  # fmt: skip
        assert line in card, line
    assert "someone" not in card and "example" not in card  # none was asked for
    assert card.count("```") == 2


def test_what_nobody_said_is_not_in_the_card(tmp_path):
    run = tmp_path / "run"
    untold = SDMPipeline.from_checkpoint(save_checkpoint(run, tmp_path, data=None, training={"drop_rate": 0.0}))
    folder = Path(untold.save_pretrained(tmp_path / "new", example=LABEL, num_steps=2))
    card = (folder / "README.md").read_text()
    about = metadata(card)
    assert "license" not in about and "datasets" not in about and "## Figures" not in card
    assert "4 ids; what they mean is not recorded" in card
    # layouts were never dropped: neither the example nor the three lines are guided
    assert "`s=1.0, " in card and 'pipeline("layout.png", s=1.0)' in card
    assert "classes" not in json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("mode", sorted(set(DATASET_MODES) - {"custom"}))
def test_classes_of_the_benchmarks_are_told(mode):
    """By the ids of the network, with those of the data set's files where they differ."""
    names, palette = model_card.get_spec(mode).class_names, model_card.get_spec(mode).palette
    model = type(MODEL)(num_classes=len(names))
    record = {"data": {"dataset_mode": mode, "data_dir": "x"}}
    config = hub.folder_config(model, DIFFUSION, record, names=names, palette=palette, grey=False, precision="")
    card = model_card.model_card(config, model_card.About("x"), 1000, 8)
    assert len(re.findall(r"^\| \d+ \|", card, re.M)) == len(names)
    assert 'pipeline("layout.png", instance_map="instances.png")' in card
    assert ("in the data set's files" in card) == (mode in ("ade20k", "coco"))
    if mode == "ade20k":  # 0 is unlabelled in its files, and 150 here
        assert re.search(r"^\| 0 \| wall \| .* \| 1 \|$", card, re.M) and re.search(
            r"^\| 150 \| .* \| 0 \|$", card, re.M
        )


@pytest.mark.parametrize(
    "content", ["", "[]", '{"metric": "FID"}', '{"metric": "FID", "score": null}', '{"metric": 1, "score": 2}']
)
def test_figures_that_are_none(pipeline, tmp_path, content):
    (tmp_path / "score.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"score\.json is no record of a score .* with --json"):
        pipeline.save_pretrained(tmp_path / "new", figures=[tmp_path / "score.json"])
    assert os.listdir(tmp_path) == ["score.json"]


# -- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "scripts"))
    return lambda *flags: run_here("export_model.py", *map(str, flags))


def test_a_run_is_exported(script, tmp_path):
    data = tmp_path / "data"
    write_custom(data, classes=4)
    path = save_checkpoint(tmp_path / "run", data, dataset_json={})
    label = sorted((data / "val" / "labels").iterdir())[-1]
    common = ("--model_path", path, "--num_steps", 2)
    done = script(*common, "--out", tmp_path / "named", "--example_label", label, "--license", "mit")
    assert done.returncode == 0, done.stdout
    assert "made " in done.stdout and 'license: "mit"' in (tmp_path / "named" / "README.md").read_text()
    done = script(*common, "--out", tmp_path / "first")
    assert done.returncode == 0 and (tmp_path / "first" / "example.png").exists()
    shown = [np.asarray(Image.open(tmp_path / name / "example_layout.png")) for name in ("named", "first")]
    assert shown[0].shape == (16, 16) and not np.array_equal(*shown)
    sampled = []
    for name, model in (("a", path), ("b", tmp_path / "first" / "model.safetensors")):  # both know what ids mean
        flags = ("--labels_dir", data / "val" / "labels", "--results_path", tmp_path / name, "--num_samples", 1)
        done = run_here("image_sample.py", *map(str, ("--model_path", model, *flags, "--num_steps", 2)))
        assert done.returncode == 0, done.stdout
        sampled.append([(p.name, p.read_bytes()) for p in sorted((tmp_path / name / "samples").iterdir())])
    assert len(sampled[0]) == 1 and sampled[0] == sampled[1]
    done = script(*common, "--out", tmp_path / "first")
    assert done.returncode == 1 and "holds another model" in done.stdout
    shutil.rmtree(data)
    done = script(*common, "--out", tmp_path / "without")
    assert done.returncode == 0 and "note: no example page" in done.stdout
    assert not (tmp_path / "without" / "example.png").exists()


def test_one_of_several_networks_is_exported(script, tmp_path):
    path = save_checkpoint(tmp_path / "run", tmp_path / "no data")
    weights = store.load_weights(path)
    averaged = {name: value + 1 for name, value in weights.items()}
    torch.save({"model": weights, "ema": averaged}, path)
    done = script("--model_path", path, "--out", tmp_path / "new")
    assert done.returncode == 1 and "choose one of model, ema with --weights_key" in done.stdout
    assert script("--model_path", path, "--out", tmp_path / "new", "--weights_key", "ema").returncode == 0
    handed_on = store.load_weights(str(tmp_path / "new" / "model.safetensors"))
    assert all(torch.equal(handed_on[name], value) for name, value in averaged.items())


def test_exports_that_cannot_be(script, tmp_path):
    path = save_checkpoint(tmp_path / "run", tmp_path)
    for flags, message in (
        (("--model_path", tmp_path / "no.pt"), "there is no checkpoint"),
        (("--model_path", path, "--example_label", tmp_path / "no.png"), "no"),
        (("--model_path", path, "--figures", tmp_path / "no.json"), "is no record of a score"),
    ):
        done = script(*flags, "--out", tmp_path / "new")
        assert done.returncode == 1 and "error: " in done.stdout and message in done.stdout
    (tmp_path / "run" / "config.json").unlink()
    done = script("--model_path", path, "--out", tmp_path / "new")
    assert done.returncode == 1 and "has no config.json beside it" in done.stdout
    assert "scripts/convert_checkpoint.py" in done.stdout
    assert not (tmp_path / "new").exists()
