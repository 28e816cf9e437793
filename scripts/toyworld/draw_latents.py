"""Make training data of the toy world at any length: scenes, drawn and encoded, in resumable shards.

    python scripts/toyworld/draw_latents.py --world long --num_videos 2560 --num_output_frames 84 --seed 0 \\
        --output_folder data/toy_long

Video n of a set is the scene of seed + n, of the worlds of --world in turn; a longer video begins with the shorter one.
A fraction of the captions, --informative, names colours and shapes; the shipped generator was trained with half.
Scenes are drawn where they are encoded. On a GPU the VAE computes in bfloat16, as in its own training, unless --dtype
says otherwise. Videos are encoded in pieces, so memory does not depend on their length.

A run that is started again makes what is missing. Afterwards the folder holds what this command line says, and no more.
Other worlds, lengths, fractions or models are refused. The data are those of scripts/encode_videos.py: train_stage1.py
and train_stage2.py take the folder.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from arl2.toyworld.world.worlds import World
from pipelines.cli import choose_device, entry_point
from pipelines.console.shipped import ROOT
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, as_input, as_path
from pipelines.toyworld.draw import DrawSettings, draw_latents

FORMER = {"--videos": "--num_videos", "--folder": "--output_folder", "--latent_frames": "--num_output_frames"}
"""Former names of flags."""
FLAGS = {
    "num_videos": "how many",
    "seed": "of the first scene; others have its successors",
    "informative": "fraction of the captions that name colours and shapes",
    "batch": "videos at once, for speed alone",
}


@entry_point()
def main() -> int:
    """Parse, check, draw, encode, write."""
    parser = Parser(__doc__, DrawSettings, aliases=FORMER)
    bundle = "the toy world's bundle, of which VAE and text encoder are taken (default models/toyworld)"
    parser.add_argument(
        "--model_folder", type=as_input, default=ROOT / "models" / "toyworld", metavar="PATH", help=bundle
    )
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the shards go")
    worlds = "kinds of scenes, in turn if there are several; standard by default"
    parser.add_argument("--world", nargs="+", choices=list(World), default=[World.STANDARD], help=worlds)
    length = "length of the videos in latent frames; F make 4F - 3 frames"
    parser.add_setting("--num_output_frames", "latent_frames", length)
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    parser.add_device()
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    settings = DrawSettings(world=tuple(map(World, arguments.world)), **arguments.flags)
    draw_latents(
        settings, arguments.model_folder, arguments.output_folder, device, choose_dtype(arguments.dtype, device)
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
