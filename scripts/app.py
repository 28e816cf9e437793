"""Open a local page in which videos are generated live, side by side by up to three models, and steered.

    python scripts/app.py --config configs/toyworld/inference.yaml \\
        --hybrid_checkpoint models/toyworld/hybrid_75.safetensors

It needs gradio: pip install -e '.[demo]'. `make app` installs that and opens the page on the toy world.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from pipelines.app.app import App
from pipelines.app.limits import Limits
from pipelines.app.models import models_of
from pipelines.cli import entry_point, rank_and_world_size
from pipelines.config import InferenceConfig
from pipelines.flags import Parser, as_input
from pipelines.generation.arguments import InferenceRun, add_generation_flags, plan_run
from pipelines.generation.run import load_pipeline
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import temporal_stride

log = logging.getLogger(__name__)

LOCAL = "127.0.0.1"
PORT = 7860
PROMPT = "a shape slides behind the brown wall and comes out on the other side"


def app_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__, InferenceConfig, reads_config=True, config_help="as for inference.py")
    second = "a hybrid to compare with the softmax model of the config, and with its window of as many bytes"
    parser.add_argument("--hybrid_checkpoint", type=as_input, metavar="PATH", help=second)
    parser.add_argument("--prompt", default=PROMPT, help=f"in the page at first (default {PROMPT!r})")
    page = parser.add_argument_group("page")
    page.add_argument("--host", default=LOCAL, help=f"address to listen on (default {LOCAL}: this machine alone)")
    parser.add_value("--port", Annotated[int, Bounds(0, 65535)], "0 for any that is free", group=page, default=PORT)
    page.add_argument("--open_browser", action="store_true", help="open the page in the browser")
    running, waiting = Annotated[int, Bounds(1, 1000)], Annotated[int, Bounds(0, 1000)]
    parser.add_value("--running", running, "generations that take turns", group=page, default=Limits.running)
    parser.add_value("--waiting", waiting, "generations that wait behind them", group=page, default=Limits.waiting)
    upload = "megabytes of a file that a visitor sends: a picture, a video, or a session, which holds a memory"
    parser.add_value("--max_upload", Annotated[int, Bounds(1, 10**6)], upload, group=page, default=100)
    add_generation_flags(parser)
    # inference.py has these; a page's videos begin with nothing, and go where the page says.
    parser.set_defaults(i2v=False, image=None, video=None, metrics_folder=None)
    return parser


def limits_of(arguments: argparse.Namespace, config: InferenceConfig) -> Limits:
    """The config's size and length are the largest of the page."""
    return Limits(
        running=arguments.running,
        waiting=arguments.waiting,
        pixels=config.height * config.width,
        blocks=config.num_output_frames // config.frames_per_block,
        given_frames=(config.num_output_frames - 1) * temporal_stride(Path(config.model_folder)) + 1,
        playback_fps=config.fps,
    )


def load_app(run: InferenceRun, hybrid: Path | None, limits: Limits, folder: Path) -> App:
    """Load the models of a page.

    Raises:
        CheckpointError, InputError: weights that are missing, damaged or do not fit.
    """
    pipeline = load_pipeline(run)
    second = None
    if hybrid is not None:
        second = load_pipeline(replace(run, config=replace(run.config, checkpoint_path=str(hybrid), caveat=None)))
    return App(models_of(run.config, pipeline, second), limits, folder)


@entry_point("start the same command again")
def main() -> int:
    """Parse, check, load, serve until a signal comes."""
    arguments = app_parser().parse_args()
    if rank_and_world_size()[1] > 1:
        raise InputError("the app is one process: start it without torchrun")
    hybrid: Path | None = arguments.hybrid_checkpoint
    if hybrid is not None and not hybrid.exists():
        raise InputError(f"no checkpoint at {hybrid}: check the path of --hybrid_checkpoint")
    with tempfile.TemporaryDirectory(prefix="arl2-app-") as temporary:
        folder = Path(temporary)
        arguments.output_folder = folder / "runs"
        run = plan_run(arguments, lambda _: [])
        limits = limits_of(arguments, run.config)
        from pipelines.app.page import Defaults, build, serving  # needs gradio, which the command line does not

        logging.getLogger("httpx").setLevel(logging.WARNING)  # gradio asks itself whether it is there
        size, switch = (run.config.height, run.config.width), run.config.on_switch
        defaults = Defaults(arguments.prompt, *size, limits.blocks, arguments.seed, switch)
        with load_app(run, hybrid, limits, arguments.output_folder) as app:
            page = build(app, defaults, folder / "page")
            where, upload = (arguments.host, arguments.port), f"{arguments.max_upload}mb"
            with serving(page, *where, arguments.open_browser, upload) as address:
                log.info("the page is at %s; Ctrl-C ends it", address)
                while True:
                    time.sleep(1)


if __name__ == "__main__":
    raise SystemExit(main())
