"""image_train.py, of which one rank fails at a place and a step:  failing_rank.py PLACE RANK STEP [flag ...]"""

import sys

import torch

import image_train
from guided_diffusion import train_util


class Broken(Exception):
    """Of a kind that no part of the program expects."""


def fail(*_):
    raise Broken("injected")


def prepare(place: str, loop: train_util.TrainLoop, step: int) -> None:
    """`loop` fails at `place` once its step `step` is taken."""

    def fail_then(*_):
        if loop.state.step == step:
            fail()

    if place == "forward":
        loop.model.register_forward_pre_hook(fail_then)
    elif place == "backward":
        next(loop.model.parameters()).register_hook(fail_then)  # the last gradient: others are on their way
    elif place == "optimizer":
        take = loop.state.optimizer.step
        loop.state.optimizer.step = lambda: (take(), fail_then())
    elif place == "preview":
        loop.previews._draw = fail_then
    elif place == "validation":
        loop.validation._sum = fail_then
    elif place == "save":
        save = torch.save

        def fail_once(*arguments):
            torch.save = save
            raise OSError(5, "Input/output error")

        torch.save = fail_once


if __name__ == "__main__":
    place, rank, step, run = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), train_util.TrainLoop.run

    def run_to_the_failure(loop):
        if loop.world.rank == rank:
            prepare(place, loop, step)
        return run(loop)

    train_util.TrainLoop.run = run_to_the_failure
    sys.argv = ["image_train.py", *sys.argv[4:]]
    sys.exit(image_train.main())
