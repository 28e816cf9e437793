"""The requests of inference.py: prompts from the command line or a file, and their pictures, checked beforehand."""

import argparse
from pathlib import Path

from pipelines.media.images import check_images
from pipelines.prompts.files import PromptRequest, check_prompt, read_prompt_file
from pipelines.prompts.jobs import PromptJob, plan_jobs, plan_scripts, read_requests
from pipelines.prompts.schedules import read_schedule
from wan.utils.errors import InputError


def requested_jobs(arguments: argparse.Namespace) -> list[PromptJob]:
    """The videos to make; with --i2v every one has an image, which can be read.

    Raises:
        InputError: a prompt, an image, a prompt file or a schedule that cannot be used; of images, the message names
            all.
    """
    if arguments.prompt_schedule is not None:
        if arguments.i2v or arguments.image is not None:
            raise InputError("--prompt_schedule names no images: leave --i2v and --image out")
        return plan_scripts(read_schedule(arguments.prompt_schedule), arguments.seed)
    requests = _from_flags(arguments) if arguments.prompt is not None else _from_file(arguments)
    check_images(request.image for request in requests if request.image is not None)
    return plan_jobs(requests, arguments.seed)


def _from_flags(arguments: argparse.Namespace) -> list[PromptRequest]:
    check_prompt(arguments.prompt, "--prompt")
    if arguments.i2v != (arguments.image is not None):
        raise InputError("--i2v with --prompt needs --image, and --image needs --i2v")
    return [PromptRequest(arguments.prompt, image=arguments.image, where="--prompt")]


def _from_file(arguments: argparse.Namespace) -> list[PromptRequest]:
    if arguments.image is not None:
        raise InputError("--image goes with --prompt: in a prompt file, every request names its own image")
    path: Path = arguments.data_path
    if not arguments.i2v:
        return read_requests(path)
    requests = read_prompt_file(path, with_images=True)
    for request in requests:
        if request.image is None:
            raise InputError(f"{request.where} has no image: with --i2v every request needs one")
    return requests
