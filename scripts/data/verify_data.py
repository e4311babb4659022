"""Checks a data set before a GPU sees it, and draws what it found.

    python scripts/data/verify_data.py --data_dir ./data/camvid --dataset_mode custom --num_classes 12

For every split: pairs by name, headers (sizes, modes), then pixels (damaged files, ids that do not fit num_classes,
colours of no class, instance maps). Writes into --report_dir: overview_SPLIT.png (layouts beside photographs),
classes_SPLIT.png and classes.csv (how common each class is), duplicates.csv (photographs that are there twice, also
saved again or resized), problems.txt. The exit code is 1 where something is
wrong, 0 otherwise.
"""

import argparse
import csv
import io
import os
import sys
from collections import Counter
from dataclasses import replace
from functools import partial

import numpy as np

from guided_diffusion.data.checks import SplitReport, check_headers, check_pixels, summarize
from guided_diffusion.data.duplicates import find_duplicates
from guided_diffusion.data.listing import Item, pair_files, printable, read_cache_settings, unread_files
from guided_diffusion.data.pictures import bar_chart, colorize, contact_sheet, save_png
from guided_diffusion.data.specs import DATASET_MODES, DataError, DatasetSpec, MissingSplitError, get_spec
from guided_diffusion.data.thin_classes import Components, lost_components, thin_classes
from guided_diffusion.data.transforms import read_image, read_label, sampling_geometry
from guided_diffusion.hosts.parallel import map_in_processes

SHOWN_PROBLEMS = 20
MOST_DUPLICATES = 10_000
MEASURED_MAPS = 200
SHOWN_SCENES = 6


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="the data set; a folder or a bucket")
    parser.add_argument("--dataset_mode", required=True, choices=DATASET_MODES)
    parser.add_argument("--num_classes", type=int, help="the network's classes (default: those of the data set)")
    parser.add_argument("--image_size", type=int, default=256, help="for the overview, and what is lost by resizing")
    parser.add_argument("--no_instance", default="False", help="True: do not ask for instance maps")
    parser.add_argument("--report_dir", default=os.path.join("OUTPUT", "verify"), help="where pictures and lists go")
    parser.add_argument("--workers", type=int, help="processes (default: all cores)")
    options = parser.parse_args(arguments)
    try:
        return verify_and_report(options)
    except OSError as error:  # the report's: a full disk, a file in its place
        print(f"error: the report cannot be written to {options.report_dir}: {error}", file=sys.stderr)
        return 1


def verify_and_report(options: argparse.Namespace) -> int:
    """Prints and writes what is wrong; the exit code. Raises OSError where the report cannot be written."""
    write_text(options.report_dir, "problems.txt", "the check has not ended\n")  # before hours of work
    try:
        if options.image_size < 1:
            raise DataError(f"image_size is {options.image_size}; it must be at least 1")
        spec = get_spec(options.dataset_mode, options.data_dir, options.num_classes)
        if read_cache_settings(options.data_dir) is not None:  # its photographs are shrunk, its maps are not
            spec = replace(spec, label_scale=True)
        problems = verify(spec, options)
    except (DataError, MissingSplitError) as error:
        problems = [str(error)]
    problems = [printable(problem) for problem in problems]
    write_text(options.report_dir, "problems.txt", "".join(f"{problem}\n" for problem in problems))
    if not problems:
        print(f"nothing is wrong. Look at the pictures in {options.report_dir}")
        return 0
    print(f"\n{len(problems)} problem{'s' if len(problems) > 1 else ''}:", file=sys.stderr)
    for problem in problems[:SHOWN_PROBLEMS]:
        print(f"- {problem}", file=sys.stderr)
    if len(problems) > SHOWN_PROBLEMS:
        print(f"- ... all of them: {os.path.join(options.report_dir, 'problems.txt')}", file=sys.stderr)
    return 1


def verify(spec: DatasetSpec, options: argparse.Namespace) -> list[str]:
    """Prints the findings of each split, draws them, and returns all problems."""
    print(f"{printable(options.data_dir)}: dataset_mode {spec.name}, {spec.num_classes} classes")
    use_instances = options.no_instance.lower() not in ("true", "1", "yes")
    problems, reports, listed = [], {}, set()
    for split in ("train", "val", "test"):
        try:
            items, unpaired = pair_files(spec, options.data_dir, split, use_instances)
        except MissingSplitError as error:
            if split == "train":
                problems.append(str(error))
            elif split == "val":
                print("val: there is no evaluation split; training will not know its best checkpoint")
            continue
        except DataError as error:
            problems.append(f"{split}: {error}")
            continue
        if items and items[0].image in listed:
            continue  # val and test are one folder
        listed.update(item.image for item in items[:1])
        report = check_split(spec, split, items, options)
        report.notes += unread_files(spec, options.data_dir, split) + lost_classes(spec, items, options)
        problems += [f"{split}: {problem}" for problem in unpaired + report.problems]
        describe(spec, split, report)
        reports[split] = report
        if items:
            draw_split(spec, split, items, report, options)
    if reports:
        write_classes(spec, reports, options.report_dir)
        write_duplicates(reports, options.report_dir)
    return problems


def check_split(spec: DatasetSpec, split: str, items: list[Item], options: argparse.Namespace) -> SplitReport:
    """Headers of all files first, because they are quick; then the pixels of those whose headers are whole."""
    headers = list(map_in_processes(partial(check_headers, spec), items, f"{split}: headers", options.workers))
    for problem in [problem for report in headers for problem in report.problems][:3]:
        print(f"{split}: {printable(problem)}", file=sys.stderr)
    whole = [item for item, report in zip(items, headers, strict=True) if not report.problems]
    pixels = list(map_in_processes(partial(check_pixels, spec), whole, f"{split}: pixels", options.workers))
    return summarize(spec, items, headers, pixels, options.image_size)


def lost_classes(spec: DatasetSpec, items: list[Item], options: argparse.Namespace) -> list[str]:
    """A note where resizing to image_size loses most components of some classes; of MEASURED_MAPS label maps at most,
    because it takes longer than the other checks."""
    places = np.linspace(0, len(items) - 1, min(MEASURED_MAPS, len(items))).astype(int)
    some, total = [items[place] for place in dict.fromkeys(places.tolist())], Components()
    measure = partial(lost_components, spec, options.image_size)
    for found in map_in_processes(measure, some, "components", options.workers):
        total.add(found)
    thin = [f"{spec.class_names[c]} ({lost} of {count})" for c, lost, count in thin_classes(total)]
    if not thin:
        return []
    return [
        f"at image size {options.image_size}, more than half of the areas of these classes vanish (in {len(some)} label"
        f" maps): {', '.join(thin)}; train larger, or cut tiles (scripts/data/tile_dataset.py)"
    ]


def describe(spec: DatasetSpec, split: str, report: SplitReport) -> None:
    sizes = [f"{width} x {height} ({count})" for (width, height), count in report.sizes.most_common(4)]
    more = f" and {len(report.sizes) - 4} other sizes" if len(report.sizes) > 4 else ""
    print(f"{split}: {report.items} scenes; photographs {', '.join(sizes)}{more}")
    depths = Counter(bits(modes[1]) for modes in report.modes.elements())
    print(
        f"  label maps: {join_counts(depths)}; {int((report.images > 0).sum())} of {spec.num_classes} classes present"
    )
    if any(len(modes) > 2 for modes in report.modes):
        depths = Counter(bits(modes[2]) for modes in report.modes.elements())
        mean = report.instances / max(report.items, 1)
        print(f"  instance maps: {join_counts(depths)}; {mean:.1f} ids a scene, the largest {report.largest_instance}")
    for note in report.notes:
        print(f"  note: {printable(note)}")


def bits(mode: str) -> str:
    """What a Pillow mode means for a map."""
    names = {"L": "8 bits", "P": "8 bits with a palette", "1": "1 bit", "RGB": "colours"}
    names |= {"RGBA": "colours and transparency", "LA": "8 bits and transparency", "F": "floating-point numbers"}
    return names.get(mode, "16 bits or more" if mode.startswith("I") else f"mode {mode}")


def join_counts(counts: Counter) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counts.most_common())


def draw_split(
    spec: DatasetSpec, split: str, items: list[Item], report: SplitReport, options: argparse.Namespace
) -> None:
    """overview_SPLIT.png and classes_SPLIT.png."""
    rows, titles, present = [], [], set()
    for place in np.linspace(0, len(items) - 1, min(SHOWN_SCENES, len(items))).astype(int):
        try:
            label, table = read_label(items[place].label, spec)
            photograph = read_image(items[place].image, spec)
        except DataError:
            continue  # it is in the list of problems
        geometry = sampling_geometry(photograph.size, options.image_size, "keep_aspect")
        ids = table[geometry.apply_to_map(label)]
        pixels = geometry.apply_to_image(photograph)
        layout = colorize(ids, spec.palette)
        rows.append([layout, pixels, (0.5 * layout + 0.5 * pixels).astype(np.uint8)])
        titles.append(items[place].name)
        present |= set(np.unique(ids).tolist())
    if rows:
        page = contact_sheet(
            rows,
            column_titles=["layout", "photograph", "both"],
            row_titles=titles,
            title=f"{os.path.basename(os.path.normpath(options.data_dir))}: {split}",
            legend=[(spec.class_names[i], spec.palette[i]) for i in sorted(present)],
            cell_height=220,
        )
        save_png(page, os.path.join(options.report_dir, f"overview_{split}.png"))
    total = report.pixels.sum()
    if total:
        absent = int((report.pixels == 0).sum())
        note = f"share of all pixels, logarithmic scale; {report.items} scenes"
        note += f"; {absent} other classes are in none" if absent else ""
        chart = bar_chart(spec.class_names, report.pixels / total, spec.palette, f"Classes in {split}", note)
        save_png(chart, os.path.join(options.report_dir, f"classes_{split}.png"))


def write_classes(spec: DatasetSpec, reports: dict[str, SplitReport], report_dir: str) -> None:
    """classes.csv: each class's share of pixels and of images in each split."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["id", "name", *(f"{split}_{of}" for split in reports for of in ("pixels", "images"))])
    for i, name in enumerate(spec.class_names):
        shares = []
        for report in reports.values():
            shares += [report.pixels[i] / max(report.pixels.sum(), 1), report.images[i] / max(report.items, 1)]
        writer.writerow([i, name, *(f"{share:.6g}" for share in shares)])
    write_text(report_dir, "classes.csv", stream.getvalue())


def write_duplicates(reports: dict[str, SplitReport], report_dir: str) -> None:
    """Prints how many photographs are there twice, within and across splits; duplicates.csv names them."""
    places = [(split, name) for split, report in reports.items() for name in report.fingerprints]
    prints = [found for report in reports.values() for found in report.fingerprints.values()]
    groups: dict[tuple[str, str, str], list[str]] = {}
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["kind", "split", "name", "other_split", "other_name"])
    pairs = find_duplicates(prints, MOST_DUPLICATES)
    for i, j, equal in pairs:
        (split, name), (other_split, other), kind = places[i], places[j], "exact" if equal else "near"
        writer.writerow([kind, split, printable(name), other_split, printable(other)])
        groups.setdefault((kind, split, other_split), []).append(f"{name} and {other}")
    write_text(report_dir, "duplicates.csv", stream.getvalue())
    for (kind, split, other), names in sorted(groups.items(), key=lambda group: group[0][1] == group[0][2]):
        where = f"within {split}" if split == other else f"in both {split} and {other}, which then measures nothing new"
        count = f"{len(names)} {kind} duplicate" + ("s" if len(names) > 1 else "")
        print(f"note: {count} {where} ({printable(names[0])}{', ...' * (len(names) > 1)}; duplicates.csv)")
    if len(pairs) == MOST_DUPLICATES:
        print(f"note: there are more duplicates than the {MOST_DUPLICATES} that were looked for")


def write_text(folder: str, name: str, text: str) -> None:
    os.makedirs(folder, exist_ok=True)
    temporary = os.path.join(folder, f".{name}.part{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, os.path.join(folder, name))
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


if __name__ == "__main__":
    raise SystemExit(main())
