"""How fast guided sampling is, against the plain way (plain_training.py's network), improvement by improvement.

    python benchmarks/sampling.py                   128 px, 64 channels, 151 classes, batch 1: minutes on two CPU cores
    python benchmarks/sampling.py --device cuda     the published ADE20K network: 256 px, 256 channels
    python benchmarks/sampling.py --device cuda --variants 1,2,8      its last row, in every way it could be run

Each row adds one improvement. All are measured in rounds, one guided step of each in turn, so that a busy machine slows
all alike; ratios compare medians. The share of the machine's peak is that of a large matrix product measured in the
same rounds. Writes a table, JSON and a plot.

With --variants, instead: the network with scale and shift kept, at those batch sizes, in 16 bits; compiled or not, as a
CUDA graph or not, with our group norm and with PyTorch's. Each batch size's variants are measured in rounds likewise.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from norms import NORMS, use_norm
from plain_training import ChannelsFirstUNet, EinsumAttention, SeparateSPADE
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from guided_diffusion.hosts.numerics import set_numerics
from guided_diffusion.layouts.encode import encode_label_map
from guided_diffusion.layouts.spade import Layout, SPADEGroupNorm
from guided_diffusion.pipeline import SDMPipeline
from guided_diffusion.script_util import create_model
from guided_diffusion.settings import DiffusionConfig, ModelConfig, Sampling
from guided_diffusion.unet import AttentionBlock, UNetModel

CLASSES = 151
COMMON = dict(num_classes=CLASSES, no_instance=True, num_res_blocks=2, resblock_updown=True)
SIZES = {
    "cpu": dict(image_size=128, num_channels=64, num_head_channels=32, attention_resolutions="32,16,8"),
    "published": dict(image_size=256, num_channels=256, num_head_channels=64, attention_resolutions="32,16,8"),
}
STEPS = (10, 20, 50, 250, 1000)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PLAIN = "plain: two passes, nothing kept"


def make_network(config: ModelConfig, device: torch.device, dtype: torch.dtype, plain: bool = False) -> UNetModel:
    """The network with random (not zero) weights, the same for all."""
    torch.manual_seed(0)
    model = create_model(config, learn_sigma=True)
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.to(device).convert_to(dtype).eval().requires_grad_(False)
    if not plain:
        return model.to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, AttentionBlock):
            module.__class__ = EinsumAttention
        elif isinstance(module, SPADEGroupNorm):
            module.__class__ = SeparateSPADE
    model.__class__ = ChannelsFirstUNet
    return model


def make_inputs(
    config: ModelConfig, device: torch.device, batch: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Labels [N, 1, H, W] of large blocks, noise [N, 3, H, W] and timesteps [N]."""
    size = config.image_size
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, config.num_classes, (batch, 1, 16, 16), generator=generator).float()
    label = torch.nn.functional.interpolate(blocks, size=(size, size)).long().to(device)
    x = torch.randn(batch, 3, size, size, generator=generator).to(device)
    return label, x, torch.full((batch,), 500, device=device)


def denoise_both(network: UNetModel, x: torch.Tensor, t: torch.Tensor, layout: Layout, null: Layout) -> torch.Tensor:
    """Both predictions of guidance, [2N, 6, H, W]."""
    return torch.cat(network.denoise(x, t, layout, null))


def guided_steps(
    config: ModelConfig, device: torch.device, precisions: list[str], batch: int, compiled: bool
) -> dict[str, tuple[str, Callable[[], torch.Tensor]]]:
    """Row title -> (precision, one guided evaluation [2 * batch, 6, H, W])."""
    label, x, t = make_inputs(config, device, batch)
    first = precisions[0]
    steps: dict[str, tuple[str, Callable[[], torch.Tensor]]] = {}

    y = encode_label_map(label, None, CLASSES, DTYPES[first])
    null = torch.zeros_like(y)
    plain = make_network(config, device, DTYPES[first], plain=True)
    ours = make_network(config, device, DTYPES[first])
    x_plain = x.to(DTYPES[first])

    steps[PLAIN] = (first, lambda: torch.cat([plain(x_plain, t, y), plain(x_plain, t, null)]))
    twice, both = torch.cat([x, x]), torch.cat([y, null])
    x_twice = torch.cat([x_plain, x_plain])
    steps["+ both passes in one batch"] = (first, lambda: plain(x_twice, t.repeat(2), both))
    steps["+ fused attention, channels-last, one convolution for scale and shift"] = (
        first,
        lambda: ours(twice, t.repeat(2), y=both),
    )
    guided = functools.partial(denoise_both, x=x, t=t)
    steps["+ one encoder pass for both"] = (
        first,
        lambda: guided(ours, layout=ours.encode_layout(y), null=ours.encode_layout(null[:1])),
    )
    for precision in precisions:
        network = ours if precision == first else make_network(config, device, DTYPES[precision])
        condition = y.to(DTYPES[precision])
        kept = [network.encode_layout(part, keep=True) for part in (condition, torch.zeros_like(condition[:1]))]
        title = "+ scale and shift kept for all steps"
        title += "" if precision == first else f", {precision}"
        steps[title] = (precision, lambda network=network, kept=kept: guided(network, layout=kept[0], null=kept[1]))
        if compiled:
            fast = make_network(config, device, DTYPES[precision])
            fast.compile_prediction()
            steps[f"{title}, compiled"] = (
                precision,
                lambda fast=fast, kept=kept: guided(fast, layout=kept[0], null=kept[1]),
            )
    return steps


def synchronized(device: torch.device, action: Callable[[], torch.Tensor]) -> float:
    """Seconds that `action` takes."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[float, Callable[[], torch.Tensor]]:
    """Its floating-point operations, and a large product in that precision."""
    side = 8192 if device.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2.0 * side**3, lambda: a @ b


def fast_attention_runs(device: torch.device, precision: str) -> bool:
    """Whether the network's attention takes the flash kernel: with the others forbidden, it still runs."""
    block = AttentionBlock(64, 2).to(device, DTYPES[precision]).eval().requires_grad_(False)
    x = torch.randn(1, 64, 16, 16, device=device, dtype=DTYPES[precision]).to(memory_format=torch.channels_last)
    try:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), torch.inference_mode():
            block(x)
    except RuntimeError:
        return False
    return True


def machine(device: torch.device) -> dict:
    """What figures depend on."""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def measure(arguments: argparse.Namespace) -> dict:
    device, size = torch.device(arguments.device), arguments.size
    config = ModelConfig(**COMMON, **SIZES[size])
    precisions = ["float32", "bfloat16", "float16"] if device.type == "cuda" else ["float32", "bfloat16"]
    if size == "published":  # the target is against the plain way in fp16
        precisions = ["float16", "bfloat16"]
    with torch.inference_mode():
        steps = guided_steps(config, device, precisions, arguments.batch, arguments.compile)
        products = {precision: matrix_product(device, DTYPES[precision]) for precision in precisions}
        operations, outputs = {}, {}
        for title, (_, step) in tqdm(steps.items(), desc="warming up"):
            if "compiled" not in title:
                with FlopCounterMode(display=False) as counter:
                    outputs[title] = step().float()
                operations[title] = counter.get_total_flops()
            else:
                step()
        seconds: dict[str, list[float]] = {title: [] for title in steps}
        peaks: dict[str, list[float]] = {precision: [] for precision in precisions}
        for _ in tqdm(range(arguments.rounds), desc="measuring", unit="round"):
            for title, (_, step) in steps.items():
                seconds[title].append(synchronized(device, step))
            for precision, (count, product) in products.items():
                peaks[precision].append(count / synchronized(device, product))
    plain = statistics.median(seconds[PLAIN])
    rows = []
    for title, (precision, _) in steps.items():
        median = statistics.median(seconds[title])
        count = operations.get(title)
        rows.append(
            {
                "row": title,
                "precision": precision,
                "seconds_per_guided_step": median,
                "times_plain": plain / median,
                "tera_operations": None if count is None else count / 1e12,
                "share_of_peak": None if count is None else count / median / statistics.median(peaks[precision]),
                "largest_difference": float((outputs[title] - outputs[PLAIN]).abs().max())
                if title in outputs
                else None,
                "all_seconds": seconds[title],
            }
        )
    del steps, step  # what they keep would count as taken memory
    attention = {precision: fast_attention_runs(device, precision) for precision in precisions}
    pipeline = measure_pipeline(config, device, precisions, arguments.batch, plain)
    return {
        **machine(device),
        "size": {**COMMON, **SIZES[size]},
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "flash_attention_kernel": attention,
        "matrix_product_tera_operations_per_second": {p: statistics.median(v) / 1e12 for p, v in peaks.items()},
        "rows": rows,
        "solvers": pipeline,
    }


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step` as a CUDA graph: all its kernels launched as one, on the memory on which they were recorded."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what is compiled, timed or set up at first use must not be recorded
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return output

    return replay


def step_variants(
    config: ModelConfig, device: torch.device, precision: str, batch: int
) -> Iterator[tuple[str, str, Callable[[], Callable[[], torch.Tensor]]]]:
    """(norm, way, what makes the guided step) for either group norm, compiled and not, as a CUDA graph and not."""
    label, x, t = make_inputs(config, device, batch)
    y = encode_label_map(label, None, config.num_classes, DTYPES[precision])
    for name, norm in NORMS.items():
        network = make_network(config, device, DTYPES[precision])
        use_norm(network, norm)
        layout, null = (network.encode_layout(part, keep=True) for part in (y, torch.zeros_like(y[:1])))
        compiled = make_network(config, device, DTYPES[precision])
        use_norm(compiled, norm)
        compiled.compile_prediction(dynamic=False)
        for way, chosen in (("eager", network), ("compiled", compiled)):
            step = functools.partial(denoise_both, chosen, x, t, layout, null)
            yield name, way, lambda step=step: step
            if device.type == "cuda":
                yield name, f"{way}, CUDA graph", lambda step=step: captured(step)


def measure_variants(
    config: ModelConfig, device: torch.device, precision: str, batches: list[int], rounds: int
) -> list[dict]:
    """A row for each batch size and variant; one that fails is left out, and says why."""
    rows = []
    for batch in batches:
        torch.compiler.reset()
        steps, first = {}, None
        seconds: dict[tuple[str, str], list[float]] = {}
        with torch.inference_mode():
            for norm, way, make in step_variants(config, device, precision, batch):
                try:
                    step = make()
                    output = step().clone()
                except RuntimeError as error:
                    print(f"batch {batch}, {norm}, {way}: failed: {type(error).__name__}: {error}")
                    continue
                first = output if first is None else first
                difference = float((output - first).abs().max() / first.abs().max())
                steps[norm, way], seconds[norm, way] = (step, difference), []
            for _ in tqdm(range(rounds), desc=f"measuring batch {batch}", unit="round"):
                for key, (step, _) in steps.items():
                    seconds[key].append(synchronized(device, step))
        rows += [
            {
                "batch": batch,
                "norm": norm,
                "way": way,
                "precision": precision,
                "seconds_per_image": statistics.median(seconds[norm, way]) / batch,
                "relative_difference": difference,
                "all_seconds": seconds[norm, way],
            }
            for (norm, way), (_, difference) in steps.items()
        ]
        del steps, step  # what they keep would count as taken memory
    return rows


def variants_table(rows: list[dict]) -> str:
    """Speeds in units of the first row of its batch size."""
    lines = ["| batch | norm | | speed | s / image and guided step | difference |", "|---|---|---|---|---|---|"]
    slowest = {}
    for row in rows:
        first = slowest.setdefault(row["batch"], row["seconds_per_image"])
        lines.append(
            f"| {row['batch']} | {row['norm']} | {row['way']} | **{first / row['seconds_per_image']:.2f}** | "
            f"{row['seconds_per_image']:.4f} | {row['relative_difference']:.0e} |"
        )
    return "\n".join(lines)


def measure_pipeline(
    config: ModelConfig, device: torch.device, precisions: list[str], batch: int, plain: float
) -> list[dict]:
    """Whole images through the pipeline: 10 and 20 steps measured, the layout's encoding included; the rest scaled by
    their difference. "times plain 1000" compares with 1000 plain steps."""
    rows = []
    for precision in precisions:
        model = make_network(config, device, DTYPES[precision])
        short = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[precision]
        pipeline = SDMPipeline(model, config, DiffusionConfig(learn_sigma=True), precision=short, device=device)
        label = torch.randint(0, CLASSES, (batch, 1, config.image_size, config.image_size))
        taken = {}
        for steps in (2, 10, 20):  # 2: warming up
            make = functools.partial(
                pipeline.generate, label, None, seeds=range(batch), sampling=Sampling(num_steps=steps)
            )
            taken[steps] = synchronized(device, make)
        slope = (taken[20] - taken[10]) / 10
        for steps in STEPS:
            seconds = taken.get(steps, taken[20] + slope * (steps - 20)) / batch
            rows.append(
                {
                    "precision": precision,
                    "steps": steps,
                    "measured": steps in taken,
                    "seconds_per_image": seconds,
                    "images_per_minute": 60 / seconds,
                    "times_plain_1000": 1000 * plain / batch / seconds,
                }
            )
    return rows


def table(result: dict) -> str:
    lines = ["| | precision | times plain | s / guided step | share of peak |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        share = "" if row["share_of_peak"] is None else f"{row['share_of_peak']:.0%}"
        lines.append(
            f"| {row['row']} | {row['precision']} | **{row['times_plain']:.2f}** | "
            f"{row['seconds_per_guided_step']:.3f} | {share} |"
        )
    lines += ["", "| steps | precision | times plain with 1000 | images / minute |", "|---|---|---|---|"]
    for row in result["solvers"]:
        mark = "" if row["measured"] else " (from the time per step)"
        lines.append(
            f"| {row['steps']} | {row['precision']} | {row['times_plain_1000']:.1f} | "
            f"{row['images_per_minute']:.2f}{mark} |"
        )
    return "\n".join(lines)


def plot(result: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["rows"]
    figure, axes = pyplot.subplots(figsize=(9, 0.5 * len(rows) + 1.2))
    values = [row["times_plain"] for row in rows]
    bars = axes.barh([row["row"] for row in rows], values, color=["#9aa5b1"] + ["#3b76b5"] * (len(rows) - 1))
    axes.bar_label(bars, [f"{value:.1f}x" for value in values], padding=3)
    axes.invert_yaxis()
    axes.set_xlim(0, max(values) * 1.12)
    axes.set_xlabel("speed of one guided step, in units of the plain way")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), help="default: cpu on a CPU, published on a GPU")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile")
    parser.add_argument("--variants", metavar="BATCHES", help="as 1,2,8: the ways of running the last row, instead")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder for JSON and plot")
    arguments = parser.parse_args()
    set_numerics()
    device = torch.device(arguments.device)
    arguments.size = arguments.size or ("published" if device.type == "cuda" else "cpu")
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.variants:
        config = ModelConfig(**COMMON, **SIZES[arguments.size])
        precision = "float16" if device.type == "cuda" else "bfloat16"
        batches = [int(batch) for batch in arguments.variants.split(",")]
        rows = measure_variants(config, device, precision, batches, arguments.rounds)
        result = {**machine(device), "rounds": arguments.rounds, "rows": rows}
        path = arguments.out / f"sampling_variants_{arguments.device}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        return print(variants_table(rows))
    result = measure(arguments)
    stem = arguments.out / f"sampling_{arguments.device}"
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    plot(result, stem.with_suffix(".png"))
    print(table(result))
    print(f"flash attention kernel taken: {result['flash_attention_kernel']}")
    print(f"written: {stem}.json, {stem}.png")


if __name__ == "__main__":
    main()
