"""The mIoU scorer against scikit-learn and torchmetrics, with each kind of segmenter; and bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from evaluation_helpers import call, fails, last_number, load_script, run_script, truncate, write_pictures
from PIL import Image

from guided_diffusion.data.specs import get_spec

miou = load_script("miou")
label_maps = load_script("label_maps")

CLASSES = 5
HEIGHT, WIDTH = 24, 32
COUNT = 4


def write_maps(folder, maps):
    folder.mkdir(parents=True, exist_ok=True)
    for index, ids in enumerate(maps):
        Image.fromarray(ids.astype(np.uint8)).save(folder / f"{index:03d}.png")
    return folder


def random_maps(seed, classes=CLASSES):
    return np.random.default_rng(seed).integers(0, classes, (COUNT, HEIGHT, WIDTH))


@pytest.fixture
def results(tmp_path):
    """Layouts with ids 0..4 and some 255, samples, and predictions that are right on most pixels."""
    labels = random_maps(0)
    predictions = np.where(np.random.default_rng(1).random(labels.shape) < 0.7, labels, random_maps(2))
    labels[:, :3] = 255
    write_maps(tmp_path / "labels", labels)
    write_maps(tmp_path / "predictions", predictions)
    write_pictures(tmp_path / "samples", COUNT, width=WIDTH, height=HEIGHT)
    return tmp_path


def stacked(folder):
    return np.stack([np.array(Image.open(path)) for path in sorted(folder.iterdir())])


def score(results, *flags, segmenter=None):
    """The report of a run as a dictionary."""
    segmenter = segmenter or results / "predictions"
    call("miou", results, "--segmenter", segmenter, "--json", results / "r.json", *flags)
    return json.loads((results / "r.json").read_text())


class BrightestChannel(torch.nn.Module):
    """A segmenter whose class is the brightest channel: scores at half the resolution."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2)


class ScoresAndFeatures(torch.nn.Module):
    """One that returns features beside its scores."""

    def forward(self, x):
        return torch.nn.functional.avg_pool2d(x, 2), x


class OnlyAName(torch.nn.Module):
    """One that returns no scores."""

    def forward(self, x):
        return "scores"


@pytest.fixture
def torchscript(tmp_path):
    path = tmp_path / "segmenter.pt"
    torch.jit.script(BrightestChannel()).save(path)
    return path


@pytest.fixture
def three_classes(results):
    write_maps(results / "labels", random_maps(3, classes=3))
    return results


# --- the scores -------------------------------------------------------------------------------------------------------


def test_scores_equal_scikit_learn_and_torchmetrics(results, capsys):
    from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score
    from torchmetrics.functional.classification import multiclass_jaccard_index

    record = score(results, "--num_classes", CLASSES)
    printed = last_number(capsys.readouterr().out)
    labels, predictions = stacked(results / "labels").ravel(), stacked(results / "predictions").ravel()
    kept = labels != 255
    labels, predictions = labels[kept], predictions[kept]
    ours = np.array(record["confusion"])
    assert np.array_equal(ours[:, :CLASSES], confusion_matrix(labels, predictions, labels=range(CLASSES)))
    assert not ours[:, CLASSES].any()
    each = 100 * jaccard_score(labels, predictions, average=None)
    assert record["class_iou"] == pytest.approx(each, rel=1e-12)  # both in float64
    assert record["score"] == pytest.approx(each.mean(), rel=1e-12)
    assert record["pixel_accuracy"] == pytest.approx(100 * accuracy_score(labels, predictions), rel=1e-12)
    weighted = 100 * jaccard_score(labels, predictions, average="weighted")
    assert record["frequency_weighted_iou"] == pytest.approx(weighted, rel=1e-12)
    peer = multiclass_jaccard_index(torch.from_numpy(predictions), torch.from_numpy(labels), CLASSES)
    assert record["score"] == pytest.approx(100 * peer.item(), rel=1e-6)  # torchmetrics counts in float32
    assert printed == pytest.approx(record["score"], abs=0.005)


def test_perfect_predictions_score_100(results):
    record = score(results, "--num_classes", CLASSES, segmenter=results / "labels")
    assert (record["score"], record["pixel_accuracy"], record["frequency_weighted_iou"]) == (100, 100, 100)


def test_classes_that_occur_nowhere_do_not_count_and_false_ones_do():
    confusion = torch.tensor([[6, 2, 0, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 0, 3, 4]])
    scores = label_maps.scores_of(confusion)
    # class 0: 6 of 6 + 2; class 1: predicted only; class 2: nowhere; class 3: 3 of 8, four pixels none of the classes
    assert scores["class_iou"] == [75.0, 0.0, None, 37.5]
    assert scores["miou"] == pytest.approx((75 + 0 + 37.5) / 3)
    assert scores["pixel_accuracy"] == pytest.approx(100 * 9 / 16)
    assert scores["frequency_weighted_iou"] == pytest.approx((8 * 75 + 8 * 37.5) / 16)


def test_batches_and_workers_do_not_change_the_counts(results, torchscript, three_classes):
    flags = ["--num_classes", 3]
    records = [
        score(results, *flags, *more, segmenter=torchscript)
        for more in (["--batch_size", 1], ["--batch_size", 3, "--num_workers", 2])
    ]
    assert records[0]["confusion"] == records[1]["confusion"]
    assert np.sum(records[0]["confusion"]) == COUNT * HEIGHT * WIDTH


# --- ids --------------------------------------------------------------------------------------------------------------


def test_cityscapes_remap_is_that_of_its_authors(tmp_path):
    """The 19 train ids in the order of cityscapesscripts' helpers/labels.py; void classes are ignored."""
    names = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole", 19: "traffic light"}
    names |= {20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"}
    names |= {27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
    order = "road sidewalk building wall fence pole traffic_light traffic_sign vegetation terrain sky person rider car"
    order = [name.replace("_", " ") for name in f"{order} truck bus train motorcycle bicycle".split()]
    classes = label_maps.make_classes("cityscapes", None, (255,), False)
    assert classes.count == 19
    for label_id in range(34):
        expected = order.index(names[label_id]) if label_id in names else label_maps.IGNORED
        assert classes.of_labels[label_id] == expected


def test_remapped_labels_against_predictions_of_either_kind(tmp_path):
    labels = np.random.default_rng(0).integers(0, 34, (COUNT, HEIGHT, WIDTH))
    write_maps(tmp_path / "labels", labels)
    table = label_maps.make_classes("cityscapes", None, (255,), False).of_labels.numpy()
    train_ids = np.where(table[labels] < 0, 255, table[labels])
    write_maps(tmp_path / "predictions", train_ids)  # as segmentation code saves them, void as 255
    assert score(tmp_path, "--remap", "cityscapes")["score"] == 100
    with fails("labels.*holds id.*but there are 19 classes"):  # 34 ids as predictions, by mistake
        score(tmp_path, "--remap", "cityscapes", segmenter=tmp_path / "labels")
    flags = ["--remap", "cityscapes", "--remap_predictions", "True"]
    assert score(tmp_path, *flags, segmenter=tmp_path / "labels")["score"] == 100
    write_maps(tmp_path / "void", np.where(labels == 7, 0, labels))  # road is predicted as a void class
    assert score(tmp_path, *flags, segmenter=tmp_path / "void")["class_iou"][0] == 0


def test_ade20k_remap_drops_the_unlabelled_and_counts_from_zero(tmp_path):
    labels = np.random.default_rng(0).integers(0, 151, (2, HEIGHT, WIDTH))
    write_maps(tmp_path / "labels", labels)
    write_maps(tmp_path / "predictions", (labels - 1).clip(0))
    record = score(tmp_path, "--remap", "ade20k-annotations")
    assert record["score"] == 100
    assert np.sum(record["confusion"]) == (labels > 0).sum()


def test_ade20k_of_a_results_folder_is_scored_by_the_networks_ids(tmp_path):
    """What sampling writes to labels/ for the published annotations: the layout itself as the prediction is perfect."""
    table = get_spec("ade20k").lookup_table(label_maps.IDS)
    annotations = np.random.default_rng(0).integers(0, 151, (2, HEIGHT, WIDTH))
    write_maps(tmp_path / "labels", table[annotations])
    write_maps(tmp_path / "predictions", (annotations - 1).clip(0))
    record = score(tmp_path, "--remap", "ade20k")
    assert record["score"] == 100
    assert np.sum(record["confusion"]) == (annotations > 0).sum()


def test_a_remap_file_and_ignored_ids(results, tmp_path):
    (tmp_path / "map.json").write_text(json.dumps({"0": 0, "1": 0, "2": 1, "3": 1}))
    write_maps(tmp_path / "two", stacked(results / "labels") // 2 % 2)
    record = score(results, "--remap", tmp_path / "map.json", segmenter=tmp_path / "two")
    labels = stacked(results / "labels")
    assert record["num_classes"] == 2
    assert np.sum(record["confusion"]) == (labels < 4).sum()
    assert record["score"] == 100
    record = score(results, "--num_classes", CLASSES, "--ignore_ids", "255,0")
    assert np.sum(record["confusion"]) == ((labels < 5) & (labels > 0)).sum()
    assert record["class_iou"][0] is None


# --- segmenters -------------------------------------------------------------------------------------------------------


def predicted_by_hand(results, mode):
    """What BrightestChannel sees with ImageNet's normalisation, at the label map's size."""
    images = torch.from_numpy(stacked(results / "samples")).permute(0, 3, 1, 2).double() / 255
    mean, deviation = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    x = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(deviation).view(3, 1, 1)
    scores = torch.nn.functional.avg_pool2d(x, 2)
    if mode == "nearest":
        return scores.argmax(1).repeat_interleave(2, 1).repeat_interleave(2, 2).numpy()
    return torch.nn.functional.interpolate(scores, (HEIGHT, WIDTH), mode="bilinear").argmax(1).numpy()


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_torchscript_segmenter_and_how_its_scores_reach_the_labels(results, three_classes, torchscript, mode):
    write_maps(results / "labels", predicted_by_hand(results, mode))
    record = score(results, "--num_classes", 3, "--interpolation", mode, segmenter=torchscript)
    assert record["score"] > 99.5  # float32 against float64: a tie may go the other way
    other = score(results, "--num_classes", 3, "--interpolation", {"bilinear": "nearest"}.get(mode, "bilinear"),
                  segmenter=torchscript)  # fmt: skip
    assert other["score"] < record["score"]
    assert record["segmenter"]["kind"] == "TorchScript"
    assert len(record["segmenter"]["sha256"]) == 64
    assert mode in record["preprocessing"]["predictions brought there"]


def test_input_size_mean_and_deviation_are_what_the_network_gets(results, three_classes, torchscript):
    plain = score(results, "--num_classes", 3, segmenter=torchscript)
    sized = score(results, "--num_classes", 3, "--input_size", "12x16", segmenter=torchscript)
    shifted = score(results, "--num_classes", 3, "--mean", "0,0,100", "--std", "1,1,1", segmenter=torchscript)
    assert "bilinear to 16x12" in sized["preprocessing"]["network input"]
    assert sized["confusion"] != plain["confusion"]
    assert np.array(shifted["confusion"])[:, 2].sum() == 0  # a mean of 100 in blue: never the brightest
    assert shifted["segmenter"]["mean"] == [0, 0, 100]


def test_a_network_that_answers_with_bytes(results, three_classes, torchscript, tmp_path):
    """Ids as uint8, which would index as a mask, count like the same ids as integers."""

    class Ids(torch.nn.Module):
        def __init__(self, kind: torch.dtype):
            super().__init__()
            self.kind = kind

        def forward(self, x):
            return x.argmax(1).to(self.kind)

    records = []
    for kind in (torch.uint8, torch.int64):
        torch.jit.script(Ids(kind)).save(tmp_path / "ids.pt")
        records.append(score(results, "--num_classes", 3, segmenter=tmp_path / "ids.pt")["confusion"])
    assert records[0] == records[1] and np.array(records[0]).sum() > 0


def test_a_network_that_answers_with_a_tuple(results, three_classes, torchscript, tmp_path):
    """The scores come first; what comes after them, features or auxiliary scores, is not wanted."""
    torch.jit.script(ScoresAndFeatures()).save(tmp_path / "tuple.pt")
    plain, first = (
        score(results, "--num_classes", 3, segmenter=path)["confusion"] for path in (torchscript, tmp_path / "tuple.pt")
    )
    assert first == plain
    torch.jit.script(OnlyAName()).save(tmp_path / "name.pt")
    with fails("name.pt returns str; expected a tensor"):
        score(results, "--num_classes", 3, segmenter=tmp_path / "name.pt")


@pytest.mark.parametrize(
    "name", ["x.pt", "run/x.pt", "./segformer", "/nowhere/segformer", "out/run/segformer", "a.ONNX"]
)
def test_a_mistyped_file_is_not_looked_for_on_a_hub(results, name, monkeypatch):
    segmenters = load_script("segmenters")
    monkeypatch.setattr(segmenters, "_load_hugging_face", lambda *_: pytest.fail("went looking on a hub"))
    with fails("no such file or folder"):
        score(results, "--num_classes", CLASSES, segmenter=name)


def test_hugging_face_segmenter(results, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SegformerConfig(
        num_labels=CLASSES, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 2, 2],
        decoder_hidden_size=16, sr_ratios=[2, 2, 1, 1],
    )  # fmt: skip
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    folder = tmp_path / "segformer"
    model.save_pretrained(folder)
    x = torch.from_numpy(stacked(results / "samples")).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        logits = model((x - 0.5) / 0.25).logits
        expected = torch.nn.functional.interpolate(logits, (HEIGHT, WIDTH), mode="bilinear").argmax(1).numpy()
    write_maps(results / "labels", expected)
    processor = {"image_processor_type": "SegformerImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps({**processor, "do_resize": True}))
    record = score(results, "--num_classes", CLASSES, segmenter=folder)
    assert record["pixel_accuracy"] > 99.5  # the same network; ties after the interpolation
    assert record["segmenter"]["mean"] == [0.5] * 3
    assert any("made for images resized" in warning for warning in record["warnings"])
    assert len(record["segmenter"]["sha256"]["model.safetensors"]) == 64
    with fails("knows 5 classes, the score has 7"):
        score(results, "--num_classes", 7, segmenter=folder)


def test_predictions_of_another_size_need_a_named_interpolation(results):
    halves = stacked(results / "predictions")[:, ::2, ::2]
    write_maps(results / "predictions", halves)
    with fails("predicted ids of 16x12 for a label map of 32x24.*--interpolation nearest"):
        score(results, "--num_classes", CLASSES)
    write_maps(results / "labels", halves.repeat(2, axis=1).repeat(2, axis=2))
    assert score(results, "--num_classes", CLASSES, "--interpolation", "nearest")["score"] == 100


def test_the_script_runs_by_itself(results):
    done = run_script("miou", results, "--segmenter", results / "predictions", "--num_classes", CLASSES)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("mIoU: ")


# --- bad input --------------------------------------------------------------------------------------------------------


def test_ids_outside_the_classes_are_named_before_the_network_runs(results, torchscript, monkeypatch):
    monkeypatch.setattr(miou, "load_segmenter", lambda *_: pytest.fail("the network was loaded first"))
    with fails(r"labels/000.png: holds id 3, 4, but there are 3 classes, 0..2; see --num_classes"):
        score(results, "--num_classes", 3, segmenter=torchscript)


def test_names_that_do_not_match(results):
    (results / "predictions" / "001.png").unlink()
    with fails("1 names are in one of .*labels and .*predictions only: 001"):
        score(results, "--num_classes", CLASSES)
    record = score(results, "--num_classes", CLASSES, "--skip_bad", "True")
    assert record["names"] == {"matched": 3, "only in labels": ["001"], "only in predictions": []}
    for path in (results / "predictions").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with fails("no name in common"):
        score(results, "--num_classes", CLASSES, "--skip_bad", "True")


def test_folders_and_segmenters_that_are_missing(results, tmp_path):
    with fails("labels: no such folder"):
        score(results, "--num_classes", CLASSES, "--labels", "nowhere/labels")
    with fails("neither a folder of label maps, nor a TorchScript file, nor a Hugging Face"):
        (tmp_path / "nothing").mkdir()
        (tmp_path / "nothing" / "config.json").write_text("{}")
        score(results, "--num_classes", CLASSES, segmenter=tmp_path / "nothing")
    (tmp_path / "text.pt").write_text("no network")
    with fails("text.pt: not a TorchScript file"):
        score(results, "--num_classes", CLASSES, segmenter=tmp_path / "text.pt")


@pytest.mark.parametrize("part", ["labels", "predictions"])
def test_unreadable_maps_are_named_or_left_out(results, part):
    bad = results / part / "002.png"
    truncate(bad, 0.5)
    with fails(f"{bad}.*--skip_bad True"):
        score(results, "--num_classes", CLASSES)
    assert score(results, "--num_classes", CLASSES, "--skip_bad", "True")["images"]["counted"] == 3


@pytest.mark.parametrize("part", ["labels", "predictions"])
def test_coloured_label_maps_are_refused(results, part):
    write_pictures(results / part, COUNT, width=WIDTH, height=HEIGHT)
    with fails("mode RGB, but a label map has one channel"):
        score(results, "--num_classes", CLASSES)


def test_nothing_to_score(results):
    with fails("no pixel has a label that is scored"):
        score(results, "--num_classes", CLASSES, "--ignore_ids", "0,1,2,3,4,255")


def test_flags_that_do_not_fit(results, tmp_path):
    cases = {
        "--num_classes is needed with --remap none": [],
        "at most 8192 classes": ["--num_classes", 9000],
        "--ignore_ids 65536": ["--num_classes", 5, "--ignore_ids", "65536"],
        "has class 18 of 10 classes": ["--remap", "cityscapes", "--num_classes", 10],
        "nor a readable file": ["--remap", "cityscape"],
    }
    for message, flags in cases.items():
        with fails(message):
            score(results, *flags)
    for content in ("[1, 2]", "{}", '{"70000": 1}', "{"):
        (tmp_path / "map.json").write_text(content)
        with fails("--remap .*map.json: "):
            score(results, "--remap", tmp_path / "map.json")


def test_a_network_that_fails_on_the_images_is_named(results, tmp_path):
    class Tall(torch.nn.Module):
        def forward(self, x):
            return x.reshape(1, 1, 1, 7)

    torch.jit.script(Tall()).save(tmp_path / "tall.pt")
    with fails("tall.pt fails on an image of 32x24"):
        score(results, "--num_classes", CLASSES, segmenter=tmp_path / "tall.pt")


# --- more than 8 bits, other orders -----------------------------------------------------------------------------------


def test_more_than_256_classes(tmp_path):
    """Labels and predictions of 16 bits, against a count by hand; the class 255 is scored like any other."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 300, (COUNT, HEIGHT, WIDTH))
    predictions = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 300, labels.shape))
    for name, maps in (("labels", labels), ("predictions", predictions)):
        (tmp_path / name).mkdir()
        for index, ids in enumerate(maps):
            Image.fromarray(ids.astype(np.uint16)).save(tmp_path / name / f"{index:03d}.png")
    record = score(tmp_path, "--num_classes", 300)
    ious = [((labels == i) & (predictions == i)).sum() / ((labels == i) | (predictions == i)).sum() for i in range(300)]
    assert record["class_iou"] == pytest.approx([100 * iou for iou in ious])
    assert record["score"] == pytest.approx(100 * np.mean(ious))
    with fails("holds id .*, but there are 299 classes"):
        score(tmp_path, "--num_classes", 299)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_equal_channels_count_as_one(results, mode):
    expected = score(results, "--num_classes", CLASSES)["confusion"]
    for path in (results / "predictions").iterdir():
        Image.open(path).convert(mode).save(path)
    assert score(results, "--num_classes", CLASSES)["confusion"] == expected


def test_the_two_orders_of_celebamask(tmp_path):
    """The table against the two lists of names; in the other order the score is low, and a warning names it."""
    parser = (
        "background skin l_brow r_brow l_eye r_eye eye_g l_ear r_ear ear_r nose mouth u_lip l_lip neck neck_l cloth"
    )
    parser = [*parser.split(), "hair", "hat"]
    official = list(get_spec("celeba").class_names)
    assert {official[i]: parser[k] for k, i in label_maps.REMAPS["celeba-face-parser"].items()} == {
        n: n for n in official
    }
    labels = random_maps(0, classes=19)
    write_maps(tmp_path / "labels", labels)
    write_maps(tmp_path / "predictions", np.array([parser.index(name) for name in official])[labels])
    record = score(tmp_path, "--num_classes", 19)
    assert record["score"] < 25 and "the order celeba-face-parser of the predicted ids" in record["warnings"][0]
    assert score(tmp_path, "--num_classes", 19, "--remap_predictions", "celeba-face-parser")["score"] == 100
    assert (
        "celeba-face-parser of predictions"
        in score(tmp_path, "--num_classes", 19, "--remap_predictions", "celeba-face-parser")["preprocessing"]["ids"]
    )


id_orders = load_script("id_orders")


def confused(order, noise=0.1):
    """The confusion matrix of labels of equally common classes, predicted as order[class] but for some noise."""
    count = len(order)
    counts = torch.full((count, count + 1), 100 * noise / count)
    counts[torch.arange(count), torch.tensor(order)] += 100
    return counts.long() + 1


def test_the_order_that_would_score_best_is_named():
    assert id_orders.order_advice(confused(range(19))) == ""
    table = label_maps.REMAPS["celeba-face-parser"]
    order = [next(k for k, i in table.items() if i == c) for c in range(19)]
    assert id_orders.order_advice(confused(order)).startswith("the order celeba-face-parser of the predicted ids would")
    advice = id_orders.order_advice(confused([*range(1, 60), 0]))
    assert advice.startswith("predicted ids that are 1 too high") and '"1": 0' in advice
    permutation = np.random.default_rng(0).permutation(12).tolist()
    advice = id_orders.order_advice(confused(permutation))
    named = json.loads(advice[advice.index("{") : advice.index("}") + 1])
    assert named == {str(permutation[i]): i for i in range(12)}
    assert id_orders.order_advice(torch.ones(12, 13).long()) == ""


def test_a_low_score_of_photographs_is_explained(tmp_path, capsys):
    labels = random_maps(0, classes=12)
    write_maps(tmp_path / "labels", labels)
    write_maps(tmp_path / "predictions", (labels + 1) % 12)
    record = score(tmp_path, "--num_classes", 12)
    assert record["score"] == 0 and "predicted ids that are 1 too high" in record["warnings"][0]
    assert "the mIoU is 0.0, but" in capsys.readouterr().err
    write_maps(tmp_path / "predictions", random_maps(1, classes=12))
    assert score(tmp_path, "--num_classes", 12)["warnings"] == []
    assert "does this segmenter know" in score(tmp_path, "--num_classes", 12, "--samples", "images")["warnings"][0]
