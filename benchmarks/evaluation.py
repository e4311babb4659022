"""How much faster the scorers are than pytorch-fid and a plain pairwise LPIPS loop, at equal scores.

    python benchmarks/evaluation.py --images 2000

Every comparison alternates both sides in one run, so that other load on the machine meets both; it prints each round's
seconds, the scores of both and the ratio of the medians. The weights are seeded random ones, equal on both sides, which
does not change the time. Needs the test extra. `--parts` chooses among:

distance  statistics and Frechet distance of N features of 2048 dimensions against numpy.cov and SciPy's square root
features  Inception features of one batch against pytorch-fid's network
command   the whole FID command on two folders of N images of 256x256 against pytorch-fid's command
lpips     LPIPS of N images of 256x256, ten samples a layout, against a loop over the pairs
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "tests"))

from evaluation_helpers import load_script, seeded_state, write_pictures  # noqa: E402

SAMPLES = 10
BATCH = 32


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> None:
    """Runs both in turn and prints seconds, results and the ratio."""
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    results = {}
    for _ in range(rounds):
        for side, run in (("ours", ours), ("theirs", theirs)):
            start = time.perf_counter()
            results[side] = run()
            seconds[side].append(time.perf_counter() - start)
    ratio = statistics.median(seconds["theirs"]) / statistics.median(seconds["ours"])
    listed = {side: ", ".join(f"{value:.2f}" for value in values) for side, values in seconds.items()}
    print(f"{name}: {ratio:.2f} times faster (ours {listed['ours']} s; theirs {listed['theirs']} s)")
    print(f"  results: ours {results['ours']}, theirs {results['theirs']}", flush=True)


def compare_distance(images: int, rounds: int) -> None:
    from pytorch_fid.fid_score import calculate_frechet_distance

    frechet = load_script("frechet")
    generator = np.random.default_rng(0)
    mixing = generator.standard_normal((2048, 2048)) * np.linspace(0.1, 1, 2048) / 45  # axes of unequal spread
    sets = [
        np.maximum(generator.standard_normal((images, 2048)) @ mixing * scale, 0).astype(np.float32)
        for scale in (1.0, 1.1)
    ]

    def ours() -> float:
        moments = []
        for features in sets:
            stream = frechet.FeatureStatistics(2048)
            for start in range(0, images, BATCH):
                stream.update(features[start : start + BATCH])
            moments += stream.result()
        return frechet.frechet_distance(*moments)

    def theirs() -> float:
        moments = [
            f(features.astype(np.float64))
            for features in sets
            for f in (lambda x: x.mean(axis=0), lambda x: np.cov(x, rowvar=False))
        ]
        return float(calculate_frechet_distance(*moments))

    compare(f"distance, {images} features a set", ours, theirs, rounds)


def fid_networks() -> tuple[torch.nn.Module, torch.nn.Module, dict[str, torch.Tensor]]:
    """Our features and pytorch-fid's on equal weights, and the weights."""
    from unittest import mock

    from pytorch_fid import inception as published

    inception = load_script("inception")
    network = inception.build_network()
    state = seeded_state(network)
    network.load_state_dict(state)
    with mock.patch.object(published, "load_state_dict_from_url", lambda *_, **__: state):
        return inception.InceptionFeatures(network), published.InceptionV3([3]).eval(), state


def compare_features(rounds: int) -> None:
    fid = load_script("test_with_FID")
    ours, theirs, _ = fid_networks()
    images = list(torch.randint(0, 256, (BATCH, 256, 256, 3), dtype=torch.uint8))

    @torch.inference_mode()
    def run_ours() -> float:
        return ours(fid.to_network_size(images, torch.device("cpu"))).mean().item()

    @torch.inference_mode()
    def run_theirs() -> float:
        return theirs(torch.stack(images).permute(0, 3, 1, 2).contiguous().float() / 255)[0].mean().item()

    compare(f"features of {BATCH} images", run_ours, run_theirs, rounds)


def compare_command(images: int, rounds: int, folder: Path) -> None:
    weights = load_script("test_with_FID").INCEPTION_WEIGHTS
    hub = folder / "hub" / "checkpoints"  # where pytorch-fid finds its weights under TORCH_HOME
    hub.mkdir(parents=True)
    torch.save(fid_networks()[2], hub / weights.file_name)
    sets = [write_pictures(folder / name, images, seed, width=256, height=256) for seed, name in enumerate("ab")]
    environment = {**os.environ, "TORCH_HOME": str(folder)}

    def last_line(*command: object) -> str:
        done = subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        return done.stdout.strip().splitlines()[-1]

    script = ROOT / "evaluations" / "test_with_FID.py"
    compare(
        f"FID command, two folders of {images} images",
        lambda: last_line(script, *sets, "--weights", hub / weights.file_name, "--mode", "pytorch-fid"),
        lambda: last_line("-m", "pytorch_fid", *sets),
        rounds,
    )


def compare_lpips(images: int, rounds: int, folder: Path) -> None:
    import lpips

    scorer = load_script("lpips")
    unpublished = load_script("network_weights").Weights(None, None, False)
    layouts = max(1, images // SAMPLES)
    for index in range(SAMPLES):
        write_pictures(folder / f"samples_{index}", layouts, index, width=256, height=256)
    distance = scorer.PairwiseDistance(unpublished, images_per_pass=16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metric = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    for index, part in enumerate(distance.slices):
        getattr(metric.net, f"slice{index + 1}").load_state_dict(part.state_dict())
    arguments = argparse.Namespace(preprocessing="published", num_workers=2, skip_bad=False)
    sizes = scorer.PREPROCESSINGS["published"][0]
    named, _ = scorer.find_layouts(folder, None, False, None)

    def ours() -> float:
        scores = scorer.score_layouts(named, distance, torch.device("cpu"), arguments, None)
        return round(float(np.mean(list(scores.values()))), 6)

    @torch.inference_mode()
    def theirs() -> float:
        means = []
        for layout in named:
            samples = scorer.scale(scorer.load_samples(layout, sizes), "published").split(1)
            means.append(np.mean([metric(a, b).item() for a, b in combinations(samples, 2)]))
        return round(float(np.mean(means)), 6)

    compare(f"LPIPS, {layouts} layouts of {SAMPLES} samples", ours, theirs, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ("distance", "features", "command", "lpips")
    parser.add_argument("--images", type=int, default=2000, help="images, or features, a set")
    parser.add_argument("--rounds", type=int, default=1, help="how often each comparison alternates")
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads")
    with tempfile.TemporaryDirectory() as folder:
        if "distance" in arguments.parts:
            compare_distance(arguments.images, arguments.rounds)
        if "features" in arguments.parts:
            compare_features(arguments.rounds)
        if "command" in arguments.parts:
            compare_command(arguments.images, arguments.rounds, Path(folder))
        if "lpips" in arguments.parts:
            compare_lpips(arguments.images, arguments.rounds, Path(folder) / "lpips")


if __name__ == "__main__":
    main()
