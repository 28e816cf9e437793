"""Stage 1: every hybrid layer learns to put out what the teacher's attention puts out.

    python train_stage1.py --config configs/toyworld/stage1.yaml                              # one GPU or CPU
    torchrun --standalone --nproc_per_node 8 train_stage1.py --config configs/stage1.yaml [key=value …]

Started again, a run goes on where it was stopped.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pipelines.cli import entry_point
from pipelines.training.config import Stage1Config
from pipelines.training.run import parse_config, train


@entry_point()
def main() -> int:
    """Parse, check, train. Status 2 for bad input and for a run that cannot go on, 1 for one that learned nothing."""
    train(parse_config(Stage1Config, __doc__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
