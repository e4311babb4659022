"""Fixtures that several files use, and which tests are slow."""

import os

import pytest
import torch
from training_helpers import make_data

# Tests train tiny networks: a second thread wins little on a free machine, and on a busy one threads wait for each
# other, and everything takes several times as long. Processes that the tests start inherit this.
torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))

ON_A_GPU = {"test_cuda", "test_label_layout"}
# Left out by -m "not slow": modules that start processes in most tests, or run large networks, and single tests that
# take seconds elsewhere ("module::test", all its parameters). For a new test, @pytest.mark.slow does as well.
SLOW = {
    "test_batches::test_a_signal_to_the_whole_group_leaves_the_workers_to_the_main_process",
    "test_benchmarks::test_a_variant_that_fails_says_why",
    "test_benchmarks::test_the_variants_of_a_step",
    "test_camvid::test_feature_scores_at_their_ends",
    "test_camvid::test_the_segmenter_learns_and_its_file_needs_no_code",
    "test_chain::test_chain",
    "test_checkpoints::test_a_folder_belongs_to_one_process",
    "test_commands::test_help",
    "test_commands::test_what_is_named_exists",
    "test_counts",
    "test_cuda",
    "test_diffusion::test_same_trajectory_as_diffusers",
    "test_dist_util",
    "test_fid",
    "test_frechet",
    "test_guidance::test_over_a_run_as_diffusers",
    "test_guidance_benchmark::test_the_whole_comparison",
    "test_guide_network",
    "test_golden::test_encoded_layouts_give_the_same_numbers",
    "test_golden::test_guided_ddim_loop",
    "test_golden::test_p_mean_variance",
    "test_golden::test_three_training_steps",
    "test_handing_on::test_there_and_back_over_a_hub_and_from_its_cache",
    "test_host_reads",
    "test_image_listing::test_hundred_thousand_files_list_in_seconds",
    "test_loss_curve::test_one_rank_follows_the_curve",
    "test_loss_curve::test_two_ranks_follow_the_curve",
    "test_lpips",
    "test_miou::test_scores_equal_scikit_learn_and_torchmetrics",
    "test_miou::test_the_script_runs_by_itself",
    "test_numerics::test_both_entry_points_set_the_numerics",
    "test_numerics::test_the_compiler_is_given_the_same_norm",
    "test_numerics::test_the_network_with_this_norm",
    "test_numerics::test_the_random_state_is_kept_only_for_dropout",
    "test_plan",
    "test_properties",
    "test_properties_of_runs",
    "test_results_folder",
    "test_resume::test_a_finished_fine_tuning_tells_that_its_base_was_trained_further",
    "test_resume::test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_again",
    "test_sampling_runs",
    "test_sampling_seams::test_a_wrapper_stands_in_for_the_network",
    "test_settings_from_weights::test_a_published_layout_at_small_width_needs_no_settings",
    "test_settings_from_weights::test_every_shape_of_network_is_read_back",
    "test_settings_from_weights::test_fine_tuning_without_a_config",
    "test_train_loop::test_compiled_training_keeps_the_names_and_the_numbers",
    "test_train_loop::test_half_and_resume_with_history_and_dropout",
    "test_train_loop::test_previews_do_not_change_the_training",
    "test_training_runs",
    "test_transfer::test_two_ranks_begin_with_the_adapted_weights_and_go_on_bit_for_bit",
    "test_transfer::test_weights_and_averages_begin_as_adapted",
    "test_transfer::test_what_is_refused_is_named_and_leaves_nothing",
    "test_transfer::test_without_a_map_names_decide_and_instances_are_taken_where_the_data_has_them",
    "test_validation::test_the_preview_goes_through_the_network_itself",
    "test_verify_data",
    "test_walk",
    "test_wheel",
}


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    modules = {}
    for item in items:
        modules[item.module.__name__] = item.module
        if {item.module.__name__, f"{item.module.__name__}::{item.originalname}"} & SLOW:
            item.add_marker(pytest.mark.slow)
    for module, _, test in (entry.partition("::") for entry in SLOW):
        if module in modules and test and not hasattr(modules[module], test):
            raise pytest.UsageError(f"tests/conftest.py calls {module}::{test} slow, but there is no such test")


@pytest.fixture(scope="module", autouse=True)
def on_the_cpu(request):
    """Hides a GPU from all but its own tests: two ranks cannot share one, and its results are not bit for bit."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ not in ON_A_GPU:
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture
def exact_float32():
    """TF32, which convolutions take by default on a GPU, has 10 bits: no measure of whether a result is right."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    products.allow_tf32 = convolutions.allow_tf32 = False
    yield
    products.allow_tf32, convolutions.allow_tf32 = before


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The tiny data set of `make_data`, the same for all. Tests that change or add files copy it first."""
    folder = make_data(tmp_path_factory.mktemp("data"))

    def files() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    before = files()
    yield folder
    assert files() == before, "a test changed the data that all share"
