"""The FID's network, statistics and distance against pytorch-fid, torchmetrics, SciPy and known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from evaluation_helpers import blurred, load_script, needs_camvid, seeded_state, write_photographs
from scipy import linalg

fid = load_script("test_with_FID")
frechet = load_script("frechet")
inception = load_script("inception")
result_folders = load_script("result_folders")

DIMS = (64, 192, 768, 2048)


@pytest.fixture(scope="module")
def network():
    """torchvision's Inception with seeded weights and batch norms that do something."""
    network = inception.build_network()
    network.load_state_dict(seeded_state(network))
    return network


@pytest.fixture(scope="module")
def reference(network):
    """pytorch-fid's network with the same weights, all four feature sizes at once."""
    from pytorch_fid import inception as published

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "load_state_dict_from_url", lambda *_, **__: network.state_dict())
        return published.InceptionV3([0, 1, 2, 3]).eval()


@torch.inference_mode()
def reference_features(reference, images):
    """pytorch-fid's features by their size, of bytes [N, H, W, 3] of one size."""
    maps = reference(torch.stack(images).permute(0, 3, 1, 2).float() / 255)
    return {features.shape[1]: features.mean(dim=(2, 3)).double().numpy() for features in maps}


@torch.inference_mode()
def our_features(network, dims, images):
    return inception.InceptionFeatures(network, dims)(fid.to_network_size(images, torch.device("cpu"))).numpy()


def statistics_of(features):
    statistics = frechet.FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics.result()


# --- the network ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", DIMS)
def test_features_equal_pytorch_fid(network, reference, dims):
    generator = torch.Generator().manual_seed(1)
    images = [torch.randint(0, 256, (70, 90, 3), generator=generator, dtype=torch.uint8) for _ in range(2)]
    expected = reference_features(reference, images)[dims]
    # float32 sums in another order, batch norm folded: seen 2e-5 at features of 2; a wrong pooling gives 1e-2
    np.testing.assert_allclose(our_features(network, dims, images), expected, atol=1e-4)


def test_images_of_several_sizes_are_resized_one_by_one(network):
    images = [torch.full((60, 80, 3), 90, dtype=torch.uint8), torch.zeros(50, 50, 3, dtype=torch.uint8)]
    together = fid.to_network_size(images, torch.device("cpu"))
    apart = torch.cat([fid.to_network_size([image], torch.device("cpu")) for image in images])
    assert together.shape == (2, 3, 299, 299)
    assert torch.equal(together, apart)


# --- statistics and distances -----------------------------------------------------------------------------------------


def test_streamed_statistics_equal_numpy_and_do_not_see_batches():
    generator = np.random.default_rng(0)
    features = generator.standard_normal((1300, 30)) + 1e4  # far from zero: a plain sum of squares would cancel
    mean, covariance = statistics_of(features)
    np.testing.assert_allclose(mean, features.mean(0), rtol=1e-14)  # rounding of float64
    np.testing.assert_allclose(covariance, np.cov(features, rowvar=False), atol=1e-10)  # 1e-16 * 1e4 * a few hundred
    streamed = frechet.FeatureStatistics(30)
    for part in np.array_split(features, [1, 8, 500, 1100]):
        streamed.update(part)
    assert all(np.array_equal(a, b) for a, b in zip((mean, covariance), streamed.result(), strict=True))


def test_a_covariance_needs_two_vectors():
    with pytest.raises(ValueError, match="at least two"):
        statistics_of(np.ones((1, 4)))


def test_distance_of_gaussians_with_a_known_answer():
    """Commuting covariances: the squared distance is |m1 - m2|^2 + sum of (s1 - s2)^2 over the axes' deviations."""
    generator = np.random.default_rng(0)
    rotation = linalg.qr(generator.standard_normal((12, 12)))[0]
    deviation_1, deviation_2 = generator.uniform(0, 2, (2, 12))
    deviation_1[:4] = deviation_2[2:6] = 0  # both singular, in other directions
    mean_1, mean_2 = generator.standard_normal((2, 12))
    covariances = [rotation * deviation**2 @ rotation.T for deviation in (deviation_1, deviation_2)]
    expected = ((mean_1 - mean_2) ** 2).sum() + ((deviation_1 - deviation_2) ** 2).sum()
    distance = frechet.frechet_distance(mean_1, covariances[0], mean_2, covariances[1])
    assert distance == pytest.approx(expected, rel=1e-6)  # roots of rounding errors, 1e-8 each, in singular directions
    samples = [
        mean + generator.standard_normal((200_000, 12)) * deviation @ rotation.T
        for mean, deviation in ((mean_1, deviation_1), (mean_2, deviation_2))
    ]
    sampled = frechet.frechet_distance(*statistics_of(samples[0]), *statistics_of(samples[1]))
    assert sampled == pytest.approx(expected, rel=0.02)  # 200 000 draws: about 1 / sqrt(200 000) per mean and deviation


def test_distance_equals_scipys_square_root_and_is_symmetric():
    generator = np.random.default_rng(1)
    first, second = (np.cov(generator.standard_normal((200, 40)) @ generator.standard_normal((40, 40)), rowvar=False)
                     for _ in range(2))  # fmt: skip
    expected = np.trace(first + second - 2 * linalg.sqrtm(first @ second).real)
    zero = np.zeros(40)
    assert frechet.frechet_distance(zero, first, zero, second) == pytest.approx(expected, rel=1e-9)
    assert frechet.frechet_distance(zero, second, zero, first) == pytest.approx(expected, rel=1e-9)


def test_distance_of_equal_and_of_constant_sets():
    features = np.random.default_rng(2).standard_normal((20, 50))  # fewer vectors than dimensions
    mean, covariance = statistics_of(features)
    assert frechet.frechet_distance(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)
    constant = statistics_of(np.ones((3, 50)))
    expected = ((mean - 1) ** 2).sum() + np.trace(covariance)
    assert frechet.frechet_distance(mean, covariance, *constant) == pytest.approx(expected, rel=1e-12)


def test_kernel_distance_equals_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    generator = np.random.default_rng(3)
    first, second = generator.standard_normal((700, 16)), generator.standard_normal((600, 16)) * 1.2
    kernels = [torch.from_numpy((a @ b.T / 16 + 1) ** 3) for a, b in ((first, first), (first, second))]
    same = poly_mmd(*map(torch.from_numpy, (first[:600], second)), degree=3, gamma=None, coef=1.0).item()
    assert frechet.kernel_distance(first[:600], second) == pytest.approx(same, rel=1e-9)
    within = (kernels[0].sum() - kernels[0].trace()) / (700 * 699)  # sets of different size, by the definition
    of_second = torch.from_numpy((second @ second.T / 16 + 1) ** 3)
    other = (of_second.sum() - of_second.trace()) / (600 * 599)
    expected = (within + other - 2 * kernels[1].mean()).item()
    assert frechet.kernel_distance(first, second) == pytest.approx(expected, rel=1e-9)


# --- the distance of photographs --------------------------------------------------------------------------------------


@needs_camvid
def test_fid_equals_pytorch_fid_on_photographs(network, reference, tmp_path):
    from pytorch_fid.fid_score import calculate_frechet_distance

    def crop(image):
        return image.crop((60, 40, 420, 310))

    sets = {
        "test": write_photographs(tmp_path / "test", "test", 6),
        "val": write_photographs(tmp_path / "val", "val", 6),
        "crops": write_photographs(tmp_path / "crops", "test", 6, crop),
        "blurred": write_photographs(tmp_path / "blurred", "test", 6, blurred(2)),
    }
    images = {name: [result_folders.load_rgb(path) for path in sorted(path.iterdir())] for name, path in sets.items()}
    expected = {name: reference_features(reference, items) for name, items in images.items()}
    for dims in DIMS:
        statistics = {name: statistics_of(our_features(network, dims, items)) for name, items in images.items()}
        for other in ("val", "crops", "blurred"):
            ours = frechet.frechet_distance(*statistics["test"], *statistics[other])
            pair = [expected[name][dims] for name in ("test", other)]
            # The tolerance. pytorch-fid's own square root of a singular matrix is off by up to 1.5e-4 here.
            if dims < 2048:
                theirs = calculate_frechet_distance(*(f(x) for x in pair for f in (mean_of, covariance_of)))
                assert ours == pytest.approx(theirs, rel=1e-3), (dims, other)
            # What the square root's trace is for few images, without any square root of a matrix: the sum of the
            # singular values of the product of the centred features. 2048 dimensions cost SciPy half a minute a pair.
            first, second = ((x - x.mean(0)) / np.sqrt(len(x) - 1) for x in pair)
            trace = linalg.svdvals(first @ second.T).sum()
            shift = pair[0].mean(0) - pair[1].mean(0)
            exact = shift @ shift + (first**2).sum() + (second**2).sum() - 2 * trace
            assert ours == pytest.approx(exact, rel=1e-4), (dims, other)  # float32 features: seen 2e-6


def mean_of(features):
    return features.mean(axis=0)


def covariance_of(features):
    return np.cov(features, rowvar=False)
